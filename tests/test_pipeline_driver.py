"""The driver over real pools, gangs and files: order, accounts, failures, and that no token passes through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actors.experience import Experience
from cluster.faults import RunError
from cluster.session import Session
from driver_setup import config, fake_driver
from pipeline.config import RunConfig

ROOT = Path(__file__).parents[1]


def trained(run_dir: Path) -> list[int]:
    """Sample ids in the order the learner was given them."""
    return [int(line) for line in (run_dir / "seen").read_text().split()]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_sample_is_trained_once_in_order(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, config(), tmp_path) as driver:
        driver.run()
    assert trained(tmp_path) == list(range(36))
    steps = metrics(tmp_path)
    assert [m["version"] for m in steps] == [1, 2, 3]
    assert [m["ledger/trained"] for m in steps] == [12, 24, 36]
    assert {m["ledger/in_flight"] for m in steps} == {0}
    versions = [
        set(np.unique(Experience.read(p).table["versions"].combine_chunks().flatten().to_numpy()).tolist()) for p in sorted(tmp_path.glob("experience/*/*"))
    ]
    assert versions == [{-1, 0}, {-1, 1}, {-1, 2}]


@pytest.mark.slow
def test_a_dead_rollout_worker_is_replaced_and_nothing_changes(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, config(), tmp_path / "quiet") as driver:
        driver.run()
    with fake_driver(ray_session, config(), tmp_path / "killed", die_at=str(tmp_path / "died")) as driver:
        driver.run()
        assert driver.roles.rollout.replaced == 1
    assert (tmp_path / "died").exists()
    assert trained(tmp_path / "killed") == trained(tmp_path / "quiet")
    for step in range(3):
        a, b = (Experience.read(tmp_path / name / "experience" / f"step={step}" / "experience.parquet") for name in ("quiet", "killed"))
        assert a.table.equals(b.table)


@pytest.mark.slow
def test_a_hanging_reward_worker_is_expired_and_replaced(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, config(call_timeout_s=5), tmp_path, hang_at=str(tmp_path / "hung")) as driver:
        driver.run()
        assert driver.roles.reward.replaced == 1
    assert trained(tmp_path) == list(range(36))


def test_a_sample_without_reward_is_quarantined_and_the_step_refilled(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, config(prompts=6, group_size=2, chunk=4, steps=2), tmp_path, fail=(5,)) as driver:
        driver.run()
        account = driver.ledger.account()
    assert trained(tmp_path) == [0, 1, 2, 3, *range(6, 26)]  # sample 4 went with its group; group 6 came in for it
    assert (account.issued, account.trained, account.filtered, account.quarantined, account.in_flight) == (26, 24, 1, 1, 0)
    rewards = Experience.read(tmp_path / "experience" / "step=0" / "experience.parquet").table["reward"].to_numpy()
    assert not np.isnan(rewards).any()


@pytest.mark.slow
def test_too_many_failed_rewards_stop_the_run_by_name(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, config(), tmp_path, fail=tuple(range(36))) as driver, pytest.raises(RunError, match=r"reward.*told to fail") as caught:
        driver.run()
    assert "reward.max_failed" in str(caught.value)
    assert not (tmp_path / "seen").exists(), "nothing was trained on"


@pytest.mark.slow
def test_a_step_is_the_same_for_every_chunk_order(ray_session: Session, tmp_path: Path) -> None:
    """One worker or two, the learner sees the same table."""
    tables = []
    for workers in (1, 2):
        run: RunConfig = config(steps=1)
        run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"workers": workers})})
        with fake_driver(ray_session, run, tmp_path / str(workers)) as driver:
            driver.run()
        tables.append(Experience.read(tmp_path / str(workers) / "experience" / "step=0" / "experience.parquet").table)
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_no_token_passes_through_the_driver(tmp_path: Path) -> None:
    """Ten times the tokens (300 -> 3,000 a rollout, about 100 MB more a step) cost the driver under 50 MB; fetching them would cost more."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    out = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "driver_memory.py"), str(tmp_path)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert out.returncode == 0, out.stderr[-2000:]
    words = out.stdout.split()
    growth, control = float(words[1]), float(words[3])
    assert growth < 50, out.stdout
    assert control > 50, f"the measurement would not notice: {out.stdout}"
