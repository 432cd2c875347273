"""Whole runs with real models, real Ray, real DeepSpeed and real files, as small as they come."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from actors.config import (
    CriticConfig,
    LearnerConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainingConfig,
)
from actors.experience import Experience
from bfloat16 import NOT_EMULATED
from cluster.config import ClusterConfig
from cluster.imports import use_roots
from cluster.session import Session
from pipeline.algorithms.ppo import PPO
from pipeline.cli import main
from pipeline.config.recipe import load, recipe_path
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig, EvaluationConfig, FinetuneConfig, ModelConfig
from pipeline.folder.run_folder import read_history
from pipeline.report.result import Result
from pipeline.run.start import resume, run_stages
from readme_example import readme_example
from run_helpers import assert_same, await_that, both, command, environment, says
from tiny_models import save_gpt2

pytestmark = pytest.mark.slow  # they share a run that takes half a minute

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def walker(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others start from: a two-layer model fine-tuned on walks, then two steps of PPO with a
    reference.
    """
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
    assert {"policy-0.log", "critic-0.log", "rollout-0.log", "reward-0.log", "reference-0.log"} <= {
        p.name for p in (walker / "log").iterdir()
    }


def test_the_driver_log_tells_each_stage_phase_and_step_in_one_line(walker: Path) -> None:
    lines = [line.split(" INFO ", 1)[1] for line in (walker / "log" / "driver.log").read_text().splitlines()]
    for stage in ("sft", "rl", "evaluate"):
        [told] = [line for line in lines if line.startswith(f"stage {stage} is done in ")]
        assert json.loads(told.split(": ", 1)[1])
    steps = len((walker / "metrics.jsonl").read_text().splitlines())
    for step in range(steps):
        [told] = [line for line in lines if line.startswith(f"step {step} is done: reward/mean ")]
        assert all(f"{phase} " in told for phase in ("rollout", "evaluate", "assemble", "learn", "publish", "record"))
        for phase in ("rollout", "evaluate", "learn", "publish"):
            assert lines.count(f"reinforce {step + 1}/{steps}: {phase}") == 1


def test_two_rollout_workers_give_the_samples_of_one_to_the_bit(walker: Path, tmp_path: Path) -> None:
    config = from_walker(walker)
    run(config.model_copy(update={"rollout": config.rollout.model_copy(update={"workers": 2})}), tmp_path / "two")
    for step in range(2):
        assert experience(walker, step).table.equals(experience(tmp_path / "two", step).table)


def test_heads_train_on_a_frozen_trunk_and_a_classifier_is_a_reward_and_where_a_critic_may_begin(
    walker: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(walker / "finetuned")
    shape = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    judge = GPT2ForSequenceClassification(shape).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    heads, critic = (
        LearnerConfig(learning_rate=1e-2, trainable="heads", zero_stage=0),
        CriticConfig(learning_rate=1e-3, start="reward"),
    )
    run(
        from_walker(walker, policy=heads, critic=critic, reward=RewardConfig(model=str(tmp_path / "judge"))),
        tmp_path / "run",
    )
    before, after = (
        AutoModelForCausalLM.from_pretrained(f) for f in (walker / "finetuned", tmp_path / "run" / "policy")
    )
    assert torch.equal(before.transformer.h[0].mlp.c_fc.weight, after.transformer.h[0].mlp.c_fc.weight)
    assert torch.equal(before.transformer.wte.weight, after.transformer.wte.weight)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    table = experience(tmp_path / "run", 0).table
    assert np.unique(table["reward"].to_numpy()).size > 5
    tokens, values = table["tokens"][0].as_py(), table["values"][0].as_py()
    with torch.no_grad():
        before_last = float(judge(input_ids=torch.tensor([tokens[:-1]])).logits)
    assert values[-1] == pytest.approx(before_last, abs=1e-4)


@NOT_EMULATED
def test_bfloat16_throughout(walker: Path, tmp_path: Path) -> None:
    config = from_walker(
        walker, **both(learning_rate=1e-3, dtype="bfloat16"), reference=ReferenceConfig(dtype="bfloat16")
    )
    run(config.model_copy(update={"rollout": RolloutConfig(chunk_size=8, slots=8, dtype="bfloat16")}), tmp_path / "run")
    for m in metrics(tmp_path / "run"):
        assert 0 < m["policy/logprob_gap_max"] < 0.5, (
            "sampler and learner differ by bfloat16's rounding, and that is reported"
        )


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
    written = {
        path: path.stat().st_mtime_ns
        for name in ("finetuned", "policy", "checkpoints")
        for path in (again / name).rglob("*")
        if path.name != "README.md"  # the model card, which tells the evaluation
    }
    result = run(recipe(evaluation=EvaluationConfig(prompts=5)), again)
    assert result.evaluation is not None
    assert len(result.evaluation.replies) == 5
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert [path.name for path in (again / "superseded").iterdir()] == ["001-evaluate"]
    assert (again / "superseded" / "001-evaluate" / "evaluation.json").read_bytes() == (
        walker / "evaluation.json"
    ).read_bytes()


def test_evaluation_asks_every_heldout_prompt_once(walker: Path) -> None:
    evaluation = json.loads((walker / "evaluation.json").read_text())
    prompts = [pair["prompt"] for pair in evaluation["replies"]]
    assert len(set(prompts)) == len(prompts) == 10


def test_ppo_learns_to_walk(ray_session: Session, tmp_path: Path) -> None:
    """The bundled recipe, shortened: optimality rises by a margin that the interval separates from zero."""
    shortened = load(recipe_path("walks")).model_copy(update={"steps": 25, "cluster": ClusterConfig(cpus_per_bundle=1)})
    result = run(shortened, tmp_path / "run")
    assert result.evaluation.optimised.gain.low > 0.05
    assert result.evaluation.optimised.policy.mean > 0.75


def stopped_once(has_begun: Callable[[], bool], *arguments: str) -> tuple[str, str]:
    """What a command printed, and its last words, which was sent SIGTERM as soon as something had begun."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        await_that(has_begun, process)
        process.terminate()
        out, err = process.communicate(timeout=600)
    assert process.returncode == 143, err
    return out, err


def test_the_whole_chain_by_the_command_line_is_stopped_while_it_compares_learns_to_judge_and_evaluates(
    ray_session: Session, tmp_path: Path
) -> None:
    """The real entry point with the real data, minutes shorter than a user's: one run is stopped in three stages, which
    no other test stops it in, and then an evaluation of it. To the bit it ends as one does that nothing happens to.
    """
    run_dir = tmp_path / "run"
    small = "--steps 2 --batch.prompts 16 --model.layers 1 --model.width 32 --critic.start reward"
    patient = "--cluster.start-timeout-s 300"
    tuned = "--finetune.epochs 1 --finetune.batch-size 64 --finetune.checkpoint-every 1000"
    shorter = "--sampling.max-new-tokens 16 --evaluation.prompts 12 --evaluation.samples 1 --evaluation.best-of 2"
    reward_model = "--reward-model.epochs 1 --reward-model.checkpoint-every 1 --reward-model.samples 4"
    log, learned, again = (
        run_dir / "log" / "driver.log",
        run_dir / "reward" / "metrics.jsonl",
        f"; to go on: raylign resume {run_dir}\n",
    )
    start = (
        "quickstart",
        *small.split(),
        *patient.split(),
        *tuned.split(),
        *shorter.split(),
        *reward_model.split(),
        "--run-dir",
        str(run_dir),
    )
    out, said = stopped_once(lambda: says(log, "comparer[0] ready"), *start)
    assert "fine-tune 1/1" in out
    assert said == f"raylign: stopped by SIGTERM during 'compare sampled replies' (kept: fine-tuning){again}"

    out, said = stopped_once(lambda: says(learned, '"updates": 2'), "resume", str(run_dir))
    assert "fine-tune" not in out, "that was done"
    rule = "pipeline.environments.world.task:expected_mood_gain"
    assert f"machine-made comparisons: of the replies sampled to 728 prompts, {rule}" in out
    told = re.fullmatch(
        r"raylign: stopped by SIGTERM after update (\d+) of (\d+) of 'train the reward model', which is checkpointed"
        r"(.*\n)",
        said,
    )
    assert told and int(told[1]) < int(told[2]) and told[3] == again, said

    out, said = stopped_once(lambda: says(log, "examiner[0] ready"), "resume", str(run_dir))
    assert "compare" not in out, "that was done"
    assert "reward model: right on" in out and "reinforce 2/2" in out
    kept = "fine-tuning, reward model, reinforcement learning"
    assert said == f"raylign: stopped by SIGTERM during 'evaluate' (kept: {kept}){again}"

    end = subprocess.run(
        command("resume", str(run_dir)), capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment()
    )
    assert (end.returncode, end.stderr) == (0, ""), "nothing of Ray's or DeepSpeed's reaches the terminal"
    for line in (
        "12 held-out prompts",
        "win rate by the rule",
        "replies to the point",
        "best-of-",
        "saved in",
        "try next",
    ):
        assert line in end.stdout, line
    assert AutoTokenizer.from_pretrained(run_dir / "policy").eos_token == "<|endoftext|>"
    assert AutoModelForSequenceClassification.from_pretrained(run_dir / "reward-model").config.num_labels == 1
    assert "comparisons that are machine-made" in (run_dir / "report.md").read_text()
    assert {path.stem for path in (run_dir / "stages").iterdir()} == {"sft", "reward", "rl", "evaluate"}

    apart = run_dir / "evaluation-1"
    _, said = stopped_once(lambda: says(apart / "log" / "driver.log", "examiner[0] ready"), "evaluate", str(run_dir))
    assert said == (
        "raylign: stopped by SIGTERM during 'evaluate'; nothing of it is kept, and the same command begins it again\n"
    )
    assert [path.name for path in apart.iterdir()] == ["log"]
    assert main(["evaluate", str(run_dir)]) == 0
    assert (apart / "evaluation.json").read_bytes() == (run_dir / "evaluation.json").read_bytes()

    undisturbed = as_fine_tuned(run_dir, tmp_path / "undisturbed")
    assert resume(load(run_dir / "config.toml"), undisturbed, (), Console(file=io.StringIO())) is not None
    assert_same(run_dir, undisturbed)
    for name in ("comparisons.parquet", "reward-model/model.safetensors", "reward-model.json"):
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name


def as_fine_tuned(run_dir: Path, copy: Path) -> Path:
    """A copy of a run as it was when its first stage was done."""
    (copy / "stages").mkdir(parents=True)
    for name in ("config.toml", "history.json", "stages/sft.json"):
        shutil.copy(run_dir / name, copy / name)
    shutil.copytree(run_dir / "finetuned", copy / "finetuned")
    return copy


PROMPTS_ALONE = """
task = "files"
steps = 1
data = { prompts = "prompts.jsonl" }
model = { path = "model" }
reward = { function = "mine:length" }
algorithm = { name = "my_algorithms:Raft", margin = 0.5 }
batch = { prompts = 4, group_size = 2, epochs = 1 }
sampling = { max_new_tokens = 4 }
evaluation = { prompts = 4, samples = 1, best_of = 2 }
policy = { learning_rate = 1e-3, schedule = "constant" }
cluster = { cpus_per_bundle = 1 }
"""


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A user's folder: prompts, a reward function, an algorithm, a model whose generation settings transformers would
    not write, and packages called as ours are.
    """
    folder = tmp_path / "theirs"
    for name in ("actors", "cluster", "pipeline"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('not meant')")
    save_gpt2(folder / "model", width=16, context=32)
    (folder / "model" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 256}')
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "Say {number}:"}}\n' for number in range(30)))
    (folder / "mine.py").write_text(
        "def length(prompts, responses, metadata):\n    return [float(len(set(text))) for text in responses]\n"
    )
    (folder / "my_algorithms.py").write_text(readme_example())
    (folder / "mine.toml").write_text(PROMPTS_ALONE)
    return folder


def test_prompts_a_reward_and_an_algorithm_run_to_the_end_and_the_run_is_extended_from_elsewhere(
    ray_session: Session, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step and one more, at a constant rate, are two at once: to the bit, though a file of the model that changes
    no token was mended meanwhile.
    """
    run_dir, installed = tmp_path / "run", str(Path(sys.executable).with_name("raylign"))

    def raylign(*arguments: str, cwd: Path) -> str:
        users = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        said = subprocess.run([installed, *arguments], cwd=cwd, env=users, capture_output=True, text=True, timeout=600)
        assert (said.returncode, said.stderr) == (0, ""), said.stdout[-2000:] + said.stderr[-2000:]
        return said.stdout

    told = raylign("run", "mine.toml", "--run-dir", str(run_dir), "--algorithm.margin", "0.25", cwd=theirs)
    assert "is exported as it is, though transformers would not write it: `temperature`" in told
    assert "Left out: perplexity (there are no held-out demonstrations)." in told
    assert "Left out: perplexity" in (run_dir / "report.md").read_text()
    assert json.loads((run_dir / "policy" / "generation_config.json").read_text())["temperature"] == 0.6
    epoch = read_history(run_dir)[0]
    assert epoch.roots[0] == str(theirs)
    assert {name: file.name for name, file in epoch.code.items()} == {
        "mine:length": str(theirs / "mine.py"),
        "my_algorithms:Raft": str(theirs / "my_algorithms.py"),
    }
    assert {"name": "my_algorithms:Raft", "margin": 0.25}.items() <= epoch.config["algorithm"].items()
    (theirs / "model" / "generation_config.json").write_text('{"eos_token_id": [256]}')
    told = raylign("resume", str(run_dir), "--steps", "2", cwd=tmp_path)
    assert "changed: steps: 1 -> 2" in told
    assert "resumed from commit step=00000001-epoch=0001" in told
    assert [path.name for path in (run_dir / "superseded").iterdir()] == ["001-evaluate"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("cluster.imports._roots", [])
    use_roots([str(theirs)])
    config = load(run_dir / "config.toml")
    assert (config.data.prompts, config.steps) == (str(theirs / "prompts.jsonl"), 2)
    run(config, tmp_path / "at once")
    assert_same(run_dir, tmp_path / "at once")
