"""Pools of real Ray workers that die, hang, raise and answer too late."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import ContractError, Fault, RunError
from cluster.incidents import Incidents
from cluster.placement import RoleDemand, plan_placement
from cluster.pool import Pool
from cluster.session import Session
from cluster.spawn import Spawner
from cluster.work import Decision, Restart, Work, decide, decide_start

CONFIG = ClusterConfig(ready_timeout_s=30, call_timeout_s=20, max_attempts=3, max_replacements=2)


class Squarer:
    """A worker that does to itself what the number tells it to."""

    def __init__(self, trouble: str = "") -> None:
        if trouble == "raise":
            raise ValueError("no such model")
        if trouble == "die":
            os._exit(5)
        if trouble == "slow":
            time.sleep(60)

    def square(self, number: int, attempt: int, trouble: str = "") -> tuple[dict[str, int], bytes]:
        if trouble == "die" or (trouble == "die once" and attempt == 1):
            os._exit(5)
        if trouble == "hang" or (trouble == "hang once" and attempt == 1):
            time.sleep(60)
        if trouble == "take time":
            time.sleep(1)
        if trouble == "freeze" and attempt == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if trouble == "raise":
            raise ValueError(f"cannot square {number}")
        if trouble == "break the contract":
            raise ContractError(f"rule: must be kept, got {number}; keep it")
        return {"number": number, "pid": os.getpid()}, bytes(number * number)

    def lose_an_input(self) -> None:
        raise ray.exceptions.OwnerDiedError("00" * 28, b"", "")


@pytest.fixture(scope="module")
def placed(ray_session: Session) -> Iterator[Spawner]:
    placed = ray_session.place(
        plan_placement([RoleDemand("squarer", 2, 0)], share_devices=True, cpus_per_bundle=1, local_cpus=1)
    )
    yield placed
    placed.remove()


@pytest.fixture
def make_pool(ray_session: Session, placed: Spawner) -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(size: int = 2, config: ClusterConfig = CONFIG, trouble: Callable[[int], str] = lambda start: "") -> Pool:
        starts = iter(range(1000))
        spawn = lambda index: placed.spawn(Squarer, "squarer", index, trouble(next(starts)))  # noqa: E731
        pools.append(Pool("squarer", spawn, size, Pump(), config, ray_session.fingerprint))
        pools[-1].start()
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


class Owner:
    """Submits numbers and keeps what comes back."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.found: dict[int, tuple[int, int]] = {}  # number -> (square, attempt)
        self.taken_back: list[int] = []
        self.retried: list[int] = []

    def submit(self, number: int, trouble: str = "", **more: Any) -> None:
        def send(worker: Any, attempt: int) -> tuple[Any, ...]:
            return tuple(worker.square.options(num_returns=2).remote(number, attempt, trouble))

        def done(report: dict[str, int], data: tuple[Any, ...], attempt: int) -> None:
            assert number not in self.found, "called back twice"
            self.found[number] = (len(ray.get(data[0], timeout=10)), attempt)

        retry = lambda: self.retried.append(number)  # noqa: E731
        self.pool.submit(Work(phase=f"square {number}", send=send, on_done=done, on_retry=retry, **more))

    def wait(self, count: int) -> None:
        self.pool._pump.run_until(
            lambda: len(self.found) + len(self.taken_back) == count, timeout_s=240, waiting_for="squares"
        )


def test_all_work_is_done_and_every_worker_works(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool()
    pool.wait_ready()
    owner = Owner(pool)
    for number in range(8):
        owner.submit(number)
    assert pool.unfinished == 8
    owner.wait(8)
    assert owner.found == {number: (number * number, 1) for number in range(8)}
    assert pool.unfinished == 0
    assert pool.replaced == 0
    assert len({worker.pid for worker in pool.workers}) == 2
    assert 0 < pool.busy_seconds < 60


def test_a_worker_that_dies_mid_call_is_replaced_and_its_work_done_with_the_same_result(
    make_pool: Callable[..., Pool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cluster.pool")
    pool = make_pool()
    pool.wait_ready()
    started = [worker.pid for worker in pool.workers]
    before = set(started)
    owner = Owner(pool)
    for number in range(5):
        owner.submit(number, "die once" if number == 2 else "")
    owner.wait(5)
    assert owner.found == {number: (number * number, 2 if number == 2 else 1) for number in range(5)}
    pool.wait_ready()
    assert pool.replaced == 1
    [new] = {worker.pid for worker in pool.workers} - before
    assert owner.retried == [2]
    # Ray may say something of its own
    messages = [record.getMessage() for record in caplog.records if record.name == "cluster.pool"]
    ready, (lost, replaced, again) = messages[:2], messages[2:]
    assert sorted(line.partition(" on ")[0] for line in ready) == [
        f"squarer[{i}] ready: pid {pid}" for i, pid in enumerate(started)
    ]
    who = lost.partition(" ")[0]
    assert lost == f"{who} lost in 'square 2': the process or its node is gone"
    assert replaced == f"{who} replaced, number 1 in its pool"
    assert again.startswith(f"{who} ready: pid {new} on ")


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["hang once", "freeze"])
def test_a_worker_that_hangs_is_killed_and_replaced(make_pool: Callable[..., Pool], trouble: str) -> None:
    pool = make_pool(size=1)
    pool.wait_ready()
    hanging = pool.workers[0].pid
    owner = Owner(pool)
    owner.submit(3, trouble, timeout_s=4)  # the second attempt has no longer than the first
    owner.submit(4)
    owner.wait(2)
    assert owner.found == {3: (9, 2), 4: (16, 1)}
    assert pool.replaced == 1
    until = time.monotonic() + 60
    while (
        Path(f"/proc/{hanging}/cmdline").exists()
        and Path(f"/proc/{hanging}/cmdline").read_text()
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    assert time.monotonic() < until, "the hanging process is still there"


@pytest.mark.slow
def test_the_owner_may_deal_with_work_whose_last_attempt_hangs(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(size=1)
    owner = Owner(pool)

    def take_back(fault: Fault) -> bool:
        assert fault is Fault.EXPIRED
        owner.taken_back.append(3)
        owner.submit(5)  # must wait for the replacement, not go to the worker that hangs
        return True

    owner.submit(3, "hang", timeout_s=0.5, attempts=1, on_spent=take_back)
    owner.wait(2)
    assert owner.found == {5: (25, 1)}
    assert pool.replaced == 1


def drop(owner: Owner, trouble: str, **more: Any) -> None:
    """Work that a worker is in the middle of and work that waits, both dropped; nobody may be called back for them."""

    def unwanted(*_: Fault) -> bool:
        raise AssertionError("called back for work that was dropped")

    owner.submit(1, trouble, on_spent=unwanted, on_input_lost=unwanted, attempts=1, **more)
    owner.submit(2)
    assert owner.pool.unfinished == 2
    owner.pool.drop_work()
    assert owner.pool.unfinished == 0


@pytest.mark.parametrize(
    ("trouble", "replaced"),
    [
        ("raise", 0),
        ("die", 1),
        *(
            pytest.param(trouble, replaced, marks=pytest.mark.slow)
            for trouble, replaced in (("take time", 0), ("hang", 1))
        ),
    ],
    ids=lambda value: str(value),
)
def test_nobody_hears_of_dropped_work_however_it_ends(
    make_pool: Callable[..., Pool], trouble: str, replaced: int
) -> None:
    """The worker takes new work when it is done with the old, or when its replacement is there."""
    pool = make_pool(size=1)
    pool.wait_ready()
    pid = pool.workers[0].pid
    owner = Owner(pool)
    drop(owner, trouble, timeout_s=0.5 if trouble == "hang" else None)
    owner.submit(3)
    assert pool.unfinished == 1
    owner.wait(1)
    assert owner.found == {3: (9, 1)}
    assert owner.retried == []
    assert (pool.replaced, pool.workers[0].pid == pid) == (replaced, not replaced)


@pytest.mark.slow
def test_work_may_be_dropped_from_within_a_call_back(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(size=1)
    owner = Owner(pool)

    def give_up(fault: Fault) -> bool:
        pool.drop_work()
        owner.submit(4)
        return True

    owner.submit(3, "hang once", timeout_s=0.3, attempts=1, on_spent=give_up)
    owner.wait(1)
    assert owner.found == {4: (16, 1)}
    assert owner.retried == []


def test_work_that_kills_every_worker_stops_the_run_with_names(make_pool: Callable[..., Pool]) -> None:
    owner = Owner(make_pool(size=1, config=CONFIG.model_copy(update={"max_attempts": 2})))
    owner.submit(7, "die")
    with pytest.raises(RunError) as caught:
        owner.wait(1)
    assert (caught.value.who, caught.value.phase, caught.value.fault) == ("squarer[0]", "square 7", Fault.WORKER_LOST)
    assert "attempt 2 of 2 failed (cluster.max_attempts)" in str(caught.value)


def test_an_error_in_the_workers_code_stops_the_run_with_its_own_traceback(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(size=1)
    owner = Owner(pool)
    owner.submit(7, "raise")
    with pytest.raises(RunError) as caught:
        owner.wait(1)
    assert (caught.value.who, caught.value.phase, caught.value.fault) == ("squarer[0]", "square 7", Fault.USER_ERROR)
    assert 'raise ValueError(f"cannot square {number}")\nValueError: cannot square 7' in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    owner.submit(8, "break the contract")
    with pytest.raises(RunError) as caught:
        owner.wait(1)
    assert str(caught.value) == "squarer[0] failed during 'square 8': rule: must be kept, got 8; keep it."
    caught.value.find_logs(Path(pool.workers[0].log_file).parent)
    assert str(caught.value).endswith(f"keep it. Logs: {pool.workers[0].log_file}")
    assert pool.replaced == 0


def test_a_lost_input_goes_back_to_the_owner_and_the_worker_stays(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(size=1)
    owner = Owner(pool)
    again: Callable[[], None] = lambda: owner.submit(6)  # noqa: E731
    work = Work(
        phase="score",
        send=lambda worker, attempt: (worker.lose_an_input.remote(),),
        on_done=lambda *_: None,
        on_input_lost=again,
    )
    pool.submit(work)
    owner.wait(1)
    assert owner.found == {6: (36, 1)}
    assert pool.replaced == 0
    pool.submit(replace(work, on_input_lost=None))
    with pytest.raises(RunError, match=r"squarer\[0\] failed during 'score': nobody can make the lost object anew"):
        owner.wait(2)


def test_a_constructor_that_raises_stops_the_run_and_one_that_dies_is_replaced(make_pool: Callable[..., Pool]) -> None:
    with pytest.raises(RunError, match=r"(?s)squarer\[0\] failed during 'start'.*ValueError: no such model"):
        make_pool(size=1, trouble=lambda start: "raise").wait_ready()
    pool = make_pool(size=1, trouble=lambda start: "die" if start == 0 else "")
    pool.wait_ready()
    assert pool.replaced == 1


def test_a_worker_that_does_not_get_ready_in_time_stops_the_run(make_pool: Callable[..., Pool]) -> None:
    config = CONFIG.model_copy(update={"ready_timeout_s": 0.02})
    with pytest.raises(
        RunError, match=r"squarer\[0\] failed during 'start': not ready within 0.02 s. Raise cluster.ready_timeout_s"
    ):
        make_pool(size=1, config=config).wait_ready()


def test_a_worker_with_other_code_stops_the_run(ray_session: Session, placed: Spawner) -> None:
    other = replace(ray_session.fingerprint, files={**ray_session.fingerprint.files, "cluster/pool.py": "another hash"})
    pool = Pool("squarer", lambda index: placed.spawn(Squarer, "squarer", index), 1, Pump(), CONFIG, other)
    pool.start()
    with pytest.raises(
        RunError, match=r"squarer\[0\] failed during 'handshake': it imports another copy of cluster .*cluster/pool.py"
    ):
        pool.wait_ready()
    pool.close()


def test_nobody_is_called_back_after_close(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(size=1)
    pool.wait_ready()
    owner = Owner(pool)
    owner.submit(1)
    owner.submit(2)
    pool.close()
    assert pool.unfinished == 0
    with pytest.raises(RunError, match=r"nothing is running"):
        owner.wait(1)


RETRY = Decision(replace=True, requeue=True)


@pytest.mark.parametrize(
    ("fault", "attempt", "incidents", "decision"),
    [
        (Fault.WORKER_LOST, 1, 1, RETRY),
        (Fault.EXPIRED, 2, 2, RETRY),
        (Fault.EXPIRED, 0, 1, Decision(replace=True)),
        (Fault.USER_ERROR, 0, 0, Decision()),
        (Fault.PEER_LOST, 1, 0, Decision(stop="its code raised an error, which a second attempt would only repeat")),
        (Fault.INPUT_LOST, 0, 9, Decision()),
        (Fault.INPUT_LOST, 1, 0, Decision(stop="nobody can make the lost object anew")),
        (
            Fault.WORKER_LOST,
            3,
            1,
            Decision(replace=True, spent=True, stop="attempt 3 of 3 failed (cluster.max_attempts)"),
        ),
        (
            Fault.WORKER_LOST,
            1,
            3,
            Decision(stop="its pool has lost workers 3 times within 3600 s (cluster.max_replacements = 2)"),
        ),
        (
            Fault.WORKER_LOST,
            3,
            3,
            Decision(stop="its pool has lost workers 3 times within 3600 s (cluster.max_replacements = 2)"),
        ),
        (Fault.USER_ERROR, 1, 0, Decision(stop="its code raised an error, which a second attempt would only repeat")),
    ],
)
def test_decisions(fault: Fault, attempt: int, incidents: int, decision: Decision) -> None:
    assert decide(fault, attempt=attempt, attempts=3, incidents=incidents, config=CONFIG) == decision


@pytest.mark.parametrize(
    ("fault", "failures", "failing_s", "incidents", "others", "restart"),
    [
        (Fault.WORKER_LOST, 1, 0, 1, False, Restart(after_s=1)),
        (Fault.WORKER_LOST, 4, 20, 1, False, Restart(after_s=8)),  # Ray may yet see that the node is gone
        (Fault.WORKER_LOST, 6, 31, 2, True, Restart(absent=True, after_s=30)),
        (
            Fault.WORKER_LOST,
            6,
            31,
            2,
            False,
            Restart(stop="6 starts in a row were lost within 31 s, and no other worker is left"),
        ),
        (
            Fault.WORKER_LOST,
            1,
            0,
            3,
            True,
            Restart(stop="its pool has lost workers 3 times within 3600 s (cluster.max_replacements = 2)"),
        ),
        (Fault.EXPIRED, 1, 0, 1, True, Restart(absent=True, after_s=30)),
        (Fault.EXPIRED, 1, 0, 1, False, Restart(stop="not ready within 30 s")),
        (
            Fault.USER_ERROR,
            1,
            0,
            0,
            True,
            Restart(stop="its code raised an error, which a second attempt would only repeat"),
        ),
        (
            Fault.PEER_LOST,
            1,
            0,
            0,
            True,
            Restart(stop="its code raised an error, which a second attempt would only repeat"),
        ),
    ],
)
def test_decisions_at_a_start(
    fault: Fault, failures: int, failing_s: float, incidents: int, others: bool, restart: Restart
) -> None:
    assert (
        decide_start(fault, failures=failures, failing_s=failing_s, incidents=incidents, others=others, config=CONFIG)
        == restart
    )


def test_a_node_is_one_incident_and_so_is_a_cause_and_old_ones_are_forgotten() -> None:
    incidents, chunk = Incidents(window_s=100), object()
    for _ in range(5):  # a pool's workers on a node that died, and twice each those in their places
        assert [incidents.add(now, "10.0.0.7") for now in (0, 4, 9)] == [1, 1, 1]
    assert incidents.add(10, "10.0.0.8", chunk) == 2
    assert [incidents.add(now, f"10.0.0.{now}", chunk) for now in (50, 70, 90)] == [2, 2, 2], (
        "wherever it kills, and however long"
    )
    assert incidents.add(91, "10.0.0.7") == 3, "later on the same node"
    incidents.forgive(chunk)
    assert incidents.add(91, "10.0.0.7", object()) == 2, "what killed them is known: it says nothing of the pool"
    assert incidents.add(101, "10.0.0.9") == 2, "the first is forgotten"
    assert incidents.add(300, "10.0.0.9") == 1


def test_a_pool_goes_on_without_a_worker_that_does_not_get_ready_and_takes_it_in_when_it_does(
    make_pool: Callable[..., Pool], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.work.LOSING_S", 8.0)  # longer than the other worker takes to start
    pool = make_pool(size=2, trouble=lambda start: "slow" if start == 1 else "")
    late = pool._workers[1].call
    assert late is not None
    pool._pump.hasten(late, 0.3)
    pool.wait_ready()
    assert (pool.absent, len(pool.workers)) == (1, 1)
    owner = Owner(pool)
    owner.submit(3)
    owner.wait(1)
    assert owner.found == {3: (9, 1)}
    pool._pump.run_until(lambda: len(pool.workers) == 2, timeout_s=240, waiting_for="the second worker")
    assert pool.absent == 0
    assert (
        "squarer[1] did not get ready; the pool goes on with 1 workers and tries again now and then" in caplog.messages
    )


@pytest.mark.parametrize("fails", ["the owner", "the pool"])
def test_a_worker_takes_work_again_after_whatever_was_raised_over_a_lost_input(
    make_pool: Callable[..., Pool], fails: str
) -> None:
    pool = make_pool(size=1)

    def refuse() -> None:
        raise RunError("reward", "score", "lost too often", fault=Fault.INPUT_LOST)

    send = lambda worker, attempt: (worker.lose_an_input.remote(),)  # noqa: E731
    pool.submit(
        Work(phase="score", send=send, on_done=lambda *_: None, on_input_lost=refuse if fails == "the owner" else None)
    )
    owner = Owner(pool)
    with pytest.raises(RunError) as caught:
        owner.wait(1)
    assert caught.value.fault is Fault.INPUT_LOST
    owner.submit(4)
    owner.wait(1)
    assert owner.found == {4: (16, 1)}
    assert pool.replaced == 0


@pytest.fixture
def make_roaming(ray_session: Session, placed: Spawner) -> Iterator[Callable[..., tuple[Pool, set[int]]]]:
    """A pool and the seats that have a node; the test changes them as `Seats` would."""
    pools: list[Pool] = []

    def make(*there: int, config: ClusterConfig = CONFIG) -> tuple[Pool, set[int]]:
        seats = set(there)
        spawn = lambda index: placed.spawn(Squarer, "squarer", index) if index in seats else None  # noqa: E731
        pools.append(Pool("squarer", spawn, 2, Pump(), config, ray_session.fingerprint))
        pools[-1].is_gone = lambda index: index not in seats
        return pools[-1], seats

    yield make
    for pool in pools:
        pool.close()


def test_a_pool_begins_with_the_workers_that_have_a_node_and_takes_others_in(
    make_roaming: Callable[..., tuple[Pool, set[int]]],
) -> None:
    pool, seats = make_roaming(0)
    pool.start()
    pool.wait_ready()
    assert (len(pool.workers), pool.absent, pool.is_ready) == (1, 0, True)
    seats.add(1)
    pool.occupy(1)
    pool.occupy(1)  # is there already
    pool.wait_ready()
    assert len({worker.pid for worker in pool.workers}) == 2
    owner = Owner(pool)
    for number in range(4):
        owner.submit(number)
    owner.wait(4)
    assert pool.replaced == 0


def test_work_of_a_worker_that_leaves_by_plan_is_done_elsewhere_and_does_not_count(
    make_roaming: Callable[..., tuple[Pool, set[int]]],
) -> None:
    pool, seats = make_roaming(0, 1, config=replace_config(max_attempts=1, max_replacements=0))
    pool.start()
    pool.wait_ready()
    owner = Owner(pool)
    owner.submit(2, "take time")
    owner.submit(3, "take time")
    pool.retire(1)
    owner.submit(4)
    seats.remove(1)
    pool.vacate(1, lost=False)
    pool.vacate(1, lost=False)  # has left already
    owner.wait(3)
    assert owner.found == {2: (4, 1), 3: (9, 2), 4: (16, 1)}
    assert owner.retried == [3]
    assert (pool.replaced, len(pool.workers)) == (0, 1)


def test_work_of_a_lost_node_is_done_elsewhere_and_is_no_incident(
    make_roaming: Callable[..., tuple[Pool, set[int]]],
) -> None:
    pool, seats = make_roaming(0, 1, config=replace_config(max_replacements=0))
    pool.start()
    pool.wait_ready()
    owner = Owner(pool)
    owner.submit(2, "take time")
    owner.submit(3, "take time")
    seats.remove(1)
    pool.vacate(1, lost=True)
    owner.wait(2)
    assert owner.found == {2: (4, 1), 3: (9, 2)}
    assert pool.replaced == 1
    seats.add(1)
    pool.occupy(1)
    pool.wait_ready()
    assert len(pool.workers) == 2


def test_who_will_leave_works_only_if_nobody_else_can(make_roaming: Callable[..., tuple[Pool, set[int]]]) -> None:
    pool, _ = make_roaming(0, 1)
    pool.start()
    pool.wait_ready()
    staying, leaving = (worker.pid for worker in pool.workers)
    pool.retire(1)
    pids = set[int]()
    for number in range(4):
        pool.submit(work_of(number, pids))
    pool._pump.run_until(lambda: pool.unfinished == 0, timeout_s=30, waiting_for="squares")
    assert pids == {staying}
    pool.retire(0)
    for number in range(4):
        pool.submit(work_of(number, pids))
    pool._pump.run_until(lambda: pool.unfinished == 0, timeout_s=30, waiting_for="squares")
    assert pids == {staying, leaving}


def test_a_pool_without_any_node_waits_for_one_but_not_for_ever(
    make_roaming: Callable[..., tuple[Pool, set[int]]],
) -> None:
    """Also where a call may take less time than a node needs to come."""
    pool, seats = make_roaming(0, 1, config=replace_config(node_timeout_s=3))
    pool.start()
    pool.wait_ready()
    owner = Owner(pool)
    seats.clear()
    for index in (0, 1):
        pool.vacate(index, lost=True)
    owner.submit(2)
    with pytest.raises(
        RunError, match=r"^squarer failed during 'placement': the nodes of all its workers are gone, and"
    ):
        pool._pump.run_until(lambda: 2 in owner.found, timeout_s=0.5, waiting_for="a node")
    for index in (0, 1):
        seats.add(index)
        pool.occupy(index)
    owner.wait(1)
    assert owner.found == {2: (4, 1)}


def work_of(number: int, pids: set[int]) -> Work:
    """Notes in `pids` which process has done it."""
    return Work(
        phase=f"square {number}",
        send=lambda worker, attempt: tuple(worker.square.options(num_returns=2).remote(number, attempt, "")),
        on_done=lambda report, data, attempt: pids.add(report["pid"]),
    )


def replace_config(**changes: Any) -> ClusterConfig:
    return CONFIG.model_copy(update=changes)
