"""A lost rank, end to end: real torch.distributed ranks are killed and stopped in the middle of a collective, and the
gang is rebuilt.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import Fault, RunError
from cluster.gang import Gang
from cluster.placement import RoleDemand, plan_placement
from cluster.pool import Pool
from cluster.session import Session
from cluster.spawn import Spawner
from cluster.work import Work

CONFIG = ClusterConfig(ready_timeout_s=300, call_timeout_s=90, peer_timeout_s=6)

pytestmark = pytest.mark.slow


class Reducer:
    """A rank that adds up ones with its peers. die_at: a file; where it is, rank 1 dies in its constructor."""

    def __init__(self, rank: int, ranks: int, die_at: str = "", timeout_s: float = CONFIG.peer_timeout_s) -> None:
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        if die_at and rank == 1 and Path(die_at).exists():
            os._exit(5)

    def connect(self, address: str, port: int) -> tuple[int, int]:
        import torch.distributed

        method, timeout = f"tcp://{address}:{port}", timedelta(seconds=self.timeout_s)
        torch.distributed.init_process_group(
            "gloo", init_method=method, rank=self.rank, world_size=self.ranks, timeout=timeout
        )
        return os.getpid(), port

    def reduce(self, rounds: int = 1) -> tuple[float, int]:
        """The sum over the ranks, and the process that says so; a round takes 10 ms."""
        import torch.distributed

        for _ in range(rounds):
            ones = torch.ones(4)
            torch.distributed.all_reduce(ones)
            time.sleep(0.01)
        return float(ones[0]), os.getpid()

    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()


class Napper:
    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()


@pytest.fixture(scope="module")
def placed(ray_session: Session) -> Iterator[Spawner]:
    """A bundle for each, so that a new rank must wait until the old one has left its seat."""
    asked = [RoleDemand("policy", 2, 0), RoleDemand("rollout", 2, 0)]
    placed = ray_session.place(plan_placement(asked, share_devices=False, cpus_per_bundle=1, local_cpus=1))
    yield placed
    placed.remove()


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="cluster")
    return caplog


@pytest.fixture
def make_gang(ray_session: Session, placed: Spawner) -> Iterator[Callable[..., Gang]]:
    gangs: list[Gang] = []

    def make(ranks: int = 2, pump: Pump | None = None, **arguments: Any) -> Gang:
        spawn = lambda rank: placed.spawn(Reducer, "policy", rank, rank, ranks, **arguments)  # noqa: E731
        gangs.append(Gang("policy", spawn, ranks, pump or Pump(), CONFIG, ray_session.fingerprint))
        gangs[-1].start()
        return gangs[-1]

    yield make
    for gang in gangs:
        gang.close()


def interrupt(gang: Gang, pid: int, number: signal.Signals) -> tuple[RunError, float]:
    """Signal a rank while the ranks reduce: the error, and how long it took."""
    ticket = gang.begin("update 3", lambda handle, rank: handle.reduce.remote(20_000))
    time.sleep(0.5)
    os.kill(pid, number)
    began = time.monotonic()
    with pytest.raises(RunError) as caught:
        gang._finish(ticket, CONFIG.call_timeout_s)
    return caught.value, time.monotonic() - began


def rebuild(gang: Gang) -> list[Any]:
    gang.restart()
    return gang.connect()


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_killed_and_stopped_ranks_are_told_by_name_and_the_gang_is_rebuilt_each_time(
    make_gang: Callable[..., Gang], logged: pytest.LogCaptureFixture
) -> None:
    gang = make_gang()
    met = [gang.connect()]

    error, seconds = interrupt(gang, met[0][1][0], signal.SIGKILL)
    assert (error.who, error.phase) == ("policy[1]", "update 3")
    assert error.fault in (Fault.WORKER_LOST, Fault.EXPIRED)  # Ray may take longer to see it than its peer
    assert seconds < 80, "before the deadline of the call"
    met.append(rebuild(gang))

    error, seconds = interrupt(gang, met[1][0][0], signal.SIGSTOP)
    assert (error.who, error.phase, error.fault) == ("policy[0]", "update 3", Fault.EXPIRED)
    assert "no answer; its peer policy[1] reports:" in str(error)
    assert "Timed out waiting 6000ms for" in str(error)
    assert 5 < seconds < 80
    met.append(rebuild(gang))

    results = gang.call("update 3", lambda handle, rank: handle.reduce.remote())
    assert [value for value, _ in results] == [2.0, 2.0]
    assert [pid for _, pid in results] == [pid for pid, _ in met[2]]
    pids, ports = [pid for ranks in met for pid, _ in ranks], [ranks[0][1] for ranks in met]
    assert len(set(pids)) == 6
    assert len(set(ports)) == 3
    assert all(is_gone(pid) for pid in pids[:4]), "also the stopped one"
    for line in (
        f"policy[1] ready: pid {pids[1]} on",
        "policy[1] lost in 'update 3': ",
        "policy[0] lost in 'update 3': it did not answer",
    ):
        assert sum(message.startswith(line) for message in logged.messages) == 1
    assert sum(message.startswith("policy rebuilt in") for message in logged.messages) == 2


def test_a_rank_that_dies_in_its_constructor_is_named_and_the_gang_can_be_rebuilt_again(
    make_gang: Callable[..., Gang], tmp_path: Path
) -> None:
    gang = make_gang(die_at=str(tmp_path / "die"))
    gang.connect()
    (tmp_path / "die").touch()
    with pytest.raises(RunError, match=r"policy\[1\] failed during 'start'") as caught:
        rebuild(gang)
    assert caught.value.fault is Fault.WORKER_LOST
    (tmp_path / "die").unlink()
    rebuild(gang)
    assert gang.call("update", lambda handle, rank: handle.reduce.remote())[1][0] == 2.0


def test_a_gang_of_one_that_stops_is_noticed_at_the_deadline_of_its_call(make_gang: Callable[..., Gang]) -> None:
    gang = make_gang(ranks=1)
    [pid] = gang.call("nap", lambda handle, rank: handle.nap.remote(0))
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(RunError, match=r"policy\[0\] failed during 'nap'.*\n.*no answer within 1 s") as caught:
        gang.call("nap", lambda handle, rank: handle.nap.remote(0), timeout_s=1)
    assert caught.value.fault is Fault.EXPIRED
    [(new, _)] = rebuild(gang)
    assert new != pid
    assert is_gone(pid)


def test_a_rank_lost_while_idle_fails_the_next_call_and_pool_workers_live_through_the_rebuild(
    make_gang: Callable[..., Gang], ray_session: Session, placed: Spawner
) -> None:
    pump, naps = Pump(), list[int]()
    pool = Pool(
        "rollout", lambda index: placed.spawn(Napper, "rollout", index), 2, pump, CONFIG, ray_session.fingerprint
    )
    pool.start()
    gang = make_gang(pump=pump)
    pids = [pid for pid, _ in gang.connect()]
    pool.wait_ready()
    before = pool.workers

    def submit(seconds: float, done: Callable[[int], None]) -> None:
        pool.submit(
            Work(
                phase="nap",
                send=lambda worker, attempt: (worker.nap.remote(seconds),),
                on_done=lambda pid, data, attempt: done(pid),
            )
        )

    def unwanted(pid: int) -> None:
        raise AssertionError("this work was dropped")

    for _ in range(4):
        submit(1.5, unwanted)
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(RunError, match=r"policy\[0\] failed during 'update 4'") as caught:
        gang.call("update 4", lambda handle, rank: handle.reduce.remote())
    assert caught.value.fault is Fault.WORKER_LOST
    pool.drop_work()
    submit(0.1, naps.append)
    rebuild(gang)
    submit(0.1, naps.append)
    pump.run_until(lambda: len(naps) == 2, timeout_s=120, waiting_for="naps")
    assert set(naps) <= {worker.pid for worker in before}
    assert pool.workers == before
    assert pool.replaced == 0
    pool.close()
