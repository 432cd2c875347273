"""Whole runs whose pools work ahead of the learners: with real models, one final state whatever happens to them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from actors.config import RolloutConfig
from actors.experience import Experience
from cluster.session import Session
from pipeline.config.recipe import load
from pipeline.config.sections import FinetuneConfig, ModelConfig
from pipeline.run.start import run_stages
from run_helpers import STEPS, assert_same, both, final_commit, metrics_of, quiet, recipe
from test_pipeline_resume import disturbed, go_on, signalling, taken_back

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run that begins with a model that was fine-tuned already."""
    run_dir = tmp_path_factory.mktemp("runs") / "start"
    run_stages(recipe(steps=1), run_dir, quiet())
    return {"model": ModelConfig(path=str(run_dir / "finetuned")), "finetune": FinetuneConfig(epochs=0)}


@pytest.fixture(scope="module", params=[1, 3])
def ahead(request: pytest.FixtureRequest, start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with max_staleness 1, or 3, that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / f"ahead-{request.param}"
    run_stages(recipe(max_staleness=request.param, **start), run_dir, quiet())
    return run_dir


def staleness(ahead: Path) -> int:
    return load(ahead / "config.toml").max_staleness


def test_each_step_has_the_samples_of_its_version_and_says_how_far_they_are_off(ahead: Path) -> None:
    steps = metrics_of(ahead)
    assert [step["staleness/versions"] for step in steps] == [min(step, staleness(ahead)) for step in range(STEPS)]
    assert steps[0]["staleness/kl"] == pytest.approx(0, abs=1e-8), "sampled by the weights that are trained"
    assert all(step["staleness/kl"] > 1e-6 for step in steps[1:])
    assert all(0.5 < step["staleness/effective_sample_size"] < 1 for step in steps[1:])
    in_flight = 16 * staleness(ahead)
    assert [step["ledger/in_flight"] for step in steps] == [in_flight] * STEPS
    commit = final_commit(ahead)
    assert sorted(commit.state.older) == list(range(STEPS - staleness(ahead), STEPS))
    assert len(commit.shards["versions"]) == staleness(ahead)


def test_three_workers_and_the_death_of_one_of_each_kind(ahead: Path, start: dict[str, Any], tmp_path: Path) -> None:
    kill = signal.SIGKILL
    deaths = {0: signalling(kill, "rollout[0]", "reward[0]"), 2: signalling(kill, "policy[0]")}
    rollout = RolloutConfig(chunk_size=8, slots=8, workers=3)
    said = disturbed(tmp_path / "run", deaths, max_staleness=staleness(ahead), rollout=rollout, **start)
    assert "policy[0] failed during" in said and "back to step" in said
    assert_same(tmp_path / "run", ahead, reissued=True)


def test_the_driver_dies_and_goes_on_from_a_commit(ahead: Path, tmp_path: Path) -> None:
    """The samples that were in flight are made again, by the older weights that the commit holds."""
    run_dir = taken_back(ahead, tmp_path / "run")
    assert "resumed from commit step=00000002" in go_on(run_dir)
    assert_same(run_dir, ahead, reissued=True)


def test_a_run_and_its_extension_are_one_run(start: dict[str, Any], tmp_path: Path) -> None:
    """N steps and N more are 2N, at a constant learning rate."""
    settings = start | both(learning_rate=1e-3, schedule="constant") | {"max_staleness": 2}
    run_stages(recipe(**settings), tmp_path / "whole", quiet())
    run_stages(recipe(**settings, steps=STEPS // 2), tmp_path / "run", quiet())
    go_on(tmp_path / "run", load(tmp_path / "run" / "config.toml").model_copy(update={"steps": STEPS}))
    assert_same(tmp_path / "run", tmp_path / "whole", reissued=True)


def test_older_weights_that_were_damaged_are_noticed(ahead: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(ahead, run_dir)
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "policy")
    [*_, newest] = sorted((run_dir / "checkpoints").iterdir())
    [file, *_] = sorted((newest / "versions").iterdir())
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    said = go_on(run_dir)
    assert f"damaged: versions/{file.name} has other bytes than were written" in said
    assert_same(run_dir, ahead, reissued=True)


def test_with_the_newest_weights_at_once_no_sample_is_lost_and_no_token_is_too_old(
    start: dict[str, Any], tmp_path: Path
) -> None:
    """Schedule `freshest`, a worker and the learner killed, then stopped at a commit and gone on with."""
    kill = signal.SIGKILL
    deaths = {0: signalling(kill, "rollout[0]"), 2: signalling(kill, "policy[0]")}
    rollout = RolloutConfig(chunk_size=8, slots=8, segment_tokens=2)
    disturbed(tmp_path / "run", deaths, schedule="freshest", max_staleness=2, rollout=rollout, **start)
    run_dir = taken_back(tmp_path / "run", tmp_path / "again")
    go_on(run_dir)
    steps = metrics_of(run_dir)
    assert [step["ledger/trained"] for step in steps] == [16 * (step + 1) for step in range(STEPS)]
    assert all(step["staleness/versions_max"] <= 2 for step in steps)
    for step in range(STEPS):
        table = Experience.read(run_dir / "experience" / f"step={step}" / "experience.parquet").table
        assert table["sample_id"].to_pylist() == list(range(16 * step, 16 * step + 16))
        assert set(table["finish"].to_pylist()) <= {"stop", "length"}
    assert final_commit(run_dir).state.older == {}
