"""The pump, on real Ray calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from cluster.events import Pump
from cluster.faults import Expired, RunError
from cluster.session import Session

pytestmark = pytest.mark.usefixtures("ray_session")


class Sleeper:
    def sleep(self, seconds: float, value: Any = None) -> Any:
        time.sleep(seconds)
        return value

    def fail(self) -> None:
        raise ValueError("on purpose")


@pytest.fixture(scope="module")
def actor(ray_session: Session) -> Any:
    return ray.remote(Sleeper).options(num_cpus=0).remote()


@pytest.fixture
def sleeper(actor: Any) -> Any:
    """Awake: what the test before left it to do is done."""
    ray.get(actor.sleep.remote(0), timeout=300)
    return actor


def watch(
    pump: Pump, ref: Any, done: Callable[[Any], None], failed: Callable[[BaseException], None], timeout_s: float = 120.0
) -> None:
    pump.watch(ref, who="sleeper[0]", phase="sleep", timeout_s=timeout_s, on_done=done, on_error=failed)


def unexpected(value: Any) -> None:
    raise AssertionError(f"not to be called, but was with {value!r}")


def test_values_and_errors_are_handed_to_whoever_asked(sleeper: Any) -> None:
    pump = Pump()
    values: list[str] = []
    errors: list[BaseException] = []
    watch(pump, sleeper.sleep.remote(0, "one"), values.append, unexpected)
    watch(pump, sleeper.fail.remote(), unexpected, errors.append)
    pump.run_until(lambda: bool(values and errors), timeout_s=120, waiting_for="both")
    assert values == ["one"]
    assert isinstance(errors[0], ValueError)


def test_a_passed_deadline_is_an_error_with_names_and_the_late_reply_is_ignored(sleeper: Any) -> None:
    pump = Pump()
    errors: list[BaseException] = []
    later: list[str] = []
    slow = sleeper.sleep.remote(4)
    watch(pump, slow, unexpected, errors.append, timeout_s=0.2)
    pump.run_until(lambda: bool(errors), timeout_s=120, waiting_for="the deadline")
    assert ray.wait([slow], timeout=0)[0] == [], "before the answer came"
    assert isinstance(errors[0], Expired)
    assert str(errors[0]) == "sleeper[0] failed during 'sleep': no answer within 0.2 s."
    watch(pump, sleeper.sleep.remote(0, "next"), later.append, unexpected)  # answered after the late reply
    pump.run_until(lambda: bool(later), timeout_s=120, waiting_for="the next call")


def test_an_answer_that_arrived_while_the_driver_was_busy_counts(sleeper: Any) -> None:
    pump = Pump()
    values: list[Any] = []
    watch(pump, sleeper.sleep.remote(0, "in time"), values.append, unexpected, timeout_s=1.5)
    watch(pump, sleeper.sleep.remote(0, "too"), values.append, unexpected, timeout_s=1.5)
    time.sleep(3)
    pump.run_until(lambda: len(values) == 2, timeout_s=120, waiting_for="the calls")


def test_a_timer_is_something_to_wait_for_until_it_is_cancelled() -> None:
    pump, rung = Pump(), []
    pump.later(0.1, lambda: rung.append("later"))
    pump.later(0.0, lambda: rung.append("sooner"))
    pump.run_until(lambda: len(rung) == 2, timeout_s=5, waiting_for="the bell")
    assert rung == ["sooner", "later"]
    pump.cancel(pump.later(0.0, lambda: rung.append("never")))
    with pytest.raises(RunError, match="nothing is running that it could wait for"):
        pump.run_until(lambda: len(rung) == 3, timeout_s=5, waiting_for="the bell")


def test_a_forgotten_call_is_not_heard(sleeper: Any) -> None:
    pump = Pump()
    values: list[Any] = []
    forgotten = sleeper.sleep.remote(0, "forgotten")
    watch(pump, forgotten, unexpected, unexpected)
    watch(pump, sleeper.sleep.remote(0.1, "kept"), values.append, unexpected)
    pump.forget(forgotten)
    pump.run_until(lambda: bool(values), timeout_s=120, waiting_for="the kept call")


def test_waiting_for_nothing_is_an_error_rather_than_a_hang() -> None:
    with pytest.raises(RunError, match=r"driver failed during 'a step': nothing is running"):
        Pump().run_until(lambda: False, timeout_s=120, waiting_for="a step")


def test_a_condition_that_holds_waits_for_nothing() -> None:
    Pump().run_until(lambda: True, timeout_s=0, waiting_for="nothing")


def test_a_wait_that_takes_too_long_names_what_is_still_running(sleeper: Any) -> None:
    pump = Pump()
    watch(pump, sleeper.sleep.remote(3), unexpected, unexpected)
    with pytest.raises(RunError) as caught:
        pump.run_until(lambda: False, timeout_s=0.2, waiting_for="rollouts of step 3")
    assert (
        str(caught.value)
        == "driver failed during 'rollouts of step 3': no answer within 0.2 s, still waiting for sleeper[0] ('sleep')."
    )


def test_long_work_of_many_calls_may_take_its_time_while_answers_keep_coming(sleeper: Any) -> None:
    pump = Pump()
    answers: list[str] = []
    for _ in range(5):  # one after the other in the one actor: 7.5 s in all, more than the patience
        watch(pump, sleeper.sleep.remote(1.5), answers.append, unexpected)
    pump.run_until(lambda: len(answers) == 5, timeout_s=6, waiting_for="five naps")


def test_ticks_are_served_while_waiting(sleeper: Any) -> None:
    pump = Pump()
    ticks: list[float] = []
    values: list[str] = []
    began = time.monotonic()
    pump.add_tick(lambda: ticks.append(time.monotonic()), every_s=0.1)
    watch(pump, sleeper.sleep.remote(2, "done"), values.append, unexpected)
    pump.run_until(lambda: bool(values), timeout_s=120, waiting_for="the call")
    assert len(ticks) >= 4
    # of all of them: one may be called late, and the next in time
    assert len(ticks) <= (time.monotonic() - began) / 0.1


def test_what_a_callback_raises_comes_out_and_the_others_stay_watched(sleeper: Any) -> None:
    pump = Pump()
    values: list[Any] = []
    watch(pump, sleeper.sleep.remote(0, "first"), unexpected, unexpected)
    watch(pump, sleeper.sleep.remote(0.5, "second"), values.append, unexpected)
    with pytest.raises(AssertionError, match=r"first"):
        pump.run_until(lambda: bool(values), timeout_s=120, waiting_for="both")
    pump.run_until(lambda: bool(values), timeout_s=120, waiting_for="the second")
