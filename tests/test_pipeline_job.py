"""Jobs of a head with token authentication, by `raylign submit` and by `ray job submit`: a good job ends well, a
failing job fails, a stopped one has committed, and the same submitted again goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.recipe import load
from pipeline.folder.run_folder import read_history
from ports import free_port

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
TINY = [
    "--steps",
    "2",
    "--model.layers",
    "1",
    "--model.width",
    "16",
    "--finetune.epochs",
    "1",
    "--batch.prompts",
    "8",
    "--batch.epochs",
    "1",
    "--rollout.slots",
    "8",
    "--cluster.cpus-per-bundle",
    "1",
    "--evaluation.prompts",
    "4",
]


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A head of its own process group, ports and folder, that only the holder of the token may talk to; yields a
    client's environment.
    """
    port, dashboard, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="rj-", dir="/tmp")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_JOB_STOP_WAIT_TIME_S": "300"}  # as in our cluster files: Ray kills a job after 3 s otherwise
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",
        f"--temp-dir={folder}",
        "--num-cpus=4",
        "--node-ip-address=127.0.0.1",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    with (Path(folder) / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _await(dashboard, process, Path(folder) / "head.log")
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, hence this head and its workers only
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _await(port: int, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 300) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise AssertionError(f"no dashboard within {timeout_s} s:\n{log.read_text()[-2000:]}")


def submit(
    environment: dict[str, str], tree: Path, *arguments: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return job(
        environment, "submit", *options, "--working-dir", str(tree), "--", sys.executable, "-m", "pipeline", *arguments
    )


def job(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ray takes jobs some time after its dashboard listens, and until then says so."""
    until = time.monotonic() + 300
    while True:
        done = subprocess.run(
            [str(RAY), "job", *arguments], env=environment, cwd="/", capture_output=True, text=True, timeout=600
        )
        if "No available agent to submit job" not in done.stdout + done.stderr or time.monotonic() > until:
            return done
        time.sleep(1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout ships: the three packages, another copy than the one under test, so that it must really be the
    shipped one.
    """
    tree = tmp_path_factory.mktemp("tree")
    for floor in ("cluster", "actors", "pipeline"):
        shutil.copytree(ROOT / floor, tree / floor, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def raylign_submit(
    environment: dict[str, str], tree: Path, *arguments: str, until: str = ""
) -> subprocess.CompletedProcess[str]:
    """until: a pattern of its output at which it is told to end."""
    address = ["--address", environment["RAY_ADDRESS"]]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "submit", *arguments, *address],
        env=environment | {"RAY_ADDRESS": "http://127.0.0.1:1"},  # which Ray would prefer
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    if until:
        assert process.stdout is not None
        for line in process.stdout:
            seen += line
            if re.search(until, line):
                process.terminate()
                break
    out, error = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, seen + out, error)


@pytest.mark.slow
def test_a_failing_job_fails(head: dict[str, str], tree: Path, tmp_path: Path) -> None:
    bad = ("walks", *TINY, "--reward.function", "nowhere:nothing", "--run-dir", str(tmp_path / "run"))
    out = submit(head, tree, "train", *bad)
    assert out.returncode == 1
    assert "reward.function" in out.stdout
    relative = submit(head, tree, "train", "walks", *TINY)
    assert relative.returncode == 1
    assert "--run-dir: must be an absolute path in a Ray job" in relative.stdout

    out = raylign_submit(head, tree, *bad, "--python", sys.executable)
    assert (out.returncode, out.stderr) == (2, ""), "the exit code of its driver"
    assert "reward.function" in out.stdout
    assert f"raylign submit: job {out.stdout.split('raylign submit: job ')[1].split(' ')[0]}: failed" in out.stdout

    nobody = {key: value for key, value in head.items() if not key.startswith("RAY_AUTH")}
    out = raylign_submit(nobody, tree, *bad)
    assert (out.returncode, out.stdout) == (1, "")
    assert "asks for a token, and this one is none or a wrong one" in out.stderr
    assert "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in out.stderr


@pytest.mark.slow
def test_a_stopped_job_has_committed_and_the_same_submitted_again_goes_on(
    head: dict[str, str], tree: Path, tmp_path: Path
) -> None:
    # a file the installed copy lacks: the handshake compares it on every worker
    (tree / "pipeline" / "shipped.py").write_text("")
    run_dir = tmp_path / "run"
    shape = ("--commit-every", "3", "--rollout.workers", "2", "--cluster.cpus-per-bundle", "0")
    many = ("walks", *TINY, *shape, "--until", "train", "--run-dir", str(run_dir), "--python", sys.executable)
    begun = raylign_submit(head, tree, *many, "--no-wait", "--steps", "2000")
    assert (begun.returncode, begun.stderr) == (0, "")
    assert (
        f"raylign submit: follow it: raylign submit {run_dir} --address {head['RAY_ADDRESS']} --attach" in begun.stdout
    )
    other = raylign_submit(head, tree, *many, "--steps", "2001")
    assert other.returncode == 2
    assert "is at work with other settings; stop it first" in other.stderr
    followed = raylign_submit(head, tree, str(run_dir), "--attach", until=r"reinforce \d+/2000")
    assert followed.returncode == 143
    assert "goes on. To follow it again: raylign submit" in followed.stdout
    stopped = raylign_submit(head, tree, str(run_dir), "--stop")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert "To go on, submit the same again" in stopped.stdout
    assert "stopped by SIGTERM" in (run_dir / "log" / "driver.log").read_text()
    newest = newest_commit(run_dir)
    assert 0 < newest < 2000

    again = raylign_submit(head, tree, *many, "--steps", "2000", until=r"reinforce \d+/2000")
    assert again.returncode == 143
    assert f"resumed from commit step={newest:08d}-epoch=0001" in again.stdout
    assert raylign_submit(head, tree, str(run_dir), "--stop").returncode == 0
    last = newest_commit(run_dir) + 2
    out = submit(head, tree, "resume", str(run_dir), "--steps", str(last), "--allow-change", "steps")
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-2000:]
    assert f"reinforce {last}/{last}" in out.stdout and "succeeded" in out.stdout
    assert (run_dir / "policy" / "model.safetensors").is_file()
    cpus = [epoch.config["cluster"]["cpus_per_bundle"] for epoch in read_history(run_dir)]
    assert cpus == [2, 2, 2], "of the head's four CPUs, whatever the machine has that the driver runs on"
    assert load(run_dir / "config.toml").cluster.cpus_per_bundle == 2


def newest_commit(run_dir: Path) -> int:
    return max(
        int(folder.name[5:13]) for folder in (run_dir / "checkpoints").iterdir() if (folder / "commit.json").is_file()
    )


def await_words(file: Path, words: str, timeout_s: float = 300) -> None:
    until = time.monotonic() + timeout_s
    while not (file.is_file() and words in file.read_text()):
        assert time.monotonic() < until, f"no {words!r} in {file} within {timeout_s} s"
        time.sleep(0.1)
