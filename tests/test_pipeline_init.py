"""`raylign init`, and a whole run on one's own prompts and reward function with nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entry_point import raylign
from run_helpers import ROOT, environment
from tiny_models import save_gpt2

FILES = {"recipe.toml", "my_task.py", "my_reward.py"}
REWARD = (
    "def brief(prompts, responses, metadata):\n"
    "    assert all(said['answer'] >= 0 for said in metadata)\n"
    "    return [-float(len(response)) for response in responses]\n"
)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A whole run of a user who has the package and this folder."""
    command = [sys.executable, "-m", "pipeline", "run", *arguments, "--cluster.cpus-per-bundle", "1"]
    settings = {**environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=600)


def test_init_writes_what_a_run_needs_and_says_what_is_next(tmp_path: Path) -> None:
    said = raylign("init", "a b", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert {path.name for path in (tmp_path / "a b").iterdir()} == FILES
    assert said.out.endswith("next: cd 'a b' && raylign run recipe.toml\n")
    assert not {"torch", "ray", "transformers"} & said.imported
    plan = raylign("plan", "recipe.toml", cwd=tmp_path / "a b")
    assert (plan.code, plan.err) == (0, "")


def test_init_takes_an_empty_folder_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert raylign("init", "empty", cwd=tmp_path).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").write_text("mine")
    for folder, words in {
        "empty": "DIR: must be a new or empty folder, got empty, which holds my_reward.py, my_task.py, recipe.toml",
        "file": "DIR: must be a new or empty folder, got file: Not a directory",
        "file/below": "DIR: must be a new or empty folder, got file/below: Not a directory",
    }.items():
        said = raylign("init", folder, cwd=tmp_path)
        assert (said.code, said.out) == (2, "")
        assert words in said.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("--force",)])
def test_init_needs_one_folder(arguments: tuple[str, ...], tmp_path: Path) -> None:
    said = raylign("init", *arguments, cwd=tmp_path)
    assert (said.code, said.out) == (2, "")
    assert "DIR: `raylign init` needs one, a new or empty folder" in said.err
    assert not list(tmp_path.iterdir())


def test_the_answers_of_the_start_are_judged_as_it_says() -> None:
    """The reward function that is written is right, and demonstrations and prompts of both splits are different."""
    sys.path.insert(0, str(ROOT / "pipeline" / "recipes" / "start"))
    try:
        import my_reward
        import my_task
    finally:
        sys.path.pop(0)
    assert my_reward.warmth([""] * 3, ["Welcome, Ada.", "Hello, Ada.", "Hi."], [{"name": "Ada"}] * 3) == [2.0, 1.0, 0.0]
    task = my_task.Greetings()
    train, heldout = ({prompt.text for prompt in task.prompts(split)} for split in ("train", "heldout"))
    assert len(train) == 32
    assert len(heldout) == 16
    assert not train & heldout


@pytest.mark.slow
def test_what_init_writes_runs_at_once(tmp_path: Path) -> None:
    """With fewer steps: fine-tuning, reinforcement learning, evaluation, and a card that has both."""
    assert raylign("init", "mine", cwd=tmp_path).code == 0
    few = ("--steps", "1", "--finetune.epochs", "1", "--evaluation.best-of", "1", "--evaluation.samples", "1")
    done = run("recipe.toml", "--run-dir", "run", *few, cwd=tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "mine" / "run"
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["prompts"] == 16
    card = (run_dir / "policy" / "README.md").read_text()
    assert "my_reward:warmth" in card
    assert "reward by the rule" in card
    assert "1 steps of grpo" in card
    again = [sys.executable, "-m", "pipeline", "resume", str(run_dir)]
    resumed = subprocess.run(again, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "this run is finished" in resumed.stdout, "the card changes no stage"


@pytest.mark.slow
def test_prompts_and_a_reward_function_are_a_whole_run(tmp_path: Path) -> None:
    """From a model in a folder; the evaluation included, which has no demonstrations to measure perplexity on."""
    shutil.copytree(save_gpt2(tmp_path / "saved"), tmp_path / "start")
    rows = [{"prompt": f"Tell me of {number}.", "answer": number} for number in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "recipe.toml").write_text(
        'task = "files"\nsteps = 1\nbatch = { prompts = 4 }\nsampling = { max_new_tokens = 6 }\n'
        "evaluation = { best_of = 1, samples = 1 }\n"
    )
    named = ("--data.prompts", "prompts.jsonl", "--reward.function", "mine:brief", "--model.path", "start")
    done = run("recipe.toml", *named, "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(evaluation["judges"]) == ["rule"]
    assert "perplexity (there are no held-out demonstrations)" in evaluation["lacking"]
    assert (tmp_path / "run" / "report.md").is_file()
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "- prompts: `prompts.jsonl`" in card
    assert os.fspath(tmp_path) not in card
