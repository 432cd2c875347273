"""Whatever a user gets wrong is told in one screen: the field or the actor and its phase, the rule, the value, and what
to do; and nothing is lost.

What can be known beforehand is refused before Ray starts, with exit code 2. Those rows go through the real entry point,
in an empty folder of the user's with a module of theirs in it. What only a run can find out ends it with exit code 1;
those rows share one Ray.
"""

from __future__ import annotations

import io
import json
import os
import shutil
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
from entry_point import NOWHERE, Said, raylign, raylign_warm
from pipeline.algorithms.reinforce import Reinforce
from pipeline.arguments.parsing import parse
from pipeline.config.recipe import load, recipe_path, save
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig, EvaluationConfig, FinetuneConfig, ModelConfig
from pipeline.data.registry import load_task
from pipeline.encoding.prompts import data_checksums
from pipeline.folder.manifests import Chain
from pipeline.folder.run_folder import RunFolder, read_history
from pipeline.loop.commits import Checkpoints, DriverState, newest_commit
from pipeline.loop.driver import Driver
from pipeline.plan.plan import show
from pipeline.run.start import resume, run_stages
from pipeline.tasks.task import PromptText, Split
from pipeline.tasks.walks import RandomWalks
from run_helpers import new_run, quiet
from tiny_models import byte_tokenizer

HERE = "test_pipeline_bad_input"
SCREEN = 12  # lines

MINE = """
import sys
from pydantic import Field
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.reinforce import Reinforce
from pipeline.environments.environment import Turn
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

class Games:
    def reset(self, prompts, seeds):
        return [0] * len(prompts), [Turn()] * len(prompts)

    def step(self, episodes, replies):
        return [Turn()] * len(episodes)

    def close(self, episodes):
        pass

class Deaf(Games):
    def reset(self, prompts, seeds):
        raise ConnectionError("no route")

class Bare(Games):
    def reset(self, prompts, seeds):
        return ["an episode"] * len(prompts), ["hello"] * len(prompts)

class Endless(Games):
    step = None

class Unfinished(Algorithm):
    pass

class Weighted(Reinforce):
    weight: float = Field(default=1.0, ge=0)
    'How much.'

    def rules(self):
        super().rules()
        if self.weight == 3:
            return 1 / 0

class Undecided(Reinforce):
    weight: float | None = None

class Raises(Reinforce):
    def advantages(self, batch):
        raise KeyError("weight")
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
    (folder / "own.toml").write_text('task = "walks"\nsteps = 2\n[algorithm]\nname = "mine:Weighted"\nwieght = 3\n')
    (folder / "wrong.toml").write_text('task = "walks"\nsteps = "many"\n[policy]\nlearning_rate = [1]\n')
    kinds = (
        "good empty weightless wordless torn garbled small nan wrapped judge headless two foreign encoder mumbling "
        "typed"
    )
    for name in kinds.split():
        model(folder / name, name)
    return folder


def model(folder: Path, kind: str) -> None:
    """A one-layer walker of 16 tokens, or with the fault that `kind` names."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    if kind == "empty":
        folder.mkdir()
        return
    if kind == "foreign":
        byte_tokenizer().save_pretrained(folder)
    else:
        RandomWalks().build_tokenizer(folder, 0)
    words = {"small": 8, "foreign": 264}.get(kind, 64)
    shape = GPT2Config(
        vocab_size=words, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    shape.num_labels = 2 if kind == "two" else 1
    torch.manual_seed(0)
    if kind == "encoder":
        T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        ).save_pretrained(folder)
        return
    made = (GPT2ForSequenceClassification if kind in ("judge", "headless", "two", "foreign") else GPT2LMHeadModel)(
        shape
    )
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
        case "wrapped" | "headless":
            tensors = load_file(weights)
            renamed = {
                f"module.{name}" if kind == "wrapped" else name.replace("score", "value_head"): tensor
                for name, tensor in tensors.items()
            }
            save_file(renamed, weights, {"format": "pt"})
        case "garbled":
            (folder / "config.json").write_text('{"model_type":')
        case "typed":
            (folder / "config.json").write_text('{"model_type": "gpt2", "n_embd": "many"}')
        case "mumbling":
            (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens"')


# Before anything starts.


Row = tuple[str, str]  # arguments, and what the message must contain, parts separated by " ... "

AT_ONCE: dict[str, Row] = {
    "an unknown key in a recipe": (
        "train unknown.toml",
        "raylign: unknown.toml: batch.promts: unknown key; did you mean batch.prompts?",
    ),
    "an unknown key": (
        "train walks --batch.promts 3",
        "Unrecognized options: --batch.promts ... Perhaps you meant: ... --batch.prompts INT",
    ),
    "wrong types in a recipe": (
        "train wrong.toml",
        "steps: input should be a valid integer ... got 'many' ... policy.learning_rate: input should be ... got [1]",
    ),
    "a wrong type": (
        "train walks --batch.prompts 1.5",
        "--batch.prompts: invalid literal for int() with base 10: '1.5' ... Prompts (groups) of a step.",
    ),
    "a negative number": (
        "train walks --steps -1",
        "raylign: steps: input should be greater than or equal to 1, got -1",
    ),
    "a negative number deep inside": (
        "train walks --finetune.learner.ranks -2",
        "finetune.learner.ranks: input should be greater than or equal to 1, got -2",
    ),
    "not a number": (
        "train walks --policy.learning-rate nan",
        "policy.learning_rate: must be a finite number, got nan",
    ),
    "infinity": ("train walks --policy.learning-rate inf", "policy.learning_rate: must be a finite number, got inf"),
    "infinity as a deadline": (
        "train walks --reward.timeout-s inf",
        "reward.timeout_s: must be a finite number, got inf; where it is a limit, give a large one",
    ),
    "not a number in a pair": ("train walks --policy.betas nan 0.5", "policy.betas: must be a finite number, got nan"),
    "a decay rate above 1": ("train walks --critic.betas 2 0.5", "critic.betas: must be >= 0 and < 1, got (2.0, 0.5)"),
    "minibatches larger than the batch": (
        "train walks --batch.minibatches 101",
        "batch.minibatches: must be <= batch.prompts * batch.group_size = 100, got 101; lower it or raise "
        "batch.prompts",
    ),
    "groups of one for a method that compares": (
        "train walks --algorithm.name grpo",
        "batch.group_size: must be >= 2 for algorithm 'grpo', got 1",
    ),
    "a chunk smaller than a group": (
        "train walks --batch.group-size 101",
        "rollout.chunk_size: must be >= batch.group_size = 101, got 100; a group is never split",
    ),
    "a sequence longer than the context": (
        "train walks --sampling.max-new-tokens 16",
        "model.context: must be >= ... = 17, got 16; raise it or shorten one of them",
    ),
    "settings of no environment": (
        "train walks --environment.max-turns 3",
        "environment.name: must be given with other settings of environment, got none; name an environment, or remove",
    ),
    "options without conversations": (
        "train walks --manager.options comfort ask",
        "environment.name: must be given with manager.options = ['comfort', 'ask'], got none; a manager chooses",
    ),
    "settings of no manager": (
        "train walks --environment.name mine:Games --manager.epochs 2",
        "manager.options: must be given with other settings of manager, got none; name the sub-tasks, or remove",
    ),
    "options for an algorithm without a critic": (
        "train walks --environment.name mine:Games --manager.options a b --algorithm.name reinforce",
        "algorithm.name: must be an algorithm with a critic when there are manager.options, got 'reinforce'",
    ),
    "a check that is not named": (
        "train walks --environment.name mine:Games --manager.options a b --manager.check-coef 1",
        "manager.check: must be given when manager.check_coef is 1, got none; it says whether a reply carries out",
    ),
    "diversity of one option": (
        "train walks --environment.name mine:Games --manager.options a --manager.diversity-coef 0.1",
        "manager.diversity_coef: must be 0 when there is one option, got 0.1; a discriminator has nothing to tell",
    ),
    "settings of no discriminator": (
        "train walks --environment.name mine:Games --manager.options a b --manager.discriminator-epochs 2",
        "manager.diversity_coef: must be > 0 when manager.discriminator_epochs is 2, got 0; there is no discriminator",
    ),
    "an option that cannot be a token": (
        "train walks --environment.name mine:Games --manager.options a b!",
        "manager.options: must be different names of letters and digits, joined by '-' or '_', got 'b!'; rename it",
    ),
    "an option twice": (
        "train walks --environment.name mine:Games --manager.options a a",
        "manager.options: must be different names of letters and digits, joined by '-' or '_', got 'a' twice",
    ),
    "no turn": (
        "train walks --environment.name mine:Games --environment.max-turns 0",
        "environment.max_turns: input should be greater than or equal to 1, got 0",
    ),
    "a length penalty that would count a whole conversation": (
        "train walks --environment.name mine:Games --shaping.overlong-tokens 3",
        "shaping.overlong_tokens: must be 0 in conversations, got 3; sampling.max_new_tokens limits each turn",
    ),
    "two rewards": (
        "train walks --reward.function mine:zero --reward.model judge",
        "reward: must have a function or a model, got both ('mine:zero', 'judge'); remove one",
    ),
    "a critic from no reward model": (
        "train walks --critic.start reward",
        "critic.start: must be 'policy' when there is no reward model, got 'reward'; give reward.model",
    ),
    "two GPUs for a process": (
        "train walks --policy.gpus 2",
        "policy.gpus: must be at most 1, got 2; a process computes on one device",
    ),
    "no such algorithm": (
        "train walks --algorithm.name grpq",
        "algorithm.name: must be one of 'ppo' ... 'grpo' ... got 'grpq'",
    ),
    "an algorithm in no module": (
        "train walks --algorithm.name nowhere:Mine",
        "algorithm.name: must be importable, got 'nowhere:Mine': No module named 'nowhere'; put the module beside the "
        "recipe",
    ),
    "an algorithm in a broken module": (
        "train walks --algorithm.name zero:Mine",
        "algorithm.name: must be importable, got 'zero:Mine', but it raised ZeroDivisionError: division by zero "
        "(zero.py, line 2)",
    ),
    "an algorithm that is none": (
        "train walks --algorithm.name mine:Nothing",
        "algorithm.name: must name a subclass of pipeline.algorithms.base.Algorithm, got 'mine:Nothing', which is a "
        "class Nothing; derive it from Algorithm",
    ),
    "an algorithm that computes nothing": (
        "train walks --algorithm.name mine:Unfinished",
        "algorithm.name: must name a class that defines advantages, got 'mine:Unfinished', which does not; see ",
    ),
    "an unknown setting of one's own algorithm": (
        "train own.toml",
        "own.toml: algorithm.wieght: unknown key; did you mean algorithm.weight?",
    ),
    "an unknown setting of one's own algorithm on the command line": (
        "train walks --algorithm.name mine:Weighted --algorithm.wieght 2",
        "Unrecognized options: --algorithm.wieght ... Perhaps you meant: ... --algorithm.weight FLOAT ... How much.",
    ),
    "a setting of one's own algorithm of a wrong type": (
        "train walks --algorithm.name mine:Weighted --algorithm.weight much",
        "--algorithm.weight: could not convert string to float: 'much'",
    ),
    "a setting of one's own algorithm out of range": (
        "train walks --algorithm.name mine:Weighted --algorithm.weight -1",
        "algorithm.weight: input should be greater than or equal to 0, got -1.0",
    ),
    "rules of one's own algorithm that fail": (
        "train walks --algorithm.name mine:Weighted --algorithm.weight 3",
        "algorithm.name: must have rules that can judge its settings, got 'mine:Weighted', but it raised "
        "ZeroDivisionError",
    ),
    "a setting of one's own algorithm that TOML cannot say": (
        "train walks --algorithm.name mine:Undecided",
        "algorithm.weight: must not be None, which TOML cannot say; give it a type and a default without None",
    ),
    "no such recipe": (
        "train missing.toml",
        "recipe: must be a TOML file or one of ... 'smalltalk', 'twenty-questions', 'walks'], got 'missing.toml'",
    ),
    "no recipe at all": ("train mine.py", "mine.py: must be TOML"),
    "a seed of too many bits": (
        "train walks --seed 18446744073709551616",
        "seed: input should be less than or equal to 18446744073709551615, got 18446744073709551616",
    ),
    "a learning rate without its minus": (
        "train walks --policy.learning-rate 1e5",
        "policy.learning_rate: input should be less than or equal to 1, got 100000.0",
    ),
    "a time-out of years": (
        "train walks --cluster.call-timeout-s 1e8",
        "cluster.call_timeout_s: input should be less than or equal to 1000000, got 100000000.0",
    ),
}

NEW = "train walks"
OLD = "train walks --finetune.epochs 0 --model.path"
FILES = "train walks --task files --reward.function mine:zero"
A_MODEL = "model.path: must be a folder or hub name of a causal language model, got "
A_JUDGE = "reward.model: must be a folder or hub name of a sequence classifier, got "
RAISED = "but it raised ZeroDivisionError: division by zero"
NEXT: dict[str, Row] = {
    "no such environment": (
        f"{NEW} --environment.name wrold",
        "environment: must be one of world, twenty-questions, model-partner or an import path package.module:name, "
        "got 'wrold'",
    ),
    "an environment in no module": (
        f"{NEW} --environment.name nowhere:Games",
        "environment: must be importable, got 'nowhere:Games': No module named 'nowhere'",
    ),
    "an environment without a method": (
        f"{NEW} --environment.name mine:Endless",
        "environment: must have the methods reset, step, close, got 'mine:Endless' without step",
    ),
    "an environment that cannot begin": (
        f"{NEW} --environment.name mine:Deaf",
        "environment.name: must be an environment that goes on from the prompts of task 'walks', got 'mine:Deaf': "
        "error: ConnectionError: no route",
    ),
    "an environment that breaks its contract": (
        f"{NEW} --environment.name mine:Bare",
        "environment: mine:Bare: turn 0 of reset: must be a Turn, got 'hello'; make it by Turn(",
    ),
    "no such task": (
        f"{NEW} --task chess",
        "task: must be one of smalltalk, twenty-questions, walks, world, world-conversations, world-options, files "
        "or an import path package.module:name, got 'chess'",
    ),
    "an algorithm that fails": (
        f"{NEW} --algorithm.name mine:Raises",
        "algorithm.name: must compute the advantages of a step, got 'mine:Raises', but it raised KeyError: 'weight' "
        "(mine.py, line ",
    ),
    "a task in no module": (
        f"{NEW} --task nowhere:Walks",
        "task: must be importable, got 'nowhere:Walks': No module named 'nowhere'; put the module beside the recipe",
    ),
    "a task in a broken module": (
        f"{NEW} --task zero:Walks",
        f"task: must be importable, got 'zero:Walks', {RAISED} (zero.py, line 2)",
    ),
    "a task that is none": (
        f"{NEW} --task mine:Nothing",
        "task: must make a Task, got 'mine:Nothing' without name, reward ... see pipeline/tasks/task.py",
    ),
    "a task with arguments": (
        f"{NEW} --task mine:Costly",
        "task: must be a class without arguments, got 'mine:Costly', but it raised TypeError ... 'folder'",
    ),
    "a task that quits": (
        f"{NEW} --task mine:Quits",
        "task: must be a class without arguments, got 'mine:Quits', but it raised SystemExit: no data (mine.py, line ",
    ),
    "a reward in no module": (
        f"{NEW} --reward.function nowhere:f",
        "reward.function: must be importable, got 'nowhere:f': No module named 'nowhere'",
    ),
    "a reward in a broken module": (
        f"{NEW} --reward.function zero:f",
        f"reward.function: must be importable, got 'zero:f', {RAISED} (zero.py, line 2)",
    ),
    "a reward in a module that is not Python": (
        f"{NEW} --reward.function torn:f",
        "got 'torn:f', but it raised SyntaxError: '(' was never closed (torn.py, line 1)",
    ),
    "a reward in a module that quits": (
        f"{NEW} --reward.function quits:f",
        "got 'quits:f', but it raised SystemExit: bye (quits.py, line 2)",
    ),
    "no such reward": (
        f"{NEW} --reward.function mine:f",
        "reward.function: must be callable, got 'mine:f': no such name in the module; define it in ... mine.py",
    ),
    "a reward that is no function": (
        f"{NEW} --reward.function mine:number",
        "reward.function: must be callable, got 'mine:number': of type int",
    ),
    "no model folder": (f"{OLD} ./missing", f"{A_MODEL}'./missing': there is no such folder"),
    "no model of that name": (
        f"{OLD} missing",
        f"{A_MODEL}'missing': there is no such folder; as for the Hugging Face hub: ",
    ),
    "an empty model folder": (
        f"{OLD} empty",
        f"{A_MODEL} ... empty': it has no config.json; save_pretrained writes one",
    ),
    "a model without weights": (
        f"{OLD} weightless",
        f"{A_MODEL} ... weightless': it has no weights (model.safetensors)",
    ),
    "a model without a tokenizer": (
        f"{OLD} wordless",
        "model.path: must have its tokenizer beside it, got ... wordless' without; save the one it was trained with "
        "there",
    ),
    "a model with torn weights": (
        f"{OLD} torn",
        f"{A_MODEL} ... torn': model.safetensors is not whole ( ... ); copy it again",
    ),
    "a model with a garbled config": (
        f"{OLD} garbled",
        f"{A_MODEL} ... garbled': its config.json cannot be read ( ... ); copy it again",
    ),
    "a model whose config has wrong types": (
        f"{OLD} typed",
        f"{A_MODEL} ... typed': Validation error for field 'n_embd': TypeError: ",
    ),
    "an encoder with a decoder": (
        f"{OLD} encoder",
        f"{A_MODEL} ... encoder' (family t5), which has none; choose a model of another family",
    ),
    "a tokenizer that is torn": (
        f"{OLD} mumbling",
        "model.path: must have a tokenizer that can be read, got ... mumbling': its tokenizer.json cannot be read "
        "(Expecting ... ); copy it again",
    ),
    "a judge's tokenizer that is torn": (
        f"{NEW} --reward.model mumbling",
        "reward.model: must have a tokenizer that can be read, got ... mumbling': its tokenizer.json cannot be read "
        "(Expecting ... ); copy it again",
    ),
    "a mistyped data file": (
        f"{FILES} --data.demonstrations demo.jsonl",
        "data.demonstrations: must be an existing file, a pattern that fits some, a URL or the name of a Hugging Face "
        "data set, got ",
    ),
    "a mistyped data file in a folder of one's own": (
        f"{FILES} --data.demonstrations good/demo",
        "data.demonstrations: must be an existing file, a pattern",
    ),
    "no comparisons": (
        f"{NEW} --reward-model.epochs 1",
        "task: must have comparisons to learn a reward model from, got 'walks' without",
    ),
    "an address that is none": (
        f"{NEW} --cluster.address head:port",
        "cluster.address: must be auto or host:port, got 'head:port'; such as 10.0.0.1:6379",
    ),
    "a model under a wrapper": (
        f"{OLD} wrapped",
        f"{A_MODEL} ... wrapped': its weights lack 'lm_head.weight' and ... its weights have 'module.transformer. ... "
        "for which the model has no place; "
        "save the model without the wrapper that put 'module.' before every name",
    ),
    "a judge whose head has another name": (
        f"{NEW} --reward.model headless",
        f"{A_JUDGE} ... headless': its weights lack 'score.weight'; its weights have 'value_head.weight', for which "
        "the model has no place",
    ),
    "fewer embeddings than tokens": (
        f"{OLD} small",
        "model.path: must have at least as many embeddings as its tokenizer has tokens, got 8 and 23 in ",
    ),
    "no prompts": (
        f"{OLD} good --task mine:Empty",
        "task: prompts('train') of 'walks' must give at least one PromptText, got none",
    ),
    "no held-out prompts": (
        f"{OLD} good --task mine:Half",
        "task: prompts('heldout') of 'walks' must give at least one PromptText, got none",
    ),
    "prompts that raise": (
        f"{OLD} good --task mine:Torn",
        f"task: prompts('train') of 'walks' must give a list of PromptText, {RAISED} (mine.py, line ",
    ),
    "prompts that are none": (
        f"{OLD} good --task mine:Strings",
        "task: prompts('train') of 'walks' must give a list of PromptText, got a str as number 0",
    ),
    "a prompt without text": (f"{OLD} good --task mine:Null", "task: prompt 0 must be text, got a NoneType"),
    "metadata that is no JSON": (
        f"{OLD} good --task mine:Sets",
        "task: prompt 0 must have metadata of JSON values only, got {'seen': {1}}",
    ),
    "an empty prompt": (f"{OLD} good --task mine:Blank", "task: prompt 0 must have at least 1 token, got 0; remove it"),
    "a prompt that is too long": (
        f"{OLD} good --task mine:Long",
        "batch.max_prompt_tokens: prompt 1 must have at most 1 tokens, got 30; raise the limit or shorten",
    ),
    "a prompt longer than the context": (
        f"{OLD} good --task mine:Long --batch.max-prompt-tokens 99",
        "sampling.max_new_tokens: prompt 1 must leave room for 9 new tokens in the model's context of 16, got 30 "
        "prompt tokens; shorten the prompt",
    ),
    "a run folder below a file": (
        f"{NEW} --run-dir mine.py/run",
        "--run-dir: must be a folder that can be written, got ... mine.py/run: Not a directory",
    ),
    "a file in the place of the run folder": (
        f"{NEW} --run-dir mine.py",
        "--run-dir: must be a folder that can be written, got ... mine.py: Not a directory",
    ),
    "a run folder with something in it": (
        f"{NEW} --run-dir good",
        "--run-dir: must be new or empty, or the folder of a run, got ... good; choose another, nothing in it was "
        "touched",
    ),
    "resuming a folder that is no run": (
        "resume good",
        "RUN_DIR: must be the folder of a run, got good, which has no config.toml; `raylign run RECIPE` makes one",
    ),
    "the ledger of a folder that is no run": (
        "ledger good",
        "RUN_DIR: must be the folder of a run, got good, which has no config.toml",
    ),
    "no prompts for a new model": (
        f"{NEW} --task mine:Empty",
        "task: prompts('train') of 'walks' must give at least one PromptText, got none",
    ),
    "no demonstrations": (
        f"{NEW} --task mine:Mute",
        "task: demonstrations('train') of 'walks' must give at least one Demonstration, got none",
    ),
    "no judge's folder": (f"{OLD} good --reward.model ./missing", f"{A_JUDGE}'./missing': there is no such folder"),
    "an empty judge's folder": (f"{OLD} good --reward.model empty", f"{A_JUDGE} ... empty': it has no config.json"),
    "a judge with torn weights": (
        f"{NEW} --reward.model torn",
        f"{A_JUDGE} ... torn': model.safetensors is not whole ( ... ); copy it again",
    ),
    "a critic of other words": (
        f"{OLD} good --reward.model foreign --critic.start reward",
        "critic.start: must have the words of the policy, ... good', got ... foreign' with others; choose a model that "
        "was trained from the same one",
    ),
    "a judge of two minds": (
        f"{NEW} --reward.model two",
        "reward.model: must have one output, got 2 labels in ... two' (0 LABEL_0, 1 LABEL_1); choose one by "
        "reward.label",
    ),
}


def refused(said: Said, message: str, code: int = 2) -> None:
    """It is told on one screen, by the right words in this order, after no more than what was set out to do, and Ray
    was not even imported.
    """
    assert said.code == code, said
    assert all(line.startswith("raylign ") or line.endswith(" ...") for line in said.out.splitlines()), said.out
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
def test_what_files_and_the_user_s_code_tell_is_refused_before_ray_starts(
    arguments: str, message: str, user: Path
) -> None:
    command, *rest = arguments.split()
    if command == "train":
        rest = [*rest[:1], "--run-dir", "never", *NOWHERE, *rest[1:]]
    before = sorted(user.rglob("*"))
    refused(raylign_warm(command, *rest, cwd=user), message)
    assert [path for path in sorted(user.rglob("*")) if "__pycache__" not in str(path)] == [
        path for path in before if "__pycache__" not in str(path)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [row for name, row in NEXT.items() if row[0].startswith("train") and name != "no model of that name"],
    ids=lambda text: str(text)[:40],
)
def test_a_plan_refuses_what_a_run_refuses_in_the_same_words(
    arguments: str, message: str, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of the hub alone is none of a plan's business."""
    monkeypatch.chdir(user)
    monkeypatch.syspath_prepend(user)
    planned = parse(["plan", *arguments.split()[1:]])
    with pytest.raises(ValueError, match=r"^[\w.-]+: ") as caught:
        show(planned.config, quiet(), planned.run_dir)
    assert_told(str(caught.value), message.removeprefix("raylign: "))


def test_a_plan_neither_waits_for_the_hub_nor_blames_it(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user)
    out = io.StringIO()
    show(
        parse(["plan", *OLD.split()[1:], "missing", "--reward.model", "lost/judge"]).config,
        Console(file=out, width=200),
    )
    assert (
        "a run downloads the model 'missing' from the Hugging Face hub, unless model.path names its folder"
        in out.getvalue()
    )
    assert (
        "a run downloads the model 'lost/judge' from the Hugging Face hub, unless reward.model names its folder"
        in out.getvalue()
    )
    assert "estimate: none, since model.path would have to be fetched first" in out.getvalue()


def test_gpus_that_are_not_there_are_told_before_anything_starts(user: Path) -> None:
    for command in ("train", "plan"):
        said = raylign_warm(command, "walks", "--policy.gpus", "1", "--run-dir", "never", cwd=user)
        refused(
            said,
            "raylign: policy.gpus: must be at most the 0 GPUs of this machine, got 1 in all; lower it, or join a "
            "cluster by cluster.address",
        )
    said = raylign_warm("plan", "walks", "--finetune.learner.gpus", "1", "--finetune.learner.ranks", "3", cwd=user)
    refused(said, "raylign: finetune.learner.gpus: must be at most the 0 GPUs of this machine, got 3 in all")
    assert not (user / "never").exists()


def test_a_read_only_disk_is_told(disk: Callable[..., Path], user: Path) -> None:
    folder = disk("1m", "ro")
    said = raylign_warm("train", "walks", "--run-dir", str(folder / "run"), *NOWHERE, cwd=user)
    refused(said, f"--run-dir: must be a folder that can be written, got {folder}/run: Read-only file system")


# A run that was begun already.


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run whose cluster is nowhere, so that going on with it would end there; nothing but its folder was made."""
    cluster = ClusterConfig(address=NOWHERE[1], start_timeout_s=1, cpus_per_bundle=1)
    with new_run(tmp_path / "run", load(recipe_path("walks")).model_copy(update={"cluster": cluster})) as folder:
        return folder.path


def test_a_run_goes_on_with_its_own_settings_only(begun: Path, tmp_path: Path) -> None:
    differ = "raylign: the settings must be those that the run was begun with, but they differ: ... "
    remedy = " ... Put config.toml back as it was, allow what may change, or begin a new run with `raylign run`."
    changed = raylign_warm("resume", str(begun), "--steps", "50", "--batch.prompts", "7", cwd=tmp_path)
    steps = "steps: 40 -> 50   (allowed)"
    refused(changed, f"{differ}{steps} ... batch.prompts: 100 -> 7   not in a run that has begun{remedy}")
    insisted = raylign_warm(
        "resume", str(begun), "--batch.prompts", "7", "--allow-change", "batch.prompts", cwd=tmp_path
    )
    refused(insisted, f"{differ}batch.prompts: 100 -> 7   not in a run that has begun{remedy}")
    allowed = raylign_warm("resume", str(begun), "--steps", "50", cwd=tmp_path)
    assert (
        "changed: steps: 40 -> 50, which makes the learning-rate schedules end at that step from now on" in allowed.out
    )
    assert allowed.code == 1 and "driver failed during 'connecting to the Ray cluster" in allowed.err, (
        "it went on, as far as it could"
    )


def test_fewer_steps_than_are_done_are_refused(begun: Path, tmp_path: Path) -> None:
    """Whether the run has finished or not, resumed or submitted again; and what is finished cannot be extended without
    a commit.
    """
    config = load(begun / "config.toml")
    chain = Chain(
        config, begun, data_checksums(config, config.reward, load_task(config.task, config.data, config.model.path))
    )
    chain.begin("rl")
    with RunFolder.open(begun) as folder:
        Checkpoints(folder, keep=2).write(DriverState(step=14, kl_coef=0.0), {})
    fewer = (
        "steps: must be >= 14, which this run has done, got 10; for a shorter run, begin a new one in another --run-dir"
    )
    refused(raylign_warm("resume", str(begun), "--steps", "10", cwd=tmp_path), fewer)
    refused(
        raylign_warm("run", str(begun / "config.toml"), "--steps", "10", "--run-dir", str(begun), cwd=tmp_path), fewer
    )
    chain.finish("rl", {}, 1.0)
    refused(
        raylign_warm("resume", str(begun), "--steps", "39", cwd=tmp_path),
        "steps: must be >= 40, which this run has done, got 39",
    )
    shutil.rmtree(begun / "checkpoints")
    lost = (
        "steps: must be 40, which this run has done, got 41; to go on it needs a commit, and none is left in "
        "checkpoints/"
    )
    refused(raylign_warm("resume", str(begun), "--steps", "41", cwd=tmp_path), lost)
    assert len(read_history(begun)) == 1 and load(begun / "config.toml").steps == 40, "nothing was begun"


@pytest.mark.slow
def test_other_data_than_the_run_was_begun_with_are_refused(user: Path, tmp_path: Path) -> None:
    """A model's file that changes no token may change; one that does is named, and may be allowed."""
    shutil.copytree(user / "good", tmp_path / "model")
    changes = {"model": ModelConfig(path=str(tmp_path / "model")), "finetune": FinetuneConfig(epochs=0)}
    cluster = ClusterConfig(address=NOWHERE[1], start_timeout_s=1, cpus_per_bundle=1)
    config = load(recipe_path("walks")).model_copy(update={"cluster": cluster} | changes)
    data = data_checksums(config, config.reward, load_task(config.task, config.data, config.model.path))
    with RunFolder.take(tmp_path / "run") as folder:
        folder.begin(config, from_step=0, data=data)
        save(config, folder.path / "config.toml")
    Chain(config, tmp_path / "run", data).begin("rl")
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text('{"eos_token_id": 0, "temperature": 0.5}')
    said = raylign_warm("resume", str(tmp_path / "run"), cwd=tmp_path)
    assert said.code == 1 and "connecting to the Ray cluster" in said.err, "it went on, as far as it could"
    assert (
        "generation_config.json of" in said.out
        and "is exported as it is, though transformers would not write it: `temperature`" in said.out
    )
    settings.write_text('{"eos_token_id": [0, 3]}')
    differ = (
        "data and models must hold what they held when the run was last started, but they differ: ... model ends: [0] "
        "-> [0, 3] ... --allow-change model"
    )
    refused(raylign_warm("resume", str(tmp_path / "run"), cwd=tmp_path), differ)
    allowed = raylign_warm("resume", str(tmp_path / "run"), "--allow-change", "model", cwd=tmp_path)
    assert allowed.code == 1 and "changed: model ends: [0] -> [0, 3]" in allowed.out
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    refused(
        raylign_warm("resume", str(tmp_path / "run"), cwd=tmp_path), "model.path: must be ... there is no such folder"
    )
    moved = raylign_warm("resume", str(tmp_path / "run"), "--model.path", "elsewhere", cwd=tmp_path)
    paths = f"changed: model.path: '{tmp_path}/model' -> '{tmp_path}/elsewhere', which holds the same"
    assert moved.code == 1 and paths in moved.out
    assert "changed:" not in raylign_warm("resume", str(tmp_path / "run"), cwd=tmp_path).out
    other = (
        "the settings must be those that the run was begun with, but they differ: ... model.path: ... elsewhere' -> "
        "... nan'   not in a run that has begun, unless it holds the same"
    )
    refused(raylign_warm("resume", str(tmp_path / "run"), "--model.path", str(user / "nan"), cwd=tmp_path), other)
    assert "superseded" not in {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_in_use_is_left_alone(begun: Path, tmp_path: Path) -> None:
    with RunFolder.open(begun):
        refused(
            raylign_warm("resume", str(begun), cwd=tmp_path),
            f"RUN_DIR: must not be in use, but process {os.getpid()} on ... is at work in {begun}; wait until it ends",
        )
    assert len(read_history(begun)) == 1


def test_a_finished_run_says_so(begun: Path, tmp_path: Path) -> None:
    config = load(begun / "config.toml")
    chain = Chain(
        config, begun, data_checksums(config, config.reward, load_task(config.task, config.data, config.model.path))
    )
    for stage in chain.stages:
        chain.begin(stage)
        chain.finish(stage, {}, 1.0)
    said = raylign_warm("resume", str(begun), cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith(f"\nthis run is finished: sft, rl, evaluate; everything is in {begun}\n")
    assert "ray" not in said.imported


@pytest.mark.parametrize("command", [["resume"], ["ledger"]], ids=" ".join)
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "history.json",
            '[{"number": 1',
            "RUN_DIR: its history.json must be as a run writes it, got ... history.json: ",
        ),
        (
            "history.json",
            None,
            "RUN_DIR: must be the folder of a run, got ... which has no history.json; `raylign run RECIPE` makes one",
        ),
        ("config.toml", "steps = [", "config.toml: must be TOML: "),
    ],
    ids=["torn history", "no history", "torn recipe"],
)
def test_a_damaged_run_folder_is_told(
    command: list[str],
    file: str,
    text: str | None,
    message: str,
    begun: Path,
    tmp_path: Path,
) -> None:
    (begun / file).unlink()
    if text is not None:
        (begun / file).write_text(text)
    refused(raylign_warm(*command, str(begun), cwd=tmp_path), message)


def test_a_step_that_was_not_recorded_cannot_be_replayed(begun: Path, tmp_path: Path) -> None:
    refused(
        raylign_warm("replay", str(begun), "--step", "3", cwd=tmp_path),
        "--step: must be a step that the run recorded (none), got 3",
    )
    (begun / "metrics.jsonl").write_text('{"step": 0, "version": 1, "kl/coef": 0.0}\n')
    refused(
        raylign_warm("replay", str(begun), "--step", "3", cwd=tmp_path),
        "--step: must be a step that the run recorded (0 to 0), got 3",
    )
    refused(
        raylign_warm("replay", str(begun), "--step", "0", cwd=tmp_path),
        "--step: must be one whose experience ... step=0/experience.parquet is missing",
    )
    refused(raylign_warm("replay", str(begun), cwd=tmp_path), "the following arguments are required: --step")


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
            case "e":
                rewards[row] = "good"
            case "f":
                sys.exit("bye")
            case "g":
                time.sleep(60)
    return rewards


def raising(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    raise KeyError("no such word")


def one_for_all(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [1.0]


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
    # what no recipe can ask for, as a shortcut
    return TrainingConfig(max_grad_norm=0).model_copy(update={"learning_rate": 1e30})


def imitation(learner: TrainingConfig | None = None) -> dict[str, Any]:
    return {
        "finetune": FinetuneConfig(epochs=1, learner=learner or TrainingConfig(learning_rate=1e-3, micro_batch_size=64))
    }


WALKER = {"model": ModelConfig(layers=1, width=16, heads=2, context=16)}
FAILS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "a reward that always raises": (
        lambda _: {"reward": RewardConfig(function=f"{HERE}:raising")},
        "reward failed during 'scoring': ... of 20 samples are quarantined, more than reward.max_failed = 0.1 allows; "
        "sample ... : error: "
        f"KeyError: 'no such word' ({HERE}.py, line ... ). Mend the reward function, or raise reward.max_failed",
    ),
    "a reward of the wrong length": (
        lambda _: {"reward": RewardConfig(function=f"{HERE}:one_for_all")},
        f"reward[0] failed during 'scoring chunk 0': reward.function: '{HERE}:one_for_all' must return one number a "
        "response, "
        "got 1 value for 8 responses; return a list as long as `responses`. Logs: ... reward-0.log, ... driver.log",
    ),
    "weights that are no numbers": (
        lambda user: {"model": ModelConfig(path=str(user / "nan"))},
        "rollout[0] failed during 'generating chunk 0': ... FloatingPointError: logits of sample ... are not finite "
        "... rollout-0.log",
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
        "driver failed during 'tokenise demonstrations': "
        "batch.max_prompt_tokens: prompt 0 must have at most 1 tokens, got 2; raise the limit or shorten the prompt.",
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
    changes: Callable[[Path], dict[str, Any]],
    message: str,
    user: Path,
    ray_session: Session,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert_told(failure(recipe(user, **changes(user)), tmp_path / "run", capfd), message)
    assert "Traceback" in (tmp_path / "run" / "log" / "driver.log").read_text()


@pytest.mark.slow
def test_samples_that_fail_are_quarantined_each_with_its_reason(
    user: Path, ray_session: Session, tmp_path: Path
) -> None:
    reward = RewardConfig(function=f"{HERE}:spoiled", timeout_s=0.5, max_failed=0.9)
    run_stages(recipe(user, reward=reward, evaluation=EvaluationConfig(prompts=20)), tmp_path / "run", quiet())
    commit = newest_commit(Folder(tmp_path / "run" / "checkpoints"), read_history(tmp_path / "run"))
    assert commit is not None
    quarantined = commit.state.ledger.quarantined
    for reason in (
        "error: KeyError: 'no such word' (",
        "error: ValueError: must return finite numbers, got nan",
        "error: ValueError: could not convert string to float: 'good'",
        "error: SystemExit: bye (",
        "timeout: took longer than reward.timeout_s = 0.5 s",
    ):
        assert any(why.startswith(reason) for why in quarantined.values()), (reason, quarantined)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["ledger/quarantined"] == len(quarantined)
    assert metrics["ledger/trained"] == 20
    assert metrics["ledger/issued"] == sum(
        metrics[f"ledger/{name}"] for name in ("trained", "filtered", "quarantined", "in_flight")
    )


# A disk that is full.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """disk("3m"): a filesystem of that size; called again, the same one with another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: str, *options: str) -> Path:
        given = ",".join([f"size={size}", *options, *(["remount"] if folder.is_mount() else [])])
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", given, "tmpfs", str(folder)], capture_output=True, text=True
        )
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
def test_a_disk_that_is_full_at_a_commit_loses_nothing(
    user: Path, ray_session: Session, disk: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Two commits fit, a third does not; with more room the run goes on from the second and ends well."""
    commit = 3 * (user / "good" / "model.safetensors").stat().st_size  # weights and two moments
    folder = disk(str(2 * commit + 3 * commit // 4))  # and the logs, and the experience of three steps
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
    user: Path,
    ray_session: Session,
    disk: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
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
