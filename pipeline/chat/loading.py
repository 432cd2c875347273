"""What a chat is made of: the models, judges and prompts of a run's folder, checked and loaded into this process.

Left out: weights that are in a commit only. A run that was stopped in the middle of reinforcement learning has no
policy/ yet, so the chat is with its baseline, and says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from actors.config import RewardConfig
from cluster.signals import load
from pipeline.chat.options import ChatOptions
from pipeline.config.run_config import RunConfig
from pipeline.data.registry import load_task
from pipeline.plan.dtypes import settle
from pipeline.plan.preflight import rule_of, with_full_paths

if TYPE_CHECKING:
    from pipeline.chat.chat import Chat, Judge
    from pipeline.chat.side import Side
    from pipeline.environments.served import ServedEnvironment
    from pipeline.tasks.task import Task

BASELINE, POLICY = "baseline", "policy"
_WITH_OPTIONS = "start-with-options"  # the baseline of a run with a manager, which knows the control tokens
_SLOTS = 8  # the fewest that the engine has


def models_of(config: RunConfig, run_dir: Path) -> dict[str, str]:
    """Side -> folder or hub name of its model: the baseline first, then the policy if it is written.

    Raises ValueError when the run has no model yet.
    """
    options = run_dir / _WITH_OPTIONS
    start = options if config.manager.options and options.is_dir() else run_dir / "finetuned"
    found = {BASELINE: str(start) if start.is_dir() else "" if config.finetune.epochs else config.model.path}
    if (run_dir / POLICY).is_dir():
        found[POLICY] = str(run_dir / POLICY)
    found = {side: path for side, path in found.items() if path}
    if not found:
        raise ValueError(
            f"RUN_DIR: must have a model to talk with, finetuned/ or policy/, got {run_dir} with neither; "
            f"`raylign resume {run_dir}` goes on with the run"
        )
    return found


def remark_of(models: dict[str, str], run_dir: Path) -> str:
    """A line for the person if one of the two models is not there; else ""."""
    if POLICY not in models:
        return f"baseline only: {run_dir} has no policy/ yet, which the end of reinforcement learning writes"
    if BASELINE not in models:
        return f"policy only: {run_dir} has no finetuned/"
    return ""


def open_chat(config: RunConfig, run_dir: Path, options: ChatOptions) -> Chat:
    """Load everything. Raises ValueError for what cannot be talked with."""
    models = models_of(config, run_dir)
    config = with_full_paths(settle(config))
    task = load_task(config.task, config.data, config.model.path)
    load("torch", "transformers")
    from actors.models.text import TextCodec
    from pipeline.chat.chat import Chat
    from pipeline.encoding.prompts import heldout_prompts, tokenizer_of

    words = {path: tokenizer_of(path, f"RUN_DIR: {side}").get_vocab() for side, path in models.items()}
    if len({json.dumps(sorted(one.items())) for one in words.values()}) > 1:
        raise ValueError(f"RUN_DIR: its models must have the same tokenizer, but those of {' and '.join(words)} differ")
    sampling = options.sampling(config.sampling)
    tokenizer, stream = heldout_prompts(task, config.batch, sampling, list(models.values()))
    rows = stream.draw(range(len(stream))).table
    prompts = [
        (list(ids), json.loads(text))
        for ids, text in zip(*(rows[c].to_pylist() for c in ("tokens", "metadata")), strict=True)
    ]
    codec = TextCodec(tokenizer)
    return Chat(
        task=task,
        sides=[_side(name, path, config, codec) for name, path in models.items()],
        judges=_judges(config, task, run_dir),
        prompts=prompts,
        environment=_environment(config, task),
        sampling=sampling,
        max_turns=config.environment.max_turns,
        seed=options.seed,
    )


def _side(name: str, path: str, config: RunConfig, codec: object) -> Side:
    from actors.device import assigned_compute
    from actors.engine.torch_engine import TorchEngine
    from actors.manager.option_head import OptionHead, load_head
    from actors.models.causal_lm import width_of
    from actors.models.option_tokens import option_ids
    from actors.models.text import TextCodec
    from pipeline.chat.side import Side

    assert isinstance(codec, TextCodec)
    rollout = config.rollout.model_copy(update={"slots": _SLOTS})
    engine = TorchEngine(path, rollout, assigned_compute(rollout.gpus).device)
    names = config.manager.options
    if not names:
        return Side(name=name, engine=engine, codec=codec)
    head = OptionHead(load_head(path, len(names), width_of(path)))
    control = option_ids(codec.tokenizer, names)
    return Side(name=name, engine=engine, codec=codec, head=head, options=names, control=control)


def _judges(config: RunConfig, task: Task, run_dir: Path) -> list[Judge]:
    """The reward model, if there is one, and the exact rule, if there is one.

    Of a conversation, only what the recipe names besides the environment judges: a task's rule is of single replies.
    """
    from actors.reward.worker import load_reward
    from pipeline.chat.chat import Judge
    from pipeline.evaluation.evaluate import check_judges, judges_of

    own = run_dir / "reward-model"
    reward: RewardConfig = config.reward.model_copy(update={"model": str(own)}) if own.is_dir() else config.reward
    found = judges_of(reward, "" if config.environment.name else rule_of(config, task))
    if found:
        check_judges(found)
    return [Judge(name=name, function=load_reward(judge), config=judge) for name, judge in found.items()]


def _environment(config: RunConfig, task: Task) -> ServedEnvironment | None:
    from pipeline.environments.served import EnvironmentSource

    source = EnvironmentSource.of(config.environment, task, config.rollout, config.sampling)
    return None if source is None else source()
