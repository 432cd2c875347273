"""Ray's worker processes, forked from one process that has imported the libraries already.

Ray starts Python twice for a worker, and both import Ray; then the worker imports torch, transformers and DeepSpeed:
up to five seconds of computing before anything is tested, and the suite starts about a thousand workers. Here Ray calls
a script that asks a server to fork itself. The child goes on as Ray's own worker script, with the arguments, the
environment, the folder and the process group that Ray gave. No module of the program is imported before the fork.

Runs by the command line start their workers as Ray does, but for those that ask for this by `python forked_workers.py
run ARGUMENTS`; so do nodes, but for those of `python forked_workers.py ray start ...`. Left out: a seed of its own for
each worker's string hashes; two runs by the command line differ in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = "RAYLIGN_TESTS_FORKED_WORKERS"  # the environment variable that names the folder of the servers' sockets
_LIBRARIES = (
    "ray._private.workers.default_worker",
    "pyarrow.parquet",
    "deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2",
)
_NO_JOB = "ffffffff"  # of a worker that Ray starts in advance; the server of Ray Client has none


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """A local Ray that is started inside has its workers forked.

    By the name of the script that sets up workers, a private constant of Ray 2.60.
    """
    from unittest import mock

    import ray._private.ray_constants as names

    with (
        tempfile.TemporaryDirectory(prefix="fork-", dir="/tmp") as folder,  # short, as names of sockets must be
        mock.patch.dict(os.environ, {FOLDER: folder, "RAY_prestart_worker_first_driver": "0"}),
        mock.patch.object(names, "SETUP_WORKER_FILENAME", __file__),
    ):
        yield


def ask(arguments: list[str]) -> None:
    """What Ray calls: have a worker forked with this process's environment, folder and output."""
    job, prefix = os.environ.get("RAY_JOB_ID", _NO_JOB), "--serialized-runtime-env-context="
    context = json.loads(next((each.removeprefix(prefix) for each in arguments if each.startswith(prefix)), "{}"))
    asks_for = {name for name, value in context.items() if value} - {"env_vars"}
    if job == _NO_JOB or asks_for - {"py_executable"} or context.get("py_executable", sys.executable) != sys.executable:
        ray = importlib.util.find_spec("ray")
        assert ray is not None and ray.origin is not None
        setup = Path(ray.origin).parent / "_private" / "workers" / "setup_worker.py"
        os.execv(sys.executable, [sys.executable, str(setup), *arguments])
    # Ray reads these two when it is imported, and never again: a server for each.
    address = Path(os.environ[FOLDER]) / f"{os.environ['RAY_RAYLET_PID']}-{job}"
    with address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        served = connected(address)
    request = {
        "arguments": [each for each in arguments if not each.startswith(("--language=", prefix))],
        "environment": os.environ | context.get("env_vars", {}),
        "folder": os.getcwd(),
    }
    with served as connection:
        socket.send_fds(connection, [b" "], [1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        assert connection.recv(16) == b"forked"


def connected(address: Path) -> socket.socket:
    """A connection to the server there, which is started unless it lives; of a killed one the socket's file is left."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(address))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            address.unlink(missing_ok=True)
            start_server(address)
        else:
            return connection


def start_server(address: Path) -> None:
    """Returns when it can be connected to."""
    # a process with one thread can be forked
    libraries = {
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "DS_ACCELERATOR": "cpu",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", str(address)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=os.environ | libraries,
        start_new_session=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the server of forked workers has not started"


def serve(address: Path) -> None:
    """Fork a worker for each request, until Ray or the folder of the socket is gone."""
    import gc
    import importlib

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's logger keeps what it finds, as in a learner
        for library in _LIBRARIES:
            importlib.import_module(library)
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads cannot be forked"
    gc.freeze()  # else the first collection in a child would copy all of it
    signal.signal(signal.SIGCHLD, bury)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        print("ready", flush=True)
        os.dup2(2, 1)
        while address.exists() and Path("/proc", os.environ["RAY_RAYLET_PID"]).exists():
            if not select.select([listener], [], [], 0.5)[0]:
                continue
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                become_worker(connection)
            connection.close()
    shutil.rmtree(address.parent, ignore_errors=True)  # of a run that was killed


def bury(*_: object) -> None:
    """Whoever asks whether a worker lives must not find one that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def become_worker(connection: socket.socket) -> None:
    """Go on as the worker that a request describes; does not return."""
    import random
    import traceback

    import numpy as np
    from ray._private.authentication_test_utils import reset_auth_token_state

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    request = json.loads(data)
    os.environ.clear()
    os.environ.update(request["environment"])
    reset_auth_token_state()  # Ray read the environment when it was imported
    os.chdir(request["folder"])
    os.setpgid(0, 0)
    random.seed()
    np.random.seed()
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    connection.sendall(b"forked")
    connection.close()
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (as Python prints it at the end of a process)
        traceback.print_exc()
    os._exit(code)


def run(arguments: list[str]) -> None:
    """`python -m pipeline ARGUMENTS`."""
    sys.argv, sys.path[0] = ["raylign", *arguments], os.getcwd()
    with forked_workers():
        runpy.run_module("pipeline", run_name="__main__")


def ray_command(arguments: list[str]) -> None:
    """`ray ARGUMENTS`, such as the start of a node whose workers are forked."""
    from ray.scripts.scripts import main

    sys.argv = ["ray", *arguments]
    with forked_workers():
        main()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", address]:
            serve(Path(address))
        case ["run", *arguments]:
            run(arguments)
        case ["ray", *arguments]:
            ray_command(arguments)
        case arguments:
            ask(arguments)
