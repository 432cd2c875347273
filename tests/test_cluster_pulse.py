"""Signs of life: who is stopped is noticed long before its call's deadline, who only works hard is not."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import Fault, RunError
from cluster.gang import Gang
from cluster.halving import DivisibleWork, submit_divisible
from cluster.placement import RoleDemand, plan_placement
from cluster.pool import Pool
from cluster.pulse import silent_from
from cluster.session import Session
from cluster.work import Work

CONFIG = ClusterConfig(pulse_timeout_s=3, peer_timeout_s=4)  # and half an hour for a call


class Worker:
    """Works as long as it is told; hard: without ever waiting."""

    def connect(self, address: str, port: int) -> None:
        pass

    def hang(self, really: bool) -> int:
        if really:
            silent_from(time.monotonic())
            time.sleep(300)
        return os.getpid()

    def work(self, seconds: float, hard: bool = False) -> int:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not hard:
                time.sleep(0.05)
        return os.getpid()


@pytest.fixture
def spawned(ray_session: Session) -> Any:
    session = Session(CONFIG, ray_session.log_dir, packages=("cluster",))
    session._is_local = True
    placed = session.place(
        plan_placement([RoleDemand("worker", 2, 0)], share_devices=False, cpus_per_bundle=1, local_cpus=2)
    )
    yield lambda index: placed.spawn(Worker, "worker", index)
    placed.remove()


@pytest.mark.slow
def test_a_worker_that_knows_that_it_hangs_gives_no_sign_of_life_and_the_sample_is_found(
    ray_session: Session, spawned: Any
) -> None:
    """As the reward actor does, when the function cannot be interrupted.

    The others of the chunk are done by another worker.
    """
    pump, found = Pump(), list[tuple[int, dict[int, str]]]()
    pool = Pool(
        "worker",
        spawned,
        1,
        pump,
        CONFIG.model_copy(update={"max_attempts": 1, "max_replacements": 1}),
        ray_session.fingerprint,
    )
    pool.start()
    submit_divisible(
        pool,
        DivisibleWork(
            phase="work",
            items=[4, 5],
            group_of=lambda item: item,
            send=lambda worker, attempt, without: (worker.hang.remote(5 not in without),),
            on_done=lambda pid, data, lost: found.append((pid, dict(lost))),
        ),
    )
    pump.run_until(lambda: bool(found), timeout_s=240, waiting_for="the work")
    assert found == [(pool.workers[0].pid, {5: "hung its worker"})]
    assert pool.replaced == 3, "over both, and twice over the one"
    pool.close()


@pytest.mark.slow
def test_a_stopped_worker_of_a_pool_is_replaced_and_its_work_done(ray_session: Session, spawned: Any) -> None:
    pump, pids = Pump(), []
    pool = Pool("worker", spawned, 1, pump, CONFIG, ray_session.fingerprint)
    pool.start()
    pool.wait_ready()
    stopped = pool.workers[0].pid
    pool.submit(
        Work(
            phase="work",
            send=lambda worker, attempt: (worker.work.remote(300.0 if attempt == 1 else 0.1),),
            on_done=lambda pid, data, attempt: pids.append((pid, attempt)),
        )
    )
    pump.later(0.5, lambda: os.kill(stopped, signal.SIGSTOP))
    pump.run_until(lambda: bool(pids), timeout_s=240, waiting_for="the work")
    pool.close()
    assert pids[0][0] != stopped
    assert pids[0][1] == 2
    assert pool.replaced == 1


@pytest.mark.slow
def test_a_stopped_gang_of_one_has_no_peer_to_miss_it_and_is_noticed_all_the_same(
    ray_session: Session, spawned: Any
) -> None:
    pump = Pump()
    gang = Gang("worker", spawned, 1, pump, CONFIG, ray_session.fingerprint)
    gang.start()
    gang.connect()
    # longer than pulse_timeout_s and without a pause
    [pid] = gang.call("work", lambda rank, _: rank.work.remote(4.0, True))
    os.kill(pid, signal.SIGSTOP)  # while idle: noticed once it is given something to do
    began = time.monotonic()
    with pytest.raises(RunError) as caught:
        gang.call("work", lambda rank, _: rank.work.remote(0.1))
    assert (caught.value.who, caught.value.fault) == ("worker[0]", Fault.EXPIRED)
    assert time.monotonic() - began < 240
    gang.restart()
    gang.connect()
    assert gang.call("work", lambda rank, _: rank.work.remote(0.1)) != [pid]
    gang.close()


@pytest.mark.slow
def test_a_rank_that_lives_but_does_not_answer_as_its_peers_do_is_named(ray_session: Session, spawned: Any) -> None:
    """As when it hangs at a disk, where no peer waits for it."""
    pump = Pump()
    gang = Gang("worker", spawned, 2, pump, CONFIG, ray_session.fingerprint)
    gang.start()
    gang.connect()
    began = time.monotonic()
    with pytest.raises(RunError, match="no answer within 4 s") as caught:
        gang.call("commit", lambda rank, number: rank.work.remote(300.0 if number else 0.1))
    assert (caught.value.who, caught.value.phase, caught.value.fault) == ("worker[1]", "commit", Fault.EXPIRED)
    assert time.monotonic() - began < 240
    gang.close()
