"""Gangs of real Ray ranks: they meet, answer together, and fail under the name of the rank that is to blame."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import Fault, RunError
from cluster.gang import Gang
from cluster.placement import RoleDemand, plan_placement
from cluster.session import Session
from cluster.spawn import Spawner

CONFIG = ClusterConfig(ready_timeout_s=300, call_timeout_s=20)


class Rank:
    """Rank 0 listens, the others connect to it, and every rank keeps its connections for as long as it lives."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self.peers: list[socket.socket] = []

    def connect(self, address: str, port: int) -> tuple[int, int]:
        if self.rank == 0:
            with socket.create_server(("", port)) as server:
                self.peers = [server.accept()[0] for _ in range(self.ranks - 1)]
            return self.rank, len(self.peers)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.peers = [socket.create_connection((address, port), timeout=5)]
                return self.rank, len(self.peers)
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def report(self, trouble: str = "") -> tuple[int, bytes]:
        if trouble == "raise":
            raise ValueError(f"bad batch on rank {self.rank}")
        if trouble == "hang":
            time.sleep(60)
        if trouble == "lose":
            time.sleep(0.4)
            raise RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:3456"
            )
        if trouble == "late":
            time.sleep(3.0)  # by then its peer has answered
        if trouble == "watchdog":
            os.write(
                2,
                b"[rank0]:[E1129 ProcessGroupNCCL.cpp:688] [Rank 0] Watchdog caught collective operation timeout: "
                b"WorkNCCL(OpType=ALLREDUCE)\n",
            )
            os.abort()
        if trouble == "die later":
            time.sleep(0.8)
            os._exit(5)
        return self.rank, bytes([self.rank])


@pytest.fixture(scope="module")
def placed(ray_session: Session) -> Iterator[Spawner]:
    placed = ray_session.place(
        plan_placement([RoleDemand("policy", 2, 0)], share_devices=True, cpus_per_bundle=1, local_cpus=1)
    )
    yield placed
    placed.remove()


@pytest.fixture
def make_gang(ray_session: Session, placed: Spawner) -> Iterator[Callable[..., Gang]]:
    gangs: list[Gang] = []

    def make(config: ClusterConfig = CONFIG) -> Gang:
        gang = Gang(
            "policy",
            lambda rank: placed.spawn(Rank, "policy", rank, rank, ranks=2),
            2,
            Pump(),
            config,
            ray_session.fingerprint,
        )
        gangs.append(gang)
        gang.start()
        return gang

    yield make
    for gang in gangs:
        gang.close()


def send(*troubles: str) -> Callable[[Any, int], Any]:
    """Trouble by rank."""
    return lambda handle, rank: handle.report.options(num_returns=2).remote(troubles[rank])


def test_ranks_meet_and_answer_in_order(make_gang: Callable[..., Gang]) -> None:
    gang = make_gang()
    assert gang.connect() == [(0, 1), (1, 1)]
    ticket = gang.begin("report", send("", ""))
    gang._pump.run_until(lambda: ticket.done, timeout_s=20, waiting_for="reports")
    assert ticket.results() == [0, 1]
    assert [ray.get(ticket.refs(rank)[0], timeout=10) for rank in range(2)] == [b"\0", b"\1"]
    assert gang.call("report", lambda handle, rank: handle.report.remote()) == [(0, b"\0"), (1, b"\1")]


@pytest.mark.parametrize(
    ("troubles", "who", "fault", "cause"),
    [
        (("lose", "die later"), "policy[1]", Fault.WORKER_LOST, "the process or its node is gone"),
        pytest.param(
            ("raise", "lose"), "policy[0]", Fault.USER_ERROR, "ValueError: bad batch on rank 0", marks=pytest.mark.slow
        ),
        pytest.param(
            ("hang", "raise"), "policy[1]", Fault.USER_ERROR, "ValueError: bad batch on rank 1", marks=pytest.mark.slow
        ),
        (("", "lose"), "policy[1]", Fault.PEER_LOST, "a peer of its gang is gone or silent:"),
        pytest.param(
            ("lose", "hang"),
            "policy[1]",
            Fault.EXPIRED,
            "no answer; its peer policy[0] reports:",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_a_failure_is_told_under_the_name_of_the_rank_to_blame(
    make_gang: Callable[..., Gang], troubles: tuple[str, str], who: str, fault: Fault, cause: str
) -> None:
    gang = make_gang()
    with pytest.raises(RunError) as caught:
        gang.call("update 3", send(*troubles))
    assert (caught.value.who, caught.value.phase, caught.value.fault) == (who, "update 3", fault)
    assert cause in str(caught.value)


def test_a_rank_that_nccls_watchdog_ended_is_not_the_one_to_blame(make_gang: Callable[..., Gang]) -> None:
    gang = make_gang()
    gang.connect()
    with pytest.raises(RunError) as caught:
        gang.call("update 3", send("watchdog", "hang"))
    assert (caught.value.who, caught.value.fault) == ("policy[1]", Fault.EXPIRED)
    assert (
        "no answer; its peer policy[0] reports:\n[rank0]:[E1129 ProcessGroupNCCL.cpp:688] [Rank 0] Watchdog caught"
        in str(caught.value)
    )


def test_a_rank_that_hangs_is_named_when_the_call_expires(make_gang: Callable[..., Gang]) -> None:
    gang = make_gang()
    gang.call("start", lambda handle, rank: handle.describe.remote())
    with pytest.raises(RunError, match=r"policy\[1\] failed during 'update 3'.*\n.*no answer within 3 s") as caught:
        gang.call("update 3", send("", "hang"), timeout_s=3)
    assert caught.value.fault is Fault.EXPIRED


@pytest.mark.parametrize("uneven", [False, True])
def test_a_rank_may_answer_later_than_its_peers_where_that_is_its_task(
    make_gang: Callable[..., Gang], uneven: bool
) -> None:
    """Rank 0 writes the model, say, and takes longer than peer_timeout_s."""
    gang = make_gang(CONFIG.model_copy(update={"peer_timeout_s": 0.2}))
    gang.call("start", lambda handle, rank: handle.describe.remote(), uneven=True)  # processes start at their own pace
    if uneven:
        assert (
            gang.call("export", lambda handle, rank: handle.report.remote("late" if rank == 0 else ""), uneven=True)[0][
                0
            ]
            == 0
        )
        return
    with pytest.raises(RunError, match=r"policy\[0\] failed during 'export'.*\n.*no answer within 0.2 s"):
        gang.call("export", lambda handle, rank: handle.report.remote("late" if rank == 0 else ""))


def test_a_rank_that_does_not_see_the_run_folder_is_refused(
    make_gang: Callable[..., Gang], placed: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert placed._mark is not None
    monkeypatch.setattr(placed, "_mark", replace(placed._mark, file="/on/another/machine", patience_s=0))
    with pytest.raises(
        RunError,
        match=r"policy\[0\] failed during 'handshake': on its node, .*another/machine: No such file.* Put --run-dir on "
        r"a filesystem",
    ):
        make_gang().connect()


def test_what_a_forgotten_call_answers_is_ignored(make_gang: Callable[..., Gang]) -> None:
    gang = make_gang()
    forgotten = gang.begin("update 3", send("raise", ""))
    forgotten.forget()
    assert gang.call("update 4", lambda handle, rank: handle.report.remote()) == [(0, b"\0"), (1, b"\1")]
    assert not forgotten.done


def test_a_rank_with_other_code_is_refused(make_gang: Callable[..., Gang], ray_session: Session) -> None:
    gang = make_gang()
    gang._fingerprint = replace(ray_session.fingerprint, versions={**ray_session.fingerprint.versions, "torch": "1.0"})
    with pytest.raises(RunError, match=r"policy\[0\] failed during 'handshake': .* torch is .* there, 1.0 here"):
        gang.connect()


def test_close_kills_every_rank(make_gang: Callable[..., Gang]) -> None:
    gang = make_gang()
    pids = [worker.pid for worker in gang.call("start", lambda handle, rank: handle.describe.remote())]
    gang.close()
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank survived"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as cmdline:
            return bool(cmdline.read())
    except OSError:
        return False
