"""Combinations of settings that cannot work, refused before Ray starts, each naming field, rule, value and remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

from actors.config import MODEL_PARTNER, OPTION_NAME, EnvironmentConfig, ManagerConfig
from cluster.filesystems import check_url
from pipeline.config.errors import NOT_FINITE, shown
from pipeline.config.run_config import RunConfig, leaves
from pipeline.data.config import DataConfig

LARGEST = 1e30  # of a number that is multiplied
LARGEST_COUNT = 10**12  # of what is counted: sums and products of two stay below 63 bits
COLDEST = 0.01
GROUPS = 2**40  # prompts that a run may draw; the ids from there on are an evaluation's


def check(config: RunConfig) -> RunConfig:
    """The configuration, if its fields go together.

    Raises ValueError for a combination that no single field can judge.
    """
    for rule in (
        _number_rules,
        _data_rules,
        _reward_rules,
        _batch_rules,
        _pool_rules,
        _algorithm_rules,
        _sampling_rules,
        _environment_rules,
        _model_rules,
        _learner_rules,
        _storage_rules,
    ):
        rule(config)
    return config


def _storage_rules(config: RunConfig) -> None:
    if config.cluster.storage:
        check_url("cluster.storage", config.cluster.storage)


def _number_rules(config: RunConfig) -> None:
    """Rules of every number, besides those of its field; an unsigned 64-bit seed has its own rule."""
    for key, value in _numbers(config.model_dump()):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}: {NOT_FINITE.format(value)}")
        if isinstance(value, float) and abs(value) > LARGEST:
            raise ValueError(
                f"{key}: must be at most {LARGEST:g} in size, got {value:g}; models compute in float32, which ends not "
                "far above"
            )
        if isinstance(value, int) and value > LARGEST_COUNT and key != "seed":
            raise ValueError(
                f"{key}: must be at most {LARGEST_COUNT:,}, got {shown(value)}; for no limit at all, that many are "
                "enough"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(key, value) of every number in a configuration."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, f"{key}.{name}" if key else name)
    elif isinstance(value, tuple):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _data_rules(config: RunConfig) -> None:
    data, template = config.data, config.data.template
    if config.task != "files":
        if data != DataConfig():
            raise ValueError(
                f"data: must be left out unless task is files, got settings for task {config.task!r}; such a task has "
                "its own data"
            )
        return
    if not (data.comparisons or data.demonstrations or data.prompts):
        raise ValueError(
            "data: must name at least one source when task is files, got none; give data.comparisons, "
            "data.demonstrations or data.prompts"
        )
    named = config.reward.function or config.reward.model or config.environment.name
    if not (named or config.reward_model.epochs):
        raise ValueError(
            "reward: must have a function or a model when task is files, or [reward_model] epochs to train one, or "
            "environment.name, got none; files say nothing of how a new reply is judged"
        )
    if config.finetune.epochs and not (data.comparisons or data.demonstrations):
        raise ValueError(
            "data.demonstrations: must be given to fine-tune, got prompts alone; give it or data.comparisons, or set "
            "finetune.epochs to 0"
        )
    if template.kind == "plain" and data.format in ("transcript", "messages"):
        raise ValueError(
            f"data.template.kind: must be chat or roles for {data.format}, got plain; it has no place for whose turn "
            "it is"
        )
    if template.kind == "chat" and not config.model.path:
        raise ValueError(
            "data.template.kind: must be roles when model.path is empty, got chat; a new model's tokenizer has no chat "
            "template"
        )
    names = [getattr(data.columns, name) for name in type(data.columns).model_fields]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(
            f"data.columns: must be different names, none empty, got {names}; two columns cannot have one name"
        )


def _reward_rules(config: RunConfig) -> None:
    reward, trained = config.reward, config.reward_model
    if reward.function and reward.model:
        raise ValueError(
            f"reward: must have a function or a model, got both ({reward.function!r}, {reward.model!r}); remove one"
        )
    if reward.model and trained.epochs:
        raise ValueError(
            f"reward.model: must be left out when reward_model.epochs is {trained.epochs}, got {reward.model!r}; a run "
            "has one reward model"
        )
    if reward.label >= 0 and not reward.model:
        raise ValueError(
            f"reward.label: must be left out without reward.model, got {reward.label}; it is the number of one of that "
            "model's outputs"
        )
    if trained.epochs and config.task == "files" and trained.pairs == "sampled" and not reward.function:
        raise ValueError(
            "reward.function: must be given when reward_model.pairs is sampled and task is files; it says which "
            "sampled reply is better"
        )
    if trained.epochs and config.task == "files" and trained.pairs == "task" and not config.data.comparisons:
        raise ValueError(
            "data.comparisons: must be given to train a reward model, got none; give it, or sample pairs with "
            "reward_model.pairs and reward.function"
        )


def _batch_rules(config: RunConfig) -> None:
    batch = config.batch
    if config.steps * batch.prompts * batch.max_refills > GROUPS:
        raise ValueError(
            f"steps: must be <= {GROUPS // (batch.prompts * batch.max_refills):,}, got {config.steps}; "
            "with batch.prompts and batch.max_refills it comes to more prompts than have a number"
        )
    if batch.minibatches > batch.samples:
        raise ValueError(
            f"batch.minibatches: must be <= batch.prompts * batch.group_size = {batch.samples}, got "
            f"{batch.minibatches}; lower it or raise batch.prompts"
        )
    if batch.dynamic_sampling and batch.group_size < 2:
        raise ValueError(
            f"batch.group_size: must be >= 2 when batch.dynamic_sampling is true, got {batch.group_size}; one sample "
            "has no variance"
        )
    if config.rollout.chunk_size < batch.group_size:
        raise ValueError(
            f"rollout.chunk_size: must be >= batch.group_size = {batch.group_size}, got {config.rollout.chunk_size}; a "
            "group is never split"
        )


def _pool_rules(config: RunConfig) -> None:
    for name, pool in (("rollout", config.rollout), ("reward", config.reward), ("reference", config.reference)):
        if pool.min_workers > pool.workers:
            raise ValueError(
                f"{name}.min_workers: must be <= {name}.workers = {pool.workers}, got {pool.min_workers}; the run "
                "would wait for workers that it never asks for"
            )


def _algorithm_rules(config: RunConfig) -> None:
    from actors.reward.worker import user_code

    algorithm, group_size = config.algorithm, config.batch.group_size
    if group_size < algorithm.min_group_size:
        raise ValueError(
            f"batch.group_size: must be >= {algorithm.min_group_size} for algorithm {algorithm.name!r}, got "
            f"{group_size}; it compares samples of one prompt"
        )
    with user_code(f"algorithm.name: must have rules that can judge its settings, got {algorithm.name!r}", ValueError):
        algorithm.rules()
    for key, value in algorithm.model_dump(mode="json").items():
        if value is None:
            raise ValueError(
                f"algorithm.{key}: must not be None, which TOML cannot say; give it a type and a default without None"
            )
    if not config.repeats and not config.max_staleness:
        raise ValueError(
            "max_staleness: must be >= 1 for schedule freshest, got 0; with 0 there is one version to sample with, so "
            "leave schedule out"
        )
    if config.max_staleness and not algorithm.corrects_staleness:
        raise ValueError(
            f"max_staleness: must be 0 for algorithm {algorithm.name!r} as it is set, got {config.max_staleness}; "
            "nothing corrects for samples of older weights. Set algorithm.decoupled to true and "
            "algorithm.importance_cap to 2, or take an algorithm with a clipped ratio"
        )
    samples, horizon = config.batch.samples, algorithm.kl_horizon
    if algorithm.kl_target and samples >= 5 * horizon:
        raise ValueError(
            f"algorithm.kl_horizon: must be above batch.prompts * batch.group_size / 5 = {samples / 5:g}, got "
            f"{horizon}; "
            "the controller could take kl_coef to 0 in one step, so raise it or lower batch.prompts"
        )
    overlong, longest = config.shaping.overlong_tokens, config.sampling.max_new_tokens
    if overlong > longest:
        raise ValueError(
            f"shaping.overlong_tokens: must be <= sampling.max_new_tokens = {longest}, got {overlong}; they are the "
            "last ones of a completion, so lower it"
        )


def _sampling_rules(config: RunConfig) -> None:
    sampling = config.sampling
    if sampling.top_k != 0 or sampling.top_p != 1.0:
        raise ValueError(
            f"sampling: top_k must be 0 and top_p 1 in training, got {sampling.top_k} and {sampling.top_p}; "
            "the learner could not recompute the log-probs of a cut-off distribution"
        )
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature: must be > 0 in training, got 0.0; greedy samples carry no gradient")
    if sampling.temperature < COLDEST:
        raise ValueError(
            f"sampling.temperature: must be >= {COLDEST:g} in training, got {sampling.temperature:g}; below, one token "
            "has all the probability, so raise it"
        )
    if "" in sampling.stop:
        raise ValueError(
            f"sampling.stop: must have no empty string, got {list(sampling.stop)}; every reply would end after one "
            "token"
        )


def _environment_rules(config: RunConfig) -> None:
    environment = config.environment
    if not environment.name:
        if environment != EnvironmentConfig():
            raise ValueError(
                "environment.name: must be given with other settings of environment, got none; name an environment, or "
                "remove the section"
            )
        _manager_rules(config)
        return
    _manager_rules(config)
    _partner_rules(config)
    longest_s = environment.timeout_s * environment.max_turns * (1 + environment.attempts)
    if longest_s >= config.cluster.call_timeout_s:
        raise ValueError(
            f"environment.timeout_s: must be below cluster.call_timeout_s / (max_turns * (1 + attempts)) = "
            f"{config.cluster.call_timeout_s * environment.timeout_s / longest_s:g}, got {environment.timeout_s:g}; "
            "slow answers would be taken for a worker that hangs, so lower it or raise cluster.call_timeout_s"
        )
    if config.shaping.overlong_tokens:
        raise ValueError(
            f"shaping.overlong_tokens: must be 0 in conversations, got {config.shaping.overlong_tokens}; "
            "sampling.max_new_tokens limits each turn, not the conversation"
        )


def _partner_rules(config: RunConfig) -> None:
    """Rules of a language model that talks with the policy."""
    name, partner, reward = config.environment.name, config.environment.partner, config.reward
    if name != MODEL_PARTNER:
        if partner and ":" not in name:
            raise ValueError(
                f"environment.partner: must be left out with environment.name = {name!r}, got {partner!r}; it is the "
                f"partner of {MODEL_PARTNER}, or of an environment of your own"
            )
        return
    if not partner:
        raise ValueError(
            f"environment.partner: must be given with environment.name = {name!r}, got none; give the folder or hub "
            "name of a causal language model with its tokenizer"
        )
    if not (reward.function or reward.model or config.reward_model.epochs):
        raise ValueError(
            f"reward: must have a function or a model with environment.name = {name!r}, or [reward_model] epochs to "
            "train one, got none; the partner gives no reward, unless a class of your own does"
        )


def _manager_rules(config: RunConfig) -> None:
    manager, algorithm = config.manager, config.algorithm
    if not manager.options:
        if manager != ManagerConfig():
            raise ValueError(
                "manager.options: must be given with other settings of manager, got none; name the sub-tasks, or "
                "remove the section"
            )
        return
    if not config.environment.name:
        raise ValueError(
            f"environment.name: must be given with manager.options = {list(manager.options)}, got none; a manager "
            "chooses an option for each turn of a conversation"
        )
    if not algorithm.needs_critic:
        raise ValueError(
            f"algorithm.name: must be an algorithm with a critic when there are manager.options, got "
            f"{algorithm.name!r}; the worker's baseline is the critic's value of state and option"
        )
    for number, name in enumerate(manager.options):
        rule = "manager.options: must be different names of letters and digits, joined by '-' or '_'"
        if not re.fullmatch(OPTION_NAME, name):
            raise ValueError(f"{rule}, got {name!r}; rename it")
        if name in manager.options[:number]:
            raise ValueError(f"{rule}, got {name!r} twice; remove one")
    if config.shaping.clip or config.shaping.missing_eos != "keep":
        raise ValueError(
            "shaping: must have clip 0 and missing_eos keep when there are manager.options, got "
            f"{config.shaping.clip:g} and {config.shaping.missing_eos!r}; the manager learns from "
            "the environment's own rewards"
        )
    if manager.check_coef and not manager.check:
        raise ValueError(
            f"manager.check: must be given when manager.check_coef is {manager.check_coef:g}, got none; it says "
            "whether a reply carries out its option"
        )
    _diversity_rules(manager)


def _diversity_rules(manager: ManagerConfig) -> None:
    if manager.diversity_coef and len(manager.options) == 1:
        raise ValueError(
            f"manager.diversity_coef: must be 0 when there is one option, got {manager.diversity_coef:g}; a "
            "discriminator has nothing to tell apart"
        )
    for name, field in ManagerConfig.model_fields.items():
        value = getattr(manager, name)
        if name.startswith("discriminator_") and not manager.diversity_coef and value != field.default:
            raise ValueError(
                f"manager.diversity_coef: must be > 0 when manager.{name} is {value:g}, got 0; there is no "
                "discriminator without it"
            )


def _model_rules(config: RunConfig) -> None:
    model = config.model
    if not model.path:
        if model.width % model.heads:
            near = max(model.width // model.heads, 1) * model.heads
            raise ValueError(
                f"model.width: must be a multiple of model.heads, got {model.width} and {model.heads}; use {near}"
            )
        control = bool(config.manager.options)  # a token before the reply
        needed = config.batch.max_prompt_tokens + config.sampling.max_new_tokens + control
        if needed > model.context:
            raise ValueError(
                f"model.context: must be >= batch.max_prompt_tokens + sampling.max_new_tokens = {needed}, got "
                f"{model.context}; raise it or shorten one of them"
            )
        if config.finetune.epochs == 0:
            raise ValueError(
                "finetune.epochs: must be >= 1 when model.path is empty, got 0; a new model knows no text, so give "
                "model.path or fine-tune first"
            )


def _learner_rules(config: RunConfig) -> None:
    learners = {
        "policy": config.policy,
        "critic": config.critic,
        "finetune.learner": config.finetune.learner,
        "reward_model.learner": config.reward_model.learner,
    }
    for name, learner in learners.items():
        if not all(0 <= beta < 1 for beta in learner.betas):
            raise ValueError(
                f"{name}.betas: must be >= 0 and < 1, got {learner.betas}; they are AdamW's decay rates, such as (0.9, "
                "0.95)"
            )
        if learner.ranks > 1 and learner.gpus not in (0, 1):
            raise ValueError(
                f"{name}.gpus: must be 0 or 1 when there are several ranks, got {learner.gpus:g}; each rank needs a "
                "GPU of its own"
            )
    if config.critic.start == "reward" and not (config.reward.model or config.reward_model.epochs):
        raise ValueError(
            "critic.start: must be 'policy' when there is no reward model, got 'reward'; give reward.model, or train "
            "one with reward_model.epochs"
        )
    for key in leaves(RunConfig):  # of every section that has it, so that a new one cannot be forgotten
        count: Any = reduce(getattr, key.split("."), config) if key.endswith(".gpus") else 0
        if count > 1:
            raise ValueError(
                f"{key}: must be at most 1, got {count:g}; a process computes on one device, so use more ranks or "
                "workers"
            )
        if 0 < count < 0.01:
            raise ValueError(
                f"{key}: must be 0 or at least 0.01, got {count:g}; Ray hands out hundredths of a GPU to a hundred "
                "processes at most"
            )
