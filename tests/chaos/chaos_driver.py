"""The plug is pulled, twenty times: kill -9 of the driver at random moments, resume, the same final hash.

Not part of `make test`: `make chaos` runs it. The moments are seeded. A run dies five times: once while it starts or
fine-tunes, then a random number of steps and a fraction of a second after it was taken up again; then it may end, and
must have ended as the run that nothing happened to.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from run_helpers import ROOT, assert_same, command, environment, recipe

LIVES, DEATHS, STEPS = 4, 5, 60


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path, for Ray's sockets lie below it, too; a driver that is killed leaves Ray's folder behind."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    surroundings = environment() | {"RAY_TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that nothing happened to."""
    (place / "recipe.toml").write_text(tomli_w.dumps(recipe(steps=STEPS, commit_every=3).model_dump(mode="json")))
    process = start(place, "run", str(place / "recipe.toml"), "--run-dir", str(place / "whole"))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return place / "whole"


def metrics_text(run_dir: Path) -> str:
    path = run_dir / "metrics.jsonl"
    return path.read_text() if path.is_file() else ""


def kill_after(process: subprocess.Popen[str], run_dir: Path, steps: int, seconds: float) -> None:
    """kill -9 so many seconds after so many steps of the run."""
    deadline = time.monotonic() + 200
    while steps and f'"step": {steps - 1},' not in metrics_text(run_dir):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {steps} was not reached"
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.communicate(timeout=60)
    commits = [folder.name for folder in sorted((run_dir / "checkpoints").glob("*"))]
    print(
        f"\n  kill -9 with {metrics_text(run_dir).count(chr(10))} steps done; commits: {', '.join(commits) or 'none'}",
        end="",
        flush=True,
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("life", range(LIVES))
def test_kill_9_of_the_driver_and_resume(place: Path, whole: Path, life: int) -> None:
    dice, run_dir = random.Random(life), place / f"life-{life}"
    process = start(place, "run", str(place / "recipe.toml"), "--run-dir", str(run_dir))
    while not (run_dir / "history.json").is_file():
        time.sleep(0.05)
    kill_after(process, run_dir, 0, dice.uniform(0, 15))
    for death in range(1, DEATHS):
        again = start(place, "resume", str(run_dir))
        kill_after(again, run_dir, STEPS * (death - 1) // DEATHS + dice.randint(4, 11), dice.uniform(0, 0.4))
    last = start(place, "resume", str(run_dir))
    out, err = last.communicate(timeout=500)
    assert (last.returncode, err) == (0, "")
    assert_same(run_dir, whole)
    print(f"\n  {out.splitlines()[0]}; the same hash at the end", flush=True)
    shutil.rmtree(run_dir)
