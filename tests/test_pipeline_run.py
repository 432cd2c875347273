"""Whole runs with real models, real Ray, real DeepSpeed and real files, as small as they come."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from actors.config import CriticConfig, LearnerConfig, ReferenceConfig, RewardConfig, RolloutConfig, SamplingConfig, TrainingConfig
from actors.experience import Experience
from cluster.config import ClusterConfig
from cluster.session import Session
from pipeline.algorithms.ppo import PPO
from pipeline.cli import main
from pipeline.config import BatchConfig, EvaluationConfig, FinetuneConfig, ModelConfig, RunConfig, load, recipe_path
from pipeline.run import Result, run_stages
from run_helpers import await_log, both, command, environment

pytestmark = pytest.mark.slow  # they share a run that takes half a minute

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def walker(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others start from: a two-layer model fine-tuned on walks, then two steps of PPO with a reference."""
    run_dir = tmp_path_factory.mktemp("runs") / "walker"
    run_stages(recipe(), run_dir, Console(file=io.StringIO()))
    return run_dir


def recipe(**changes: Any) -> RunConfig:
    config = RunConfig(
        task="walks",
        steps=2,
        model=ModelConfig(layers=2, width=32, heads=2, context=16),
        finetune=FinetuneConfig(epochs=2, learner=TrainingConfig(learning_rate=3e-3, micro_batch_size=32)),
        batch=BatchConfig(prompts=24, epochs=2, minibatches=2, max_prompt_tokens=1),
        algorithm=PPO(kl_coef=0.05),
        sampling=SamplingConfig(max_new_tokens=9),
        rollout=RolloutConfig(chunk_size=8, slots=8),
        policy=LearnerConfig(learning_rate=1e-3),
        critic=CriticConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(prompts=10),
        cluster=ClusterConfig(cpus_per_bundle=1),
    )
    return config.model_copy(update=changes)


def from_walker(walker: Path, **changes: Any) -> RunConfig:
    """Reinforcement learning only, from the fine-tuned walker."""
    return recipe(model=ModelConfig(path=str(walker / "finetuned")), finetune=FinetuneConfig(epochs=0), **changes)


def run(config: RunConfig, run_dir: Path) -> Result:
    return run_stages(config, run_dir, Console(file=io.StringIO()))


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def experience(run_dir: Path, step: int) -> Experience:
    return Experience.read(run_dir / "experience" / f"step={step}" / "experience.parquet")


def test_the_run_folder_holds_what_is_promised(walker: Path) -> None:
    assert {p.name for p in walker.iterdir()} >= {
        "config.toml",
        "metrics.jsonl",
        "experience",
        "policy",
        "finetuned",
        "log",
        "evaluation.json",
        "report.md",
        "frontier.png",
        "tensorboard",
    }
    assert load(walker / "config.toml").steps == 2
    assert [m["step"] for m in metrics(walker)] == [0, 1]
    assert list((walker / "tensorboard").glob("events*"))
    assert len(experience(walker, 1)) == 24
    evaluation = json.loads((walker / "evaluation.json").read_text())
    assert len(evaluation["replies"]) == evaluation["prompts"] == 10
    assert (evaluation["policy"], evaluation["baseline"]) == ("policy", "finetuned"), "as seen from the run's folder"
    assert {"mean", "low", "high"} == evaluation["judges"]["rule"]["gain"].keys()
    assert abs(evaluation["kl"]["mean"]) < 1, "two steps do not lead far"
    assert len(evaluation["best_of"]["kl"]) == 16


def test_the_policy_loads_with_transformers_and_has_learned(walker: Path) -> None:
    before, after = (AutoModelForCausalLM.from_pretrained(walker / name) for name in ("finetuned", "policy"))
    tokenizer = AutoTokenizer.from_pretrained(walker / "policy")
    inputs = tokenizer("b", return_tensors="pt")
    assert after.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > 1
    moved = max((a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert 0 < moved < 0.1


def test_sampled_reference_and_proximal_log_probs_are_those_of_a_plain_forward_pass(walker: Path) -> None:
    """Step 0 was sampled by the fine-tuned model, which is the reference, too."""
    table = experience(walker, 0).table
    model = AutoModelForCausalLM.from_pretrained(walker / "finetuned")
    for row in table.slice(0, 6).to_pylist():
        with torch.no_grad():
            forward = torch.log_softmax(model(torch.tensor([row["tokens"]])).logits[0, :-1], -1)
        expected = forward.gather(-1, torch.tensor(row["tokens"])[1:, None]).squeeze(-1)
        acted = np.array(row["action_mask"])[1:]
        for column in ("logprobs", "reference_logprobs", "proximal_logprobs"):
            assert np.abs(np.array(row[column])[1:] - expected.numpy())[acted].max() < 1e-5, column


def test_the_self_checks_are_in_the_metrics(walker: Path) -> None:
    for m in metrics(walker):
        assert m["policy/ratio_deviation"] < 1e-4
        assert m["policy/logprob_gap_max"] < 1e-4
        assert m["policy/skipped_updates"] == 0
        assert m["ledger/issued"] == m["ledger/trained"] == 24 * (m["step"] + 1)
        assert m["policy/entropy"] > 0
    assert metrics(walker)[0]["kl/per_rollout"] == pytest.approx(0, abs=1e-4), "the policy starts as its reference"
    assert abs(metrics(walker)[1]["kl/per_rollout"]) > 1e-4


def test_processes_write_their_chatter_to_the_log_folder(walker: Path) -> None:
    assert {"policy-0.log", "critic-0.log", "rollout-0.log", "reward-0.log", "reference-0.log"} <= {p.name for p in (walker / "log").iterdir()}


def test_two_rollout_workers_give_the_samples_of_one_to_the_bit(walker: Path, tmp_path: Path) -> None:
    config = from_walker(walker)
    run(config.model_copy(update={"rollout": config.rollout.model_copy(update={"workers": 2})}), tmp_path / "two")
    for step in range(2):
        assert experience(walker, step).table.equals(experience(tmp_path / "two", step).table)


def test_heads_train_on_a_frozen_trunk_and_a_classifier_is_a_reward_and_where_a_critic_may_begin(walker: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(walker / "finetuned")
    shape = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    judge = GPT2ForSequenceClassification(shape).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    heads, critic = LearnerConfig(learning_rate=1e-2, trainable="heads", zero_stage=0), CriticConfig(learning_rate=1e-3, start="reward")
    run(from_walker(walker, policy=heads, critic=critic, reward=RewardConfig(model=str(tmp_path / "judge"))), tmp_path / "run")
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (walker / "finetuned", tmp_path / "run" / "policy"))
    assert torch.equal(before.transformer.h[0].mlp.c_fc.weight, after.transformer.h[0].mlp.c_fc.weight)
    assert torch.equal(before.transformer.wte.weight, after.transformer.wte.weight)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    table = experience(tmp_path / "run", 0).table
    assert np.unique(table["reward"].to_numpy()).size > 5
    tokens, values = table["tokens"][0].as_py(), table["values"][0].as_py()
    with torch.no_grad():
        before_last = float(judge(input_ids=torch.tensor([tokens[:-1]])).logits)
    assert values[-1] == pytest.approx(before_last, abs=1e-4)


def test_bfloat16_throughout(walker: Path, tmp_path: Path) -> None:
    config = from_walker(walker, **both(learning_rate=1e-3, dtype="bfloat16"), reference=ReferenceConfig(dtype="bfloat16"))
    run(config.model_copy(update={"rollout": RolloutConfig(chunk_size=8, slots=8, dtype="bfloat16")}), tmp_path / "run")
    for m in metrics(tmp_path / "run"):
        assert 0 < m["policy/logprob_gap_max"] < 0.5, "sampler and learner differ by bfloat16's rounding, and that is reported"


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match="--run-dir: must be new or empty, or the folder of a run"):
        run(recipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_in_the_folder_of_a_run_only_what_has_changed_is_done_again(walker: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(walker, again)
    history = (again / "history.json").read_bytes()
    assert list(run(recipe(), again).stages) == ["sft", "rl", "evaluate"], "it is all there"
    assert (again / "history.json").read_bytes() == history, "so nothing was started"
    written = {path: path.stat().st_mtime_ns for name in ("finetuned", "policy", "checkpoints") for path in (again / name).rglob("*")}
    result = run(recipe(evaluation=EvaluationConfig(prompts=5)), again)
    assert result.evaluation is not None
    assert len(result.evaluation.replies) == 5
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert [path.name for path in (again / "superseded").iterdir()] == ["001-evaluate"]
    assert (again / "superseded" / "001-evaluate" / "evaluation.json").read_bytes() == (walker / "evaluation.json").read_bytes()


def test_evaluation_asks_every_heldout_prompt_once(walker: Path) -> None:
    evaluation = json.loads((walker / "evaluation.json").read_text())
    prompts = [pair["prompt"] for pair in evaluation["replies"]]
    assert len(set(prompts)) == len(prompts) == 10


def test_the_evaluate_command_finds_in_a_run_what_the_run_found_to_the_bit(walker: Path) -> None:
    assert main(["evaluate", str(walker)]) == 0
    assert (walker / "evaluation-1" / "evaluation.json").read_bytes() == (walker / "evaluation.json").read_bytes()


def test_ppo_learns_to_walk(ray_session: Session, tmp_path: Path) -> None:
    """The bundled recipe, shortened: optimality rises by a margin that the interval separates from zero."""
    shortened = load(recipe_path("walks")).model_copy(update={"steps": 25, "cluster": ClusterConfig(cpus_per_bundle=1)})
    result = run(shortened, tmp_path / "run")
    assert result.evaluation.optimised.gain.low > 0.05
    assert result.evaluation.optimised.policy.mean > 0.75


def test_the_whole_chain_by_the_command_line_killed_on_the_way(tmp_path: Path) -> None:
    """The real entry point with the real data, minutes shorter than a user's: killed while the reward model trains, resumed to the end."""
    run_dir, pipe = tmp_path / "run", subprocess.PIPE
    small = ["--steps", "2", "--finetune.epochs", "1", "--batch.prompts", "16", "--evaluation.prompts", "12", "--model.width", "32", "--critic.start", "reward"]
    start = [*command("quickstart"), *small, "--reward-model.epochs", "1", "--reward-model.checkpoint-every", "5", "--run-dir", str(run_dir)]
    with subprocess.Popen(start, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        await_log(run_dir, "reward-model[0] ready", process, timeout_s=200)
        process.kill()
        out, _ = process.communicate(timeout=60)
    assert "fine-tune 1/1" in out
    assert "machine-made comparisons: of the replies sampled to 455 prompts, pipeline.tasks.smalltalk:sentiment says which is better" in out
    said = subprocess.run(command("resume", str(run_dir)), capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment())
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stderr == "", "nothing of Ray's or DeepSpeed's reaches the terminal"
    assert "fine-tune" not in said.stdout, "that was done"
    for line in ("reward model: right on", "reinforce 2/2", "12 held-out prompts", "win rate by the rule", "best-of-", "saved in", "try next"):
        assert line in said.stdout, line
    assert AutoTokenizer.from_pretrained(run_dir / "policy").eos_token == "<|endoftext|>"
    assert AutoModelForSequenceClassification.from_pretrained(run_dir / "reward-model").config.num_labels == 1
    report = (run_dir / "report.md").read_text()
    assert "comparisons that are machine-made" in report
    assert {path.stem for path in (run_dir / "stages").iterdir()} == {"sft", "reward", "rl", "evaluate"}


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    short = Path(tempfile.mkdtemp(prefix="st-", dir="/tmp"))  # sockets lie in it, and their names must be short
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command("run", "walks", "--run-dir", str(tmp_path / "run")),
        cwd=ROOT,
        env=without_ray() | {"RAY_TMPDIR": str(short)},
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "fine-tune" in process.stdout.readline()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err == ""
    assert (tmp_path / "run" / "log" / "ray").is_dir()
    assert not list(short.glob("raylign-*"))
    short.rmdir()


def without_ray() -> dict[str, str]:
    """The environment of a user who has no Ray running."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
