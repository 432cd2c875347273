"""The checks of `plan`, `run` and `evaluate` before anything starts: the user's code, models, data and places.

    recipe --preflight--> task, prompts in the model's tokens | ValueError in one line

`run` and `evaluate` ask the Hugging Face hub here, once and with a short deadline, for everything that they need from
it. `plan` does not ask the hub; it says what it could not check. Left out: faults that only a run can find, such as
weights that are NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from actors.config import RewardConfig
from actors.hub import is_path, offline
from actors.manager.option_head import load_head
from actors.reward.worker import load_function
from cluster.session import cluster_address
from cluster.signals import load
from pipeline.algorithms.probe import check_learns
from pipeline.config.recipe import absolute
from pipeline.config.run_config import RunConfig
from pipeline.data.registry import FILES, load_task
from pipeline.data.sources import absolute as absolute_sources
from pipeline.data.sources import find, sources_of
from pipeline.encoding.prompts import RunPrompts, check_data, run_prompts, tokenizer_of
from pipeline.environments.model_partner import PartnerSpec
from pipeline.environments.registry import load_environment
from pipeline.environments.served import EnvironmentSource, check_environment
from pipeline.evaluation.evaluate import (
    ask,
    check_judges,
    check_questions,
    judges_of,
    judges_of_conversations,
)
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.folder.manifests import StageName, stages_of
from pipeline.loop.wiring import check_critic
from pipeline.plan.comparison import Comparison
from pipeline.plan.dtypes import settle
from pipeline.plan.hub import check_hub, not_here, on_hub
from pipeline.plan.places import check_places, cpus_per_bundle, with_cpus
from pipeline.tasks.task import Task, prompts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightResult:
    """A recipe that has passed the checks.

    task: without the chat template, if a plan could not read the model. prompts: in the model's tokens; None if there
    is no model yet, or if a plan could not read the model or the data. unseen: setting -> name on the hub that a plan
    did not check.
    """

    task: Task
    prompts: RunPrompts | None
    unseen: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    """Lines for the user about the models that the run will write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonPreflight:
    """The checked inputs of a comparison of two models. judges: name -> configuration, the reward model first."""

    task: Task
    judges: Mapping[str, RewardConfig]


def preflight(config: RunConfig, *, fetch: bool = True) -> PreflightResult:
    """Check a recipe before anything starts. Raises ValueError for what cannot work.

    fetch: whether to ask the hub for names that are not local; if False, they are not checked, and `unseen` lists them.
    """
    task = load_task(config.task, config.data, config.model.path)
    if talk := config.environment.name:
        partner = config.environment.partner
        load_environment(talk, PartnerSpec(path=partner) if partner else None)
    if config.manager.check:
        load_function(config.manager.check, field="manager.check")
    load("torch", "transformers")
    if config.manager.options and config.manager.start == "demonstrations":
        from pipeline.preparation.manager_start import check_options_shown

        check_options_shown(task, config.manager.options)
    check_learns(
        config.algorithm,
        prompts=config.batch.prompts,
        group_size=config.batch.group_size,
        max_new_tokens=config.sampling.max_new_tokens,
    )
    rule = rule_of(config, task)
    if config.reward_model.epochs and config.reward_model.pairs == "sampled" and not rule:
        raise ValueError(
            'reward_model.pairs: must be "task" when no rule can compare replies, got "sampled" for task '
            f"{task.name!r}; set reward.function"
        )
    judges = judges_of_conversations(config.reward) if config.environment.name else judges_of(config.reward, rule)
    # else the run still has to train its only judge
    is_judged = bool(rule or config.environment.name) or not config.reward_model.epochs
    with _reach(config, stages_of(config), on_hub(config), fetch=fetch) as unseen:
        if is_judged:
            _check_judges(judges, unseen)
        return _with_data(config, task, unseen)


def preflight_comparison(config: RunConfig, comparison: Comparison) -> ComparisonPreflight:
    """Check a comparison of two models before anything starts. Raises ValueError for what cannot work."""
    task = load_task(config.task, config.data, config.model.path)
    load("torch", "transformers")
    reward = config.reward.model_copy(update={"model": comparison.reward_model})
    judges = judges_of_conversations(reward) if config.environment.name else judges_of(reward, task.reward)
    named = {**comparison.models, "environment.partner": config.environment.partner}
    remote = {option: name for option, name in named.items() if name and not is_path(name)}
    with _reach(config, ("evaluate",), remote):
        _check_judges(judges)
        check_models(comparison)
        check_heads(config, comparison)
        _check_environment(config, task)
        settings = EvaluationSettings.of(task, config.evaluation, config)
        ask(settings, comparison.baseline, comparison.policy)  # read again later, when it can no longer fail
    return ComparisonPreflight(task=task, judges=judges)


@contextmanager
def _reach(
    config: RunConfig, stages: Sequence[StageName], remote: Mapping[str, str], *, fetch: bool = True
) -> Iterator[dict[str, str]]:
    """Check that the stages have their places and the hub has the remote names; yields the names that are not fetched.

    remote: setting or option -> name on the hub. fetch: whether to ask the hub; if False, nothing inside the block asks
    it either. Raises ValueError when a place or a name is missing.
    """
    check_places(config, stages)
    if fetch:
        check_hub(remote)
        yield {}
        return
    with offline() if remote else nullcontext():
        yield not_here(remote)


def _check_judges(judges: Mapping[str, RewardConfig], unseen: Collection[str] = ()) -> None:
    """Check the judges, except a reward model that a plan did not read.

    Raises ValueError when there is no judge at all, or when a judge cannot work.
    """
    seen = {name: judge for name, judge in judges.items() if not (judge.model and "reward.model" in unseen)}
    if seen or not judges:
        check_judges(seen)


def check_heads(config: RunConfig, comparison: Comparison) -> None:
    """Raises ValueError when a policy that was trained with a manager lacks its head, or has one of other options."""
    from actors.models.causal_lm import width_of

    if options := len(config.manager.options):
        for model in (comparison.policy, comparison.baseline):
            load_head(model, options, width_of(model))


def check_models(comparison: Comparison) -> None:
    """Raises ValueError when a model or its tokenizer cannot be read, or when the two vocabularies differ."""
    policy, baseline = (
        tokenizer_of(path, role).get_vocab()
        for role, path in (("--policy", comparison.policy), ("--baseline", comparison.baseline))
    )
    if policy != baseline:
        raise ValueError(
            f"--policy: must have the tokenizer of --baseline, but those of {comparison.policy!r} and "
            f"{comparison.baseline!r} differ"
        )


def _check_environment(config: RunConfig, task: Task, unseen: Collection[str] = ()) -> None:
    """Check the other side of conversations, except where it is a partner that a plan did not read."""
    partner = config.environment.partner
    if "environment.partner" in unseen:
        return
    if partner:
        tokenizer_of(partner, "environment.partner")
    if environment := EnvironmentSource.of(config.environment, task, config.rollout, config.sampling):
        check_environment(environment, task, prompts_of(task, "train"), config.environment.timeout_s)


def _with_data(config: RunConfig, task: Task, unseen: Mapping[str, str]) -> PreflightResult:
    """Check the model, then the data, so that an error names the one at fault.

    The model comes first because its chat template may lay out the data. Raises ValueError for what cannot work.
    """
    model = config.model.path if "model.path" not in unseen else ""
    if model:
        tokenizer_of(model)
        if "reward.model" not in unseen:
            check_critic(config, model)
    elif config.model.path and config.task == FILES:
        template = config.data.template.model_copy(
            update={"kind": "auto" if config.data.template.kind == "chat" else config.data.template.kind}
        )
        task = load_task(config.task, config.data.model_copy(update={"template": template}))
    if config.task == FILES:
        for kind, source in sources_of(config.data).items():
            if f"data.{kind}" not in unseen:
                find(source, f"data.{kind}")
    if any(key.startswith("data.") for key in unseen):
        return PreflightResult(task=task, prompts=None, unseen=unseen)
    check_data(config, task)
    _check_environment(config, task, unseen)
    if not model:
        return PreflightResult(task=task, prompts=None, unseen=unseen)
    prompts = run_prompts(task, model, config.batch, config.sampling, config.seed)
    check_questions(task, config.evaluation, model, prompts.tokenizer)
    return PreflightResult(task=task, prompts=prompts, unseen=unseen, remarks=tuple(filter(None, _try_exports(config))))


def _try_exports(config: RunConfig) -> Iterator[str]:
    """Try to write the models of the run into a temporary folder; yields lines for the user, which may be empty.

    Raises ValueError when a model cannot be trained or written.
    """
    from actors.models.export import try_export

    with TemporaryDirectory(prefix="raylign-export-") as scratch:
        yield try_export(config.model.path, Path(scratch))
    if config.reward_model.epochs:
        from actors.models.reward_model import check_trainable

        check_trainable(config.model.path)
        with TemporaryDirectory(prefix="raylign-export-") as scratch:
            yield try_export(config.model.path, Path(scratch), classifier=True)


def resolve(config: RunConfig) -> RunConfig:
    """Settle the settings that depend on the machine, so that the saved configuration says what really ran.

    Settings that depend on the nodes of a cluster are settled when the run has joined it.
    """
    config = with_full_paths(settle(config))
    cpus = config.cluster.cpus_per_bundle if cluster_address(config.cluster) else cpus_per_bundle(config)
    return with_cpus(config, cpus)


def with_full_paths(config: RunConfig) -> RunConfig:
    """The recipe with absolute paths of data and models, since workers have other current folders."""
    return config.model_copy(
        update={
            "data": absolute_sources(config.data),
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "reward": config.reward.model_copy(update={"model": absolute(config.reward.model)}),
            "environment": config.environment.model_copy(update={"partner": absolute(config.environment.partner)}),
        }
    )


def unfollowed(config: RunConfig) -> list[str]:
    """Lines for the user about instructions in the models' folders that a run does not follow.

    It reads the starting model, the partner and the reward model; all must have been checked before.
    """
    from actors.models.causal_lm import longest_of
    from actors.models.usage import not_followed, not_followed_of_judge

    uses_template = config.task == FILES and config.data.template.kind in ("auto", "chat")
    lines = (
        not_followed(config.model.path, lays_out="" if uses_template else f"task {config.task!r}")
        if config.model.path
        else []
    )
    lines += not_followed(config.environment.partner) if config.environment.partner else []
    if not config.reward.model:
        return lines
    longest, needed = longest_of(config.reward.model), config.batch.max_prompt_tokens + config.sampling.max_new_tokens
    if longest is not None and longest < needed:
        lines.append(
            f"reward model {config.reward.model}: reads {longest} tokens, prompt and reply have up to {needed}; of a "
            "longer text it sees the end only"
        )
    return lines + not_followed_of_judge(config.reward.model)


def rule_of(config: RunConfig, task: Task) -> str:
    """Import path of the reward function that is the rule; "" if there is none."""
    return config.reward.function or task.reward
