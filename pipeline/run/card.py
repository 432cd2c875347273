"""The facts of a run's model card, gathered from its configuration; `pipeline/report/card.py` gives them words."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING

from actors.hub import is_path
from pipeline.config.recipe import as_toml
from pipeline.data.registry import FILES
from pipeline.data.sources import sources_of
from pipeline.report.card import CardFacts, public

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

_LIBRARIES = ("torch", "transformers", "ray", "deepspeed")


def card_facts(config: RunConfig, rule: str) -> CardFacts:
    """The facts of a run. rule: import path of the task's own reward function; "" if it has none."""
    hub_name = config.model.path if config.model.path and not is_path(config.model.path) else ""
    name = config.algorithm.name
    return CardFacts(
        title=f"{_start(config)[0]}, aligned by {name}",
        base_model=hub_name,
        tags=("raylign", "rlhf", "reinforcement-learning", name),
        data=tuple(_data(config)),
        method=(_start(config)[1], *_prepared(config), *_learned(config, rule)),
        recipe=recipe_of(config),
        versions={
            "raylign": _version("raylign"),
            "Python": platform.python_version(),
            **{library: _version(library) for library in _LIBRARIES},
        },
    )


def recipe_of(config: RunConfig) -> str:
    """TOML with every setting that is not the default, without those of the machine or cluster."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"cluster"})
    if "algorithm" in settings:
        settings["algorithm"] = {"name": config.algorithm.name, **settings["algorithm"]}
    return as_toml(public(settings))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # sources that were shipped, not installed, as with a Ray job
        return "(not installed)"


def _start(config: RunConfig) -> tuple[str, str]:
    """(name of the starting model, a sentence about it)."""
    model = config.model
    if not model.path:
        return (
            "A new GPT-2",
            f"Start: a new GPT-2 of {model.layers} layers, width {model.width}, context {model.context}.",
        )
    name = str(public(model.path))
    return name, f"Start: {name}."


def _data(config: RunConfig) -> list[str]:
    if config.task != FILES:
        return [f"Task `{config.task}`: its prompts" + (", demonstrations" if config.finetune.epochs else "") + "."]
    return [f"{kind}: `{public(source)}`" for kind, source in sources_of(config.data).items()] + [
        f"Held out, by the words of the first turn: {config.data.heldout:.0%} of the conversations."
    ]


def _prepared(config: RunConfig) -> list[str]:
    tune, model = config.finetune, config.reward_model
    lines = [f"Supervised fine-tuning: at most {tune.epochs} passes over the demonstrations."] if tune.epochs else []
    if model.epochs:
        pairs = "of the data" if model.pairs == "task" else "of sampled replies, ranked by a function"
        lines.append(f"Reward model: at most {model.epochs} passes over comparisons {pairs}.")
    return lines


def _learned(config: RunConfig, rule: str) -> list[str]:
    reward, batch = config.reward, config.batch
    judge = (
        "the reward model that was trained"
        if config.reward_model.epochs
        else f"the classifier `{public(reward.model)}`"
        if reward.model
        else f"the function `{reward.function or rule}`"
        if reward.function or (rule and not config.environment.name)
        else ""
    )
    judges = " and ".join(
        filter(None, (f"environment `{config.environment.name}`" * bool(config.environment.name), judge))
    )
    return [
        f"Reinforcement learning: {config.steps} steps of {config.algorithm.name}, each on {batch.prompts} prompts "
        f"with {batch.group_size} samples; seed {config.seed}.",
        f"Reward: {judges}.",
    ]
