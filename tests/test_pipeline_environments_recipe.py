"""The recipe `world` from end to end, with few steps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipeline.config.recipe import load, read_toml, recipe_path
from run_helpers import ROOT, command, environment


def test_the_recipe_is_short_and_trains_what_it_says() -> None:
    path = recipe_path("world")
    assert sum(len(section) if isinstance(section, dict) else 1 for section in read_toml(path).values()) <= 25
    config = load(path)
    assert (config.task, config.reward_model.pairs) == ("world", "sampled")


@pytest.mark.slow
def test_the_whole_chain_over_the_world(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    small = [
        *("--steps", "2", "--batch.prompts", "16", "--model.width", "64", "--evaluation.prompts", "12"),
        *("--finetune.epochs", "1", "--finetune.batch-size", "48", "--finetune.checkpoint-every", "1000"),
        *("--reward-model.epochs", "1", "--reward-model.samples", "2", "--evaluation.best-of", "2"),
    ]
    said = subprocess.run(
        command("run", "world", *small, "--run-dir", str(run_dir)),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=environment(),
    )
    assert said.returncode == 0, said.stderr[-3000:]
    assert "pipeline.environments.world.task:expected_mood_gain says which is better" in said.stdout
    for line in ("reward model: right on", "reinforce 2/2", "12 held-out prompts", "win rate by the rule"):
        assert line in said.stdout, line
    assert json.loads((run_dir / "evaluation.json").read_text())
    assert {path.stem for path in (run_dir / "stages").iterdir()} == {"sft", "reward", "rl", "evaluate"}
