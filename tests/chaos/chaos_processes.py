"""Every kind of process dies in one run, some of them twice, learners in the middle of a call: the run ends, the ledger
balances, the same final hash.

Not part of `make test`: `make chaos` runs it. Prints how long the run took to recover from each.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from run_helpers import ROOT, assert_same, both, command, environment, final_commit, learning, pid_of, recipe

VICTIMS = ("rollout[0]", "reward[0]", "reference[0]", "critic[1]", "policy[0]", "rollout[1]", "policy[1]", "critic[0]")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def settings(**changes: Any) -> str:
    """Two ranks a learner, two rollout workers, steps long enough to be hit in the middle."""
    config = recipe(
        steps=60, commit_every=3, **both(learning_rate=1e-3, ranks=2, zero_stage=2, micro_batch_size=4), **changes
    )
    config = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"workers": 2}),
            "cluster": config.cluster.model_copy(update={"peer_timeout_s": 10, "max_rebuilds": 4}),
        }
    )
    return tomli_w.dumps(config.model_dump(mode="json"))


def start(place: Path, run_dir: Path) -> subprocess.Popen[str]:
    surroundings = environment() | {"RAY_TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    arguments = command("run", str(place / "recipe.toml"), "--run-dir", str(run_dir))
    return subprocess.Popen(
        arguments, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    (place / "recipe.toml").write_text(settings())
    process = start(place, place / "whole")
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return place / "whole"


def steps_done(run_dir: Path) -> int:
    return len((run_dir / "metrics.jsonl").read_text().splitlines()) if (run_dir / "metrics.jsonl").is_file() else 0


def await_step(run_dir: Path, step: int, process: subprocess.Popen[str], timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while steps_done(run_dir) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


def disturb(
    place: Path, run_dir: Path, number: signal.Signals, victims: tuple[str, ...]
) -> tuple[str, dict[str, float]]:
    """Signal each victim a random moment after some step; seconds until the run had gone a step further than where the
    signal met it.
    """
    moments, recovered = random.Random(7), {}
    process = start(place, run_dir)
    for i, who in enumerate(victims):
        await_step(run_dir, 3 + 6 * i, process)
        time.sleep(moments.random() * 0.2)
        met, began = steps_done(run_dir), time.monotonic()
        os.kill(pid_of(run_dir, who), number)
        time.sleep(0.3)
        await_step(run_dir, met + 2, process)
        recovered[who] = time.monotonic() - began
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert err == ""
    return out, recovered


def report(title: str, recovered: dict[str, float], out: str) -> None:
    print(f"\n{title}")
    for who, seconds in recovered.items():
        print(f"  {who:14} two steps further after {seconds:5.1f} s")
    print("\n".join("  " + line for line in out.splitlines() if "recovered in" in line))


@pytest.mark.timeout(900)
def test_kill_9_of_every_kind_of_process_in_one_run(place: Path, whole: Path) -> None:
    out, recovered = disturb(place, place / "killed", signal.SIGKILL, VICTIMS)
    report("kill -9", recovered, out)
    ledger = final_commit(place / "killed").state.ledger
    last = learning(place / "killed")[-1]
    assert last["ledger/issued"] == last["ledger/trained"] == 60 * 16
    assert_same(place / "killed", whole, reissued=ledger.reissued > 0, metrics=False)
    assert re.search(r"policy\[\d\] failed during", out)
    assert re.search(r"critic\[\d\] failed during", out)


@pytest.mark.timeout(900)
def test_sigstop_of_learner_ranks(place: Path, whole: Path) -> None:
    out, recovered = disturb(place, place / "stopped", signal.SIGSTOP, ("policy[1]", "critic[0]", "policy[0]"))
    report("SIGSTOP (cluster.peer_timeout_s = 10)", recovered, out)
    assert_same(place / "stopped", whole, metrics=False)
