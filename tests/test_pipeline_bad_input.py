"""Whatever a user gets wrong is told in one screen: the field or the actor and its phase, the rule, the value, and what to do; and nothing is lost.

What can be known beforehand is refused before Ray starts, with exit code 2. Those rows go through the real entry point, in an empty folder of
the user's with a module of theirs in it. What only a run can find out ends it with exit code 1; those rows share one Ray.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.config import LearnerConfig, RewardConfig, RolloutConfig, SamplingConfig, TrainingConfig
from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.session import Session
from cluster.storage import Folder
from entry_point import NOWHERE, ROOT, Interpreter, Said, raylign
from pipeline.algorithms.reinforce import Reinforce
from pipeline.chain import Chain
from pipeline.checkpoint import newest_commit
from pipeline.config import BatchConfig, EvaluationConfig, FinetuneConfig, ModelConfig, RunConfig, load, recipe_path
from pipeline.driver import Driver
from pipeline.prompts import fingerprints
from pipeline.run import resume, run_stages
from pipeline.run_folder import RunFolder, read_history
from pipeline.tasks.task import PromptText, Split, task_of
from pipeline.tasks.walks import RandomWalks
from run_helpers import environment, quiet
from tiny_models import byte_tokenizer

HERE = "test_pipeline_bad_input"
SCREEN = 12  # lines

MINE = """
import sys
from pipeline.tasks.task import PromptText
from pipeline.tasks.walks import RandomWalks

number = 3

def zero(prompts, responses, metadata):
    return [0.0] * len(responses)

class Walks(RandomWalks):
    def prompts(self, split):
        return self.given

class Empty(Walks):
    given = []

class Half(RandomWalks):
    def prompts(self, split):
        return super().prompts(split) if split == "train" else []

class Mute(RandomWalks):
    def demonstrations(self, split):
        return []

class Long(Walks):
    given = [PromptText(text="b", metadata={}), PromptText(text="b" * 30, metadata={})]

class Blank(Walks):
    given = [PromptText(text="", metadata={})]

class Null(Walks):
    given = [PromptText(text=None, metadata={})]

class Strings(Walks):
    given = ["b", "c"]

class Sets(Walks):
    given = [PromptText(text="b", metadata={"seen": {1}})]

class Torn(RandomWalks):
    def prompts(self, split):
        return [1 / 0]

class Costly(RandomWalks):
    def __init__(self, folder):
        pass

class Quits(RandomWalks):
    def __init__(self):
        sys.exit("no data")

class Nothing:
    pass
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: modules good and bad, recipes, and models with one thing wrong each."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(MINE)
    (folder / "torn.py").write_text("x = (\n")
    (folder / "zero.py").write_text("y = 1\nz = y / 0\n")
    (folder / "quits.py").write_text("import sys\nsys.exit('bye')\n")
    (folder / "unknown.toml").write_text('task = "walks"\nsteps = 2\n[batch]\npromts = 3\n')
    (folder / "wrong.toml").write_text('task = "walks"\nsteps = "many"\n[policy]\nlearning_rate = [1]\n')
    for name in ("good", "empty", "weightless", "wordless", "torn", "garbled", "small", "nan", "judge", "two", "foreign"):
        model(folder / name, name)
    return folder


def model(folder: Path, kind: str) -> None:
    """A one-layer walker of 16 tokens, or with the fault that `kind` names."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    if kind == "empty":
        folder.mkdir()
        return
    if kind == "foreign":
        byte_tokenizer().save_pretrained(folder)
    else:
        RandomWalks().build_tokenizer(folder, 0)
    shape = GPT2Config(vocab_size=8 if kind == "small" else 64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    shape.num_labels = 2 if kind == "two" else 1
    torch.manual_seed(0)
    made = (GPT2ForSequenceClassification if kind in ("judge", "two", "foreign") else GPT2LMHeadModel)(shape)
    if kind == "nan":
        with torch.no_grad():
            made.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    made.save_pretrained(folder)
    weights = folder / "model.safetensors"
    match kind:
        case "weightless":
            weights.unlink()
        case "wordless":
            for file in folder.glob("*token*"):
                file.unlink()
        case "torn":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "garbled":
            (folder / "config.json").write_text('{"model_type":')


# Before anything starts.


@pytest.fixture(scope="module")
def warm() -> Iterator[Callable[..., Said]]:
    """`raylign` forked from an interpreter that has imported torch and a model already, but not Ray."""
    interpreter = Interpreter("actors.model", "pipeline.replay", "pipeline.run", "transformers.models.gpt2.modeling_gpt2")
    yield interpreter.run
    interpreter.close()


Row = tuple[str, str]  # arguments, and what the message must contain, parts separated by " ... "

AT_ONCE: dict[str, Row] = {
    "an unknown key in a recipe": ("train unknown.toml", "raylign: unknown.toml: batch.promts: unknown key; did you mean batch.prompts?"),
    "an unknown key": ("train walks --batch.promts 3", "Unrecognized options: --batch.promts ... Perhaps you meant: ... --batch.prompts INT"),
    "wrong types in a recipe": (
        "train wrong.toml",
        "steps: input should be a valid integer ... got 'many' ... policy.learning_rate: input should be ... got [1]",
    ),
    "a wrong type": ("train walks --batch.prompts 1.5", "--batch.prompts: invalid literal for int() with base 10: '1.5' ... Prompts (groups) of a step."),
    "a negative number": ("train walks --steps -1", "raylign: steps: input should be greater than or equal to 1, got -1"),
    "a negative number deep inside": ("train walks --finetune.learner.ranks -2", "finetune.learner.ranks: input should be greater than or equal to 1, got -2"),
    "not a number": ("train walks --policy.learning-rate nan", "policy.learning_rate: input should be greater than 0, got nan"),
    "infinity": ("train walks --policy.learning-rate inf", "policy.learning_rate: must be a finite number, got inf"),
    "infinity as a deadline": (
        "train walks --reward.timeout-s inf",
        "reward.timeout_s: must be a finite number, got inf; where it is a limit, give a large one",
    ),
    "not a number in a pair": ("train walks --policy.betas nan 0.5", "policy.betas: must be a finite number, got nan"),
    "a decay rate above 1": ("train walks --critic.betas 2 0.5", "critic.betas: must be >= 0 and < 1, got (2.0, 0.5)"),
    "minibatches larger than the batch": (
        "train walks --batch.minibatches 101",
        "batch.minibatches: must be <= batch.prompts * batch.group_size = 100, got 101; lower it or raise batch.prompts",
    ),
    "groups of one for a method that compares": ("train walks --algorithm.name grpo", "batch.group_size: must be >= 2 for algorithm 'grpo', got 1"),
    "a chunk smaller than a group": (
        "train walks --batch.group-size 101",
        "rollout.chunk_size: must be >= batch.group_size = 101, got 100; a group is never split",
    ),
    "a sequence longer than the context": (
        "train walks --sampling.max-new-tokens 16",
        "model.context: must be >= ... = 17, got 16; raise it or shorten one of them",
    ),
    "two rewards": (
        "train walks --reward.function mine:zero --reward.model judge",
        "reward: must have a function or a model, got both ('mine:zero', 'judge'); remove one",
    ),
    "a critic from no reward model": (
        "train walks --critic.start reward",
        "critic.start: must be 'policy' when there is no reward model, got 'reward'; give reward.model",
    ),
    "two GPUs for a process": ("train walks --policy.gpus 2", "policy.gpus: must be at most 1, got 2; a process computes on one device"),
    "no such algorithm": ("train walks --algorithm.name grpq", "algorithm.name: must be one of 'ppo' ... 'grpo' ... got 'grpq'"),
    "no such recipe": ("train missing.toml", "recipe: must be a TOML file or one of ... 'quickstart', 'walks'], got 'missing.toml'"),
    "no recipe at all": ("train mine.py", "mine.py: must be TOML"),
}

NEW = "train walks"
OLD = "train walks --finetune.epochs 0 --model.path"
A_MODEL = "model.path: must be a folder or hub name of a causal language model, got "
A_JUDGE = "reward.model: must be a folder or hub name of a sequence classifier, got "
RAISED = "but it raised ZeroDivisionError: division by zero"
NEXT: dict[str, Row] = {
    "no such task": (f"{NEW} --task chess", "task: must be one of smalltalk, walks, files or an import path package.module:name, got 'chess'"),
    "a task in no module": (f"{NEW} --task nowhere:Walks", "task: must be importable, got 'nowhere:Walks': No module named 'nowhere'; put the module on"),
    "a task in a broken module": (f"{NEW} --task zero:Walks", f"task: must be importable, got 'zero:Walks', {RAISED} (zero.py, line 2)"),
    "a task that is none": (f"{NEW} --task mine:Nothing", "task: must make a Task, got 'mine:Nothing' without name, reward ... see pipeline/tasks/task.py"),
    "a task with arguments": (f"{NEW} --task mine:Costly", "task: must be a class without arguments, got 'mine:Costly', but it raised TypeError ... 'folder'"),
    "a task that quits": (
        f"{NEW} --task mine:Quits",
        "task: must be a class without arguments, got 'mine:Quits', but it raised SystemExit: no data (mine.py, line ",
    ),
    "a reward in no module": (f"{NEW} --reward.function nowhere:f", "reward.function: must be importable, got 'nowhere:f': No module named 'nowhere'"),
    "a reward in a broken module": (f"{NEW} --reward.function zero:f", f"reward.function: must be importable, got 'zero:f', {RAISED} (zero.py, line 2)"),
    "a reward in a module that is not Python": (
        f"{NEW} --reward.function torn:f",
        "got 'torn:f', but it raised SyntaxError: '(' was never closed (torn.py, line 1)",
    ),
    "a reward in a module that quits": (f"{NEW} --reward.function quits:f", "got 'quits:f', but it raised SystemExit: bye (quits.py, line 2)"),
    "no such reward": (
        f"{NEW} --reward.function mine:f",
        "reward.function: must be callable, got 'mine:f': no such name in the module; define it in ... mine.py",
    ),
    "a reward that is no function": (f"{NEW} --reward.function mine:number", "reward.function: must be callable, got 'mine:number': of type int"),
    "no model folder": (f"{OLD} ./missing", f"{A_MODEL}'./missing': there is no such folder"),
    "no model of that name": (f"{OLD} missing", f"{A_MODEL}'missing': no such folder is here, and of the hub: "),
    "an empty model folder": (f"{OLD} empty", f"{A_MODEL} ... empty': it has no config.json; save_pretrained writes one"),
    "a model without weights": (f"{OLD} weightless", f"{A_MODEL} ... weightless': it has no weights (model.safetensors)"),
    "a model without a tokenizer": (
        f"{OLD} wordless",
        "model.path: must have its tokenizer beside it, got ... wordless' without; save the one it was trained with there",
    ),
    "a model with torn weights": (f"{OLD} torn", f"{A_MODEL} ... torn': model.safetensors is not whole ( ... ); copy it again"),
    "a model with a garbled config": (f"{OLD} garbled", f"{A_MODEL} ... garbled': ... not a valid JSON file"),
    "fewer embeddings than tokens": (f"{OLD} small", "model.path: must have at least as many embeddings as its tokenizer has tokens, got 8 and 23 in "),
    "no prompts": (f"{OLD} good --task mine:Empty", "task: prompts('train') of 'walks' must give at least one PromptText, got none"),
    "no held-out prompts": (f"{OLD} good --task mine:Half", "task: prompts('heldout') of 'walks' must give at least one PromptText, got none"),
    "prompts that raise": (f"{OLD} good --task mine:Torn", f"task: prompts('train') of 'walks' must give a list of PromptText, {RAISED} (mine.py, line "),
    "prompts that are none": (f"{OLD} good --task mine:Strings", "task: prompts('train') of 'walks' must give a list of PromptText, got a str as number 0"),
    "a prompt without text": (f"{OLD} good --task mine:Null", "task: prompt 0 must be text, got a NoneType"),
    "metadata that is no JSON": (f"{OLD} good --task mine:Sets", "task: prompt 0 must have metadata of JSON values only, got {'seen': {1}}"),
    "an empty prompt": (f"{OLD} good --task mine:Blank", "task: prompt 0 must have at least 1 token, got 0; remove it"),
    "a prompt that is too long": (
        f"{OLD} good --task mine:Long",
        "batch.max_prompt_tokens: prompt 1 must have at most 1 tokens, got 30; raise the limit or shorten",
    ),
    "a prompt longer than the context": (
        f"{OLD} good --task mine:Long --batch.max-prompt-tokens 99",
        "sampling.max_new_tokens: prompt 1 must leave room for 9 new tokens in the model's context of 16, got 30 prompt tokens; shorten the prompt",
    ),
    "a run folder below a file": (f"{NEW} --run-dir mine.py/run", "--run-dir: must be a folder that can be written, got ... mine.py/run: Not a directory"),
    "a file in the place of the run folder": (f"{NEW} --run-dir mine.py", "--run-dir: must be a folder that can be written, got ... mine.py: Not a directory"),
    "a run folder with something in it": (
        f"{NEW} --run-dir good",
        "--run-dir: must be new or empty, or the folder of a run, got ... good; choose another, nothing in it was touched",
    ),
    "resuming a folder that is no run": (
        "resume good",
        "RUN_DIR: must be the folder of a run, got good, which has no config.toml; `raylign run RECIPE` makes one",
    ),
    "the ledger of a folder that is no run": ("ledger good", "RUN_DIR: must be the folder of a run, got good, which has no config.toml"),
    "no prompts for a new model": (f"{NEW} --task mine:Empty", "task: prompts('train') of 'walks' must give at least one PromptText, got none"),
    "no demonstrations": (f"{NEW} --task mine:Mute", "task: demonstrations('train') of 'walks' must give at least one Demonstration, got none"),
    "no judge's folder": (f"{OLD} good --reward.model ./missing", f"{A_JUDGE}'./missing': there is no such folder"),
    "an empty judge's folder": (f"{OLD} good --reward.model empty", f"{A_JUDGE} ... empty': it has no config.json"),
    "a judge with torn weights": (f"{NEW} --reward.model torn", f"{A_JUDGE} ... torn': model.safetensors is not whole ( ... ); copy it again"),
    "a critic of other words": (
        f"{OLD} good --reward.model foreign --critic.start reward",
        "critic.start: must have the words of the policy, ... good', got ... foreign' with others; choose a model that was trained from the same one",
    ),
    "a judge of two minds": (
        f"{NEW} --reward.model two",
        "reward.model: must have one output, got 2 labels in ... two' (0 LABEL_0, 1 LABEL_1); choose one by reward.label",
    ),
}


def refused(said: Said, message: str, code: int = 2) -> None:
    """It is told on one screen, by the right words in this order, with nothing around them, and Ray was not even imported."""
    assert said.code == code, said
    assert said.out == ""
    assert said.err.startswith(("raylign: ", "usage: ", "╭")), said.err
    assert_told(said.err, message)
    assert "ray" not in said.imported


def assert_told(text: str, message: str) -> None:
    assert "Traceback" not in text
    assert len(text.splitlines()) <= SCREEN, text
    place = 0
    for words in message.split(" ... "):
        assert words in text[place:], (words, text)
        place = text.index(words, place) + len(words)


@pytest.mark.parametrize(("arguments", "message"), AT_ONCE.values(), ids=AT_ONCE)
def test_what_a_setting_alone_tells_is_refused_at_once(arguments: str, message: str, user: Path) -> None:
    said = raylign(*arguments.split(), "--run-dir", "never", *NOWHERE, cwd=user)
    refused(said, message)
    assert not {"torch", "transformers"} & said.imported
    assert not (user / "never").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), NEXT.values(), ids=NEXT)
def test_what_files_and_the_user_s_code_tell_is_refused_before_ray_starts(arguments: str, message: str, user: Path, warm: Callable[..., Said]) -> None:
    command, *rest = arguments.split()
    if command == "train":
        rest = [*rest[:1], "--run-dir", "never", *NOWHERE, *rest[1:]]
    before = sorted(user.rglob("*"))
    refused(warm(command, *rest, cwd=user), message)
    assert [path for path in sorted(user.rglob("*")) if "__pycache__" not in str(path)] == [path for path in before if "__pycache__" not in str(path)]


def test_a_read_only_disk_is_told(disk: Callable[..., Path], warm: Callable[..., Said], user: Path) -> None:
    folder = disk("1m", "ro")
    said = warm("train", "walks", "--run-dir", str(folder / "run"), *NOWHERE, cwd=user)
    refused(said, f"--run-dir: must be a folder that can be written, got {folder}/run: Read-only file system")


# A run that was begun already.


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run whose cluster is nowhere, so that going on with it would end there; nothing but its folder was made."""
    cluster = ClusterConfig(address=NOWHERE[1], start_timeout_s=1, cpus_per_bundle=1)
    with RunFolder.create(tmp_path / "run", load(recipe_path("walks")).model_copy(update={"cluster": cluster})) as folder:
        return folder.path


def test_a_run_goes_on_with_its_own_settings_only(begun: Path, warm: Callable[..., Said], tmp_path: Path) -> None:
    differ = "raylign: the settings must be those that the run was begun with, but they differ: ... "
    remedy = " ... Put config.toml back as it was, allow what may change, or begin a new run with `raylign run`."
    changed = warm("resume", str(begun), "--steps", "50", "--batch.prompts", "7", cwd=tmp_path)
    steps = "steps: 40 -> 50   changes the course of the run from here on: --allow-change steps"
    refused(changed, f"{differ}{steps} ... batch.prompts: 100 -> 7   not in a run that has begun{remedy}")
    insisted = warm("resume", str(begun), "--batch.prompts", "7", "--allow-change", "batch.prompts", cwd=tmp_path)
    refused(insisted, f"{differ}batch.prompts: 100 -> 7   not in a run that has begun{remedy}")
    allowed = warm("resume", str(begun), "--steps", "50", "--allow-change", "steps", cwd=tmp_path)
    assert "changed: steps: 40 -> 50, which changes the course of the run from here on" in allowed.out
    assert allowed.code == 1 and "driver failed during 'connecting to the Ray cluster" in allowed.err, "it went on, as far as it could"


def test_a_run_in_use_is_left_alone(begun: Path, warm: Callable[..., Said], tmp_path: Path) -> None:
    with RunFolder.open(begun):
        refused(
            warm("resume", str(begun), cwd=tmp_path), f"RUN_DIR: must not be in use, but process {os.getpid()} on ... is at work in {begun}; wait until it ends"
        )
    assert len(read_history(begun)) == 1


def test_a_finished_run_says_so(begun: Path, warm: Callable[..., Said], tmp_path: Path) -> None:
    config = load(begun / "config.toml")
    chain = Chain(config, begun, fingerprints(config, task_of(config)))
    for stage in chain.stages:
        chain.begin(stage)
        chain.finish(stage, {}, 1.0)
    said = warm("resume", str(begun), cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert said.out == f"this run is finished: sft, rl, evaluate; everything is in {begun}\n"
    assert "ray" not in said.imported


@pytest.mark.parametrize("command", [["resume"], ["ledger"]], ids=" ".join)
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("history.json", '[{"number": 1', "RUN_DIR: its history.json must be as a run writes it, got ... history.json: "),
        ("history.json", None, "RUN_DIR: must be the folder of a run, got ... which has no history.json; `raylign run RECIPE` makes one"),
        ("config.toml", "steps = [", "config.toml: must be TOML: "),
    ],
    ids=["torn history", "no history", "torn recipe"],
)
def test_a_damaged_run_folder_is_told(
    command: list[str], file: str, text: str | None, message: str, begun: Path, warm: Callable[..., Said], tmp_path: Path
) -> None:
    (begun / file).unlink()
    if text is not None:
        (begun / file).write_text(text)
    refused(warm(*command, str(begun), cwd=tmp_path), message)


def test_a_step_that_was_not_recorded_cannot_be_replayed(begun: Path, warm: Callable[..., Said], tmp_path: Path) -> None:
    refused(warm("replay", str(begun), "--step", "3", cwd=tmp_path), "--step: must be a step that the run recorded (none), got 3")
    (begun / "metrics.jsonl").write_text('{"step": 0, "version": 1, "kl/coef": 0.0}\n')
    refused(warm("replay", str(begun), "--step", "3", cwd=tmp_path), "--step: must be a step that the run recorded (0 to 0), got 3")
    refused(warm("replay", str(begun), "--step", "0", cwd=tmp_path), "--step: must be one whose experience ... step=0/experience.parquet is missing")
    refused(warm("replay", str(begun), cwd=tmp_path), "the following arguments are required: --step")


# What only a run can find out.


def spoiled(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
    """Fails for some prompts, for each in another way."""
    rewards: list[Any] = [float(len(response)) for response in responses]
    for row, prompt in enumerate(prompts):
        match prompt:
            case "b":
                raise KeyError("no such word")
            case "c":
                rewards[row] = float("nan")
            case "d":
                rewards.append(0.0)
            case "e":
                rewards[row] = "good"
            case "f":
                sys.exit("bye")
            case "g":
                time.sleep(60)
    return rewards


def raising(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    raise KeyError("no such word")


def ending(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    os._exit(3)


def length(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(len(response)) for response in responses]


class Long(RandomWalks):
    """Its prompts are longer than the limit, which shows once there is a tokenizer."""

    def prompts(self, split: Split) -> list[PromptText]:
        return [PromptText(text="bb", metadata={})]


def recipe(user: Path, **changes: Any) -> RunConfig:
    """One step from the good model, without reference or critic: the fewest processes that a run can have."""
    config = RunConfig(
        task="walks",
        steps=1,
        model=ModelConfig(path=str(user / "good")),
        batch=BatchConfig(prompts=20, epochs=1, max_prompt_tokens=1),
        algorithm=Reinforce(kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=4),
        rollout=RolloutConfig(chunk_size=8, slots=8),
        reward=RewardConfig(function=f"{HERE}:length"),
        policy=LearnerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(prompts=4),
        cluster=ClusterConfig(cpus_per_bundle=1, max_replacements=0),
    )
    return config.model_copy(update=changes)


def diverging() -> TrainingConfig:
    return TrainingConfig(learning_rate=1e30, max_grad_norm=0)


def imitation(learner: TrainingConfig | None = None) -> dict[str, Any]:
    return {"finetune": FinetuneConfig(epochs=1, learner=learner or TrainingConfig(learning_rate=1e-3, micro_batch_size=64))}


WALKER = {"model": ModelConfig(layers=1, width=16, heads=2, context=16)}
FAILS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "a reward that always raises": (
        lambda _: {"reward": RewardConfig(function=f"{HERE}:raising")},
        "reward failed during 'scoring': ... of 20 samples have no reward, more than reward.max_failed = 0.1 allows; sample ... : error: "
        f"KeyError: 'no such word' ({HERE}.py, line ... ). mend the reward function, or raise reward.max_failed",
    ),
    "a reward that ends its process": (
        lambda _: {"reward": RewardConfig(function=f"{HERE}:ending")},
        "reward[0] failed during 'scoring chunk 0': the pool has already replaced 0 workers (cluster.max_replacements = 0) ... reward-0.log",
    ),
    "weights that are no numbers": (
        lambda user: {"model": ModelConfig(path=str(user / "nan"))},
        "rollout[0] failed during 'generating chunk 0': ... FloatingPointError: logits of sample ... are not finite ... rollout-0.log",
    ),
    "fine-tuning that diverges": (
        lambda _: {**WALKER, **imitation(diverging())},
        "sft failed during ... its loss is ... Lower finetune.learner.learning_rate, now 1e+30.",
    ),
    "a policy that diverges": (
        lambda _: {"policy": diverging(), "steps": 3},
        "rollout[0] failed during 'generating chunk ... ': ... are not finite; the weights have diverged",
    ),
    "a prompt that proves too long once there is a tokenizer": (
        lambda _: {**WALKER, **imitation(), "task": f"{HERE}:Long"},
        "driver failed during 'start actors': batch.max_prompt_tokens: prompt 0 must have at most 1 tokens, got 2; raise the limit or shorten the prompt.",
    ),
}


def failure(config: RunConfig, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What a run that must fail says in the end, having printed nothing else; the traceback is in its log."""
    with pytest.raises(RunError) as caught:
        run_stages(config, run_dir, quiet())
    assert capfd.readouterr() == ("", "")
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "message"), FAILS.values(), ids=FAILS)
def test_a_run_that_fails_names_who_when_and_why(
    changes: Callable[[Path], dict[str, Any]], message: str, user: Path, ray_session: Session, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_told(failure(recipe(user, **changes(user)), tmp_path / "run", capfd), message)
    assert "Traceback" in (tmp_path / "run" / "log" / "driver.log").read_text()


@pytest.mark.slow
def test_samples_that_fail_are_quarantined_each_with_its_reason(user: Path, ray_session: Session, tmp_path: Path) -> None:
    reward = RewardConfig(function=f"{HERE}:spoiled", timeout_s=0.5, max_failed=0.9)
    run_stages(recipe(user, reward=reward, evaluation=EvaluationConfig(prompts=20)), tmp_path / "run", quiet())
    commit = newest_commit(Folder(tmp_path / "run" / "checkpoints"), read_history(tmp_path / "run"))
    assert commit is not None
    quarantined = commit.state.ledger.quarantined
    for reason in (
        "error: KeyError: 'no such word' (",
        "error: ValueError: must return finite numbers, got nan",
        "error: ValueError: must return one number a response, shape (1,), got shape (2,)",
        "error: ValueError: could not convert string to float: 'good'",
        "error: SystemExit: bye (",
        "timeout: took longer than reward.timeout_s = 0.5 s",
    ):
        assert any(why.startswith(reason) for why in quarantined.values()), (reason, quarantined)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["ledger/quarantined"] == len(quarantined)
    assert metrics["ledger/trained"] == 20
    assert metrics["ledger/issued"] == sum(metrics[f"ledger/{name}"] for name in ("trained", "filtered", "quarantined", "in_flight"))


@pytest.mark.slow
def test_gpus_that_are_not_there_are_told_before_fine_tuning_begins(user: Path, tmp_path: Path) -> None:
    """Through the command line, with a Ray of its own."""
    command = [sys.executable, "-m", "pipeline", "train", "walks", "--policy.gpus", "1", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=user, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    asked = "cluster failed during 'placement': 1 of 1 bundles of 1 CPU and 1 GPU fit no node; there is ... CPUs. Add nodes, or lower the ... gpus of the roles"
    assert_told(done.stderr, f"raylign: {asked} ... to go on from there: raylign resume {tmp_path / 'run'}")
    assert not (tmp_path / "run" / "finetuned").exists()


# A disk that is full.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """disk("3m"): a filesystem of that size; called again, the same one with another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: str, *options: str) -> Path:
        given = ",".join([f"size={size}", *options, *(["remount"] if folder.is_mount() else [])])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", given, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a filesystem of a small size can only be mounted by root: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """To the last byte."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_fine_tuned_model_is_written(
    user: Path, ray_session: Session, disk: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = disk("120k")  # the texts in tokens fit
    assert (user / "good" / "model.safetensors").stat().st_size > 60_000
    told = failure(recipe(user, **imitation()), folder / "run", capfd)
    assert_told(told, "sft[0] failed during 'export': ... No space left on device")


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_commit_loses_nothing(user: Path, ray_session: Session, disk: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Two commits fit, a third does not; with more room the run goes on from the second and ends well."""
    commit = 3 * (user / "good" / "model.safetensors").stat().st_size  # weights and two moments
    folder = disk(str(2 * commit + commit // 2))
    told = failure(recipe(user, steps=4, commit_every=1), folder / "run", capfd)
    assert_told(told, "policy[0] failed during 'commit': ... No space left on device")
    kept = newest_commit(Folder(folder / "run" / "checkpoints"), read_history(folder / "run"))
    assert kept is not None and kept.state.step == 2
    disk("64m")
    told_again = io.StringIO()
    result = resume(load(folder / "run" / "config.toml"), folder / "run", (), Console(file=told_again, width=200))
    assert result is not None and (folder / "run" / "policy" / "model.safetensors").is_file()
    assert f"resumed from commit {kept.name}" in told_again.getvalue()
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_experience_is_written(
    user: Path, ray_session: Session, disk: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full to the last byte: what else a run writes on its way out must not hide what ended it."""
    folder, evaluate = disk("8m"), Driver.evaluate

    def filled(driver: Driver, batch: Any) -> Any:
        if batch.step == 1:
            fill(folder)
        return evaluate(driver, batch)

    monkeypatch.setattr(Driver, "evaluate", filled)
    told = failure(recipe(user, steps=3, commit_every=1), folder / "run", capfd)
    assert_told(told, "assembler[0] failed during 'writing the experience of step 1': ... No space left on device")
    kept = newest_commit(Folder(folder / "run" / "checkpoints"), read_history(folder / "run"))
    assert kept is not None and kept.state.step == 1
