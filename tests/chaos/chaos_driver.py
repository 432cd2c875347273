"""The plug is pulled, twenty times: kill -9 of the driver at a random moment of the run's life, resume, the same final hash.

Not part of `make test`: `make chaos` runs it, in about fifteen minutes on two cores. The moments are seeded; each run is killed once, from its
first second to its last, and then resumed through the real entry point.
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

KILLS = 20
SEED = 20


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path, for Ray's sockets lie below it, too; a driver that is killed leaves Ray's folder behind."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    surroundings = environment() | {"RAY_TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, float]:
    """The run that nothing happened to, and how long it took."""
    settings = recipe(steps=12, commit_every=2).model_dump(mode="json")
    (place / "recipe.toml").write_text(tomli_w.dumps(settings))
    began = time.monotonic()
    process = start(place, "train", str(place / "recipe.toml"), "--run-dir", str(place / "whole"))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return place / "whole", time.monotonic() - began


DICE = random.Random(SEED)
MOMENTS = sorted(DICE.random() for _ in range(KILLS))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", MOMENTS, ids=[f"{moment:.2f}" for moment in MOMENTS])
def test_kill_9_of_the_driver_and_resume(place: Path, whole: tuple[Path, float], moment: float) -> None:
    undisturbed, seconds = whole
    run_dir = place / f"run-{moment:.4f}"
    process = start(place, "train", str(place / "recipe.toml"), "--run-dir", str(run_dir))
    time.sleep(moment * seconds)
    process.kill()
    process.communicate(timeout=60)
    killed_at = len((run_dir / "metrics.jsonl").read_text().splitlines()) if (run_dir / "metrics.jsonl").is_file() else 0
    if not (run_dir / "history.json").is_file():
        print(f"\nkilled after {moment * seconds:.1f} s, before there was a run")
        return
    again = start(place, "resume", str(run_dir))
    out, err = again.communicate(timeout=500)
    assert again.returncode == 0, err
    assert err == ""
    assert_same(run_dir, undisturbed)
    print(f"\nkilled after {moment * seconds:.1f} s with {killed_at} steps done; {out.splitlines()[0]}; same hash")
    shutil.rmtree(run_dir)
