"""Ray's exceptions, told apart; messages as a user reads them."""

from __future__ import annotations

import pickle

import pytest
from ray import exceptions as ray_errors

from cluster.faults import Expired, Fault, RunError, classify, last_lines


def task_error(cause: Exception) -> BaseException:
    """As `ray.get` raises what a call raised."""
    traceback = f'Traceback (most recent call last):\n  File "reward.py", line 3, in score\n    work()\n    ^^^^^^\n{type(cause).__name__}: {cause}'
    error: BaseException = ray_errors.RayTaskError("score", traceback, cause, proctitle="ray::Reward.score", pid=7, ip="10.0.0.1").as_instanceof_cause()
    return error


def lost(kind: type[ray_errors.ObjectLostError]) -> ray_errors.ObjectLostError:
    return kind("00" * 28, b"", "")


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ray_errors.ActorDiedError(), Fault.WORKER_LOST),
        (ray_errors.ActorUnavailableError("the actor is unavailable", b"1" * 16), Fault.WORKER_LOST),
        (ray_errors.NodeDiedError("node gone"), Fault.WORKER_LOST),
        (ray_errors.WorkerCrashedError(), Fault.WORKER_LOST),
        (ray_errors.OutOfMemoryError("killed"), Fault.WORKER_LOST),
        (lost(ray_errors.ObjectLostError), Fault.INPUT_LOST),
        (task_error(lost(ray_errors.OwnerDiedError)), Fault.INPUT_LOST),
        (task_error(lost(ray_errors.ObjectReconstructionFailedError)), Fault.INPUT_LOST),
        (task_error(ray_errors.ActorDiedError()), Fault.INPUT_LOST),
        (task_error(ValueError("bad")), Fault.USER_ERROR),
        (task_error(KeyError("bad")), Fault.USER_ERROR),
        (ray_errors.GetTimeoutError("slow"), Fault.EXPIRED),
        (Expired("rollout[0]", "generate", 3.0), Fault.EXPIRED),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else type(value).__name__,
)
def test_classify(error: BaseException, fault: Fault) -> None:
    assert classify(error) is fault


def test_an_error_in_the_constructor_is_the_codes_own() -> None:
    cause = ray_errors.RayTaskError("__init__", "Traceback (most recent call last):\nValueError: no model", ValueError("no model"))
    assert classify(ray_errors.ActorDiedError(cause)) is Fault.USER_ERROR


def test_a_run_error_reads_as_one_sentence_after_the_other() -> None:
    error = RunError(who="rollout[1]", phase="generate chunk 17", cause="no answer within 5 s", remedy="Raise cluster.call_timeout_s.")
    assert str(error) == "rollout[1] failed during 'generate chunk 17': no answer within 5 s. Raise cluster.call_timeout_s."


@pytest.mark.parametrize("error", [RunError("a", "b", "c", "d", Fault.INPUT_LOST), Expired("a", "b", 2.5)])
def test_run_errors_survive_pickling(error: RunError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.who, copy.phase, copy.fault) == (str(error), "a", "b", error.fault)


def test_last_lines_are_the_workers_own_without_colours_and_carets() -> None:
    assert last_lines(task_error(ValueError("bad")), 3) == '  File "reward.py", line 3, in score\n    work()\nValueError: bad'
    assert last_lines(ray_errors.RayError()) == "RayError"
