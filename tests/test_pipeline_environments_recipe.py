"""Recipes of environments from end to end, with few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from run_helpers import ROOT, command, environment


def said_by(*arguments: str) -> str:
    """What a command prints; it must succeed."""
    said = subprocess.run(
        arguments, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment(), check=False
    )
    assert said.returncode == 0, said.stderr[-3000:]
    return said.stdout


@pytest.mark.slow
def test_twenty_questions_from_games_to_the_yardstick(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    small = [
        *("--steps", "1", "--batch.prompts", "32", "--model.width", "32", "--evaluation.prompts", "8"),
        *("--finetune.epochs", "1", "--finetune.batch-size", "64", "--finetune.checkpoint-every", "1000"),
        *("--evaluation.samples", "1", "--evaluation.best-of", "1"),
    ]
    said = said_by(*command("run", "twenty-questions", *small, "--run-dir", str(run_dir)))
    assert "reinforce 1/1" in said and "8 held-out prompts" in said
    assert {path.stem for path in (run_dir / "stages").iterdir()} == {"sft", "rl", "evaluate"}
    measures = said_by(sys.executable, "-m", "pipeline.environments.twenty_questions.measures", str(run_dir))
    heading, step, policy, baseline = measures.splitlines()
    assert heading.split() == ["return", "of", "best", "replies", "parsed", "found"]
    assert step.startswith("step 0 ") and float(step.split()[4]) <= 20
    assert (policy.split()[0], baseline.split()[0]) == ("policy", "baseline")
