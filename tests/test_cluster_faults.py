"""Ray's exceptions, told apart; messages as a user reads them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch.distributed
from ray import exceptions as ray_errors

from cluster.faults import Expired, Fault, RunError, classify, last_lines, role_of


def task_error(cause: Exception) -> BaseException:
    """As `ray.get` raises what a call raised."""
    traceback = (
        'Traceback (most recent call last):\n  File "reward.py", line 3, in score\n    work()\n    '
        f"^^^^^^\n{type(cause).__name__}: {cause}"
    )
    error: BaseException = ray_errors.RayTaskError(
        "score", traceback, cause, proctitle="ray::Reward.score", pid=7, ip="10.0.0.1"
    ).as_instanceof_cause()
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


GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2363, "
STACK = (
    "\nException raised from checkTimeout at ProcessGroupNCCL.cpp:632 (most recent call first):\nframe #0: "
    "ncclRemoteError timed out"
)
BACKEND, NETWORK, STORE = (
    torch.distributed.DistBackendError,
    torch.distributed.DistNetworkError,
    torch.distributed.DistStoreError,
)


@pytest.mark.parametrize(
    "error",
    # of gloo and the store: what the other of two ranks raised when one was killed or stopped (torch 2.13); of NCCL: as
    # its users report it
    [
        RuntimeError(
            GLOO
            + "pair.cc:553] Connection closed by peer [127.0.0.1]:22754. This is typically caused by a remote worker "
            "crashing."
        ),
        RuntimeError(
            GLOO + "pair.cc:537] Read error [127.0.0.1]:32687: Connection reset by peer. This is typically caused by a "
            "remote worker hanging"
        ),
        RuntimeError(GLOO + "unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"),
        RuntimeError(GLOO + "unbound_buffer.cc:129] Timed out waiting 3000ms for send operation to complete"),
        RuntimeError(
            "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 3000 ms\n Original exception: \n"
            + GLOO
            + "pair.cc:553] Connection closed by peer [127.0.0.1]:5026."
        ),
        NETWORK("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"),
        NETWORK("The client socket has timed out after 3000ms while trying to connect to (127.0.0.1, 46399)."),
        STORE("wait timeout after 3000ms, keys: /default_pg/0//155//cpu//0/1"),
        STORE("Timed out after 4 seconds waiting for clients. 1/2 clients joined."),
        BACKEND(
            NCCL
            + "remote process exited or there was a network error, NCCL version 2.28.8\nncclRemoteError: A call failed"
            + STACK
        ),
        BACKEND(
            NCCL + "internal error, NCCL version 2.14.3\nncclInternalError: Internal check failed.\nLast error:\nNet : "
            "Connection closed by remote peer user<50260>"
        ),
        BACKEND(
            "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=BROADCAST) ran for "
            "1800011 milliseconds before timing out." + STACK
        ),
        BACKEND("NCCL communicator was aborted on rank 0."),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[-20:]}",
)
def test_what_a_rank_raises_when_a_peer_is_gone_is_not_its_own_error(error: Exception) -> None:
    assert classify(task_error(error)) is Fault.PEER_LOST


@pytest.mark.parametrize(
    "error",
    [
        ValueError("socket: connection reset by peer"),
        RuntimeError("the reward server timed out"),
        RuntimeError("CUDA out of memory in gloo/transport"),
        ConnectionResetError("[Errno 104] Connection reset by peer"),
        TimeoutError("timed out"),
        RuntimeError(
            "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= "
            "op.nbytes. 8 vs 4."
        ),
        NETWORK(
            "The server socket has failed to listen on any local network address. port: 51615, useIpv6: false, code: "
            "-98, name: EADDRINUSE"
        ),
        BACKEND(
            NCCL
            + "invalid usage, NCCL version 2.17.1\nncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both "
            "on CUDA device 1000" + STACK
        ),
        BACKEND(
            NCCL
            + "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure "
            "'out of memory'" + STACK
        ),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[-20:]}",
)
def test_what_only_sounds_like_a_lost_peer_is_the_codes_own_error(error: Exception) -> None:
    assert classify(task_error(error)) is Fault.USER_ERROR
    assert not Fault.USER_ERROR.of_a_process


def test_an_error_in_the_constructor_is_the_codes_own() -> None:
    cause = ray_errors.RayTaskError(
        "__init__", "Traceback (most recent call last):\nValueError: no model", ValueError("no model")
    )
    assert classify(ray_errors.ActorDiedError(cause)) is Fault.USER_ERROR


def test_a_run_error_reads_as_one_sentence_after_the_other() -> None:
    error = RunError(
        who="rollout[1]",
        phase="generate chunk 17",
        cause="no answer within 5 s",
        remedy="Raise cluster.call_timeout_s.",
    )
    assert (
        str(error)
        == "rollout[1] failed during 'generate chunk 17': no answer within 5 s. Raise cluster.call_timeout_s."
    )


@pytest.mark.parametrize("error", [RunError("a", "b", "c", "d", Fault.INPUT_LOST), Expired("a", "b", 2.5)])
def test_run_errors_survive_pickling(error: RunError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.who, copy.phase, copy.fault) == (str(error), "a", "b", error.fault)


def test_last_lines_are_the_workers_own_without_colours_and_carets() -> None:
    assert (
        last_lines(task_error(ValueError("bad")), 3)
        == '  File "reward.py", line 3, in score\n    work()\nValueError: bad'
    )
    assert last_lines(ray_errors.RayError()) == "RayError"


def test_what_ray_lists_of_a_dead_actor_is_left_out() -> None:
    text = (
        "The actor died unexpectedly.\n\tclass_name: Learner\n\tactor_id: 7b27\n\tpid: 27315\n\tnamespace: ef14\n\tip: "
        "192.0.2.2\nIts process has died."
    )
    assert last_lines(RuntimeError(text)) == "The actor died unexpectedly.\nIts process has died."


def test_the_role_of_a_name() -> None:
    assert [role_of(who) for who in ("policy[1]", "driver")] == ["policy", "driver"]


def test_a_failure_names_the_logs_of_its_process_and_of_the_run(tmp_path: Path) -> None:
    for name in ("policy-1.log", "driver.log"):
        (tmp_path / name).touch()
    error = RunError("policy[1]", "learning", "it was killed", "Ask for more memory.")
    error.find_logs(tmp_path)
    assert str(error).endswith(f"Ask for more memory. Logs: {tmp_path}/policy-1.log, {tmp_path}/driver.log")
    for who in ("driver", "policy[2]"):  # one has no log of its own, one has written none
        error = RunError(who, "learning", "it was killed")
        error.find_logs(tmp_path)
        assert error.logs == (tmp_path / "driver.log",)
