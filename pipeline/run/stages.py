"""The stages of a run, and the inputs of each stage.

sft --finetuned/--> reward --reward-model/--> rl --policy/--> evaluate --report.md
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.config import RewardConfig
from cluster.faults import Fault, RunError
from cluster.placement import place
from cluster.runtime import Runtime
from cluster.session import Session
from cluster.stopping import StopRequest
from pipeline.config.loop_config import LoopConfig
from pipeline.config.run_config import RunConfig
from pipeline.encoding.prompts import RunPrompts, run_prompts
from pipeline.environments.served import EnvironmentSource
from pipeline.evaluation.evaluate import evaluate, judges_of, judges_of_conversations
from pipeline.evaluation.results import Evaluation
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.folder.manifests import Chain, StageName
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.commits import Commit
from pipeline.loop.reinforce import ReinforceInputs, reinforce
from pipeline.loop.wiring import check_critic
from pipeline.observe.progress import Progress
from pipeline.plan.places import comparers
from pipeline.plan.preflight import rule_of
from pipeline.preparation.finetune import finetune
from pipeline.preparation.manager_start import imitate_options
from pipeline.preparation.reward_model import train_reward_model
from pipeline.preparation.sampled_comparisons import (
    ComparisonCounts,
    ComparisonSettings,
    make_comparisons,
    read_comparisons,
)
from pipeline.preparation.site import TrainingSite
from pipeline.report.card import write_card
from pipeline.report.markdown import write
from pipeline.run.card import card_facts
from pipeline.tasks.task import Task

log = logging.getLogger(__name__)

WITH_OPTIONS = "start-with-options"  # in the run folder: the starting model with control tokens of the options


@dataclass(kw_only=True)
class Run:
    """One start of a run: its inputs, and the results of its stages so far."""

    config: RunConfig
    task: Task
    chain: Chain
    folder: RunFolder
    commit: Commit | None
    known: RunPrompts | None  # prompts in the model's tokens; None until the model is there
    progress: Progress
    stop: StopRequest
    taken_up: set[StageName] = field(default_factory=set)  # stages that an earlier start began and this one continues
    results: dict[StageName, dict[str, Any]] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    @property
    def run_dir(self) -> Path:
        return self.folder.path

    @property
    def start(self) -> str:
        """The starting model of reinforcement learning, as folder or hub name: the fine-tuned one if there is one."""
        return str(self.run_dir / "finetuned") if self.config.finetune.epochs else self.config.model.path

    def policy_start(self) -> str:
        """The starting model of the policy: `start`, with a control token for each option of the manager."""
        options = self.config.manager.options
        if not options:
            return self.start
        folder = self.run_dir / WITH_OPTIONS
        if not (folder / "config.json").is_file():
            from actors.models.option_tokens import add_option_tokens

            whole = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(whole, ignore_errors=True)
            add_option_tokens(self.start, whole, options)
            if self.config.manager.start == "demonstrations":
                imitate_options(str(whole), self.task, options)
            shutil.rmtree(folder, ignore_errors=True)
            whole.rename(folder)
        return str(folder)

    @property
    def prompts(self) -> RunPrompts:
        if self.known is None:
            self.known = run_prompts(self.task, self.start, self.config.batch, self.config.sampling, self.config.seed)
        return self.known


def reward_of(config: RunConfig, task: Task, run_dir: Path) -> RewardConfig:
    """The reward of reinforcement learning: this run's reward model, else the recipe's reward model, else the rule.

    Conversations are rewarded by their environment, and only by what the recipe names besides.
    """
    if config.reward_model.epochs:
        return config.reward.model_copy(update={"function": "", "model": str(run_dir / "reward-model")})
    if config.reward.model or config.environment.name:
        return config.reward
    return config.reward.model_copy(update={"function": rule_of(config, task)})


def carry_out(stage: StageName, run: Run, session: Session) -> None:
    """Do a stage, unless it is done already, and note its result in the run."""
    done = run.chain.finished(stage)
    if done is None:
        if run.chain.manifest(stage) is not None and not run.chain.changed(stage):
            run.taken_up.add(stage)
        why = run.chain.begin(stage)
        if why:
            run.progress.remark(f"{stage} is done again: {why}")
        run.stop.check()
        started = time.monotonic()
        result = _with_lost_data(stage, run, session)
        done = run.chain.finish(stage, result, time.monotonic() - started)
        if stage in ("rl", "evaluate"):
            write_card(card_facts(run.config, run.task.reward), run.evaluation, run.run_dir / "policy")
        run.folder.copy()
        log.info("stage %s is done in %.1f s: %s", stage, time.monotonic() - started, json.dumps(result))
    run.results[stage] = done.result


def _with_lost_data(stage: StageName, run: Run, session: Session) -> dict[str, Any]:
    """Carry out a stage; do it again when a node took data of it along that nobody can make alone.

    Reinforcement learning goes back to a commit instead, and fine-tuning to a checkpoint.
    """
    for attempt in itertools.count(1):
        try:
            return _STAGES[stage](run, session)
        except RunError as error:
            if (
                (stage != "evaluate" and stage != "reward")
                or error.fault is not Fault.INPUT_LOST
                or attempt == _ATTEMPTS
            ):
                raise
            run.progress.remark(f"{stage}: a node is gone, and data with it ({error.who}, {error.phase}); begun again")
    raise AssertionError


def _sft(run: Run, session: Session) -> dict[str, Any]:
    check = partial(check_new_model, run.config, run.task)
    return _told(finetune(run.config, run.config.seed, _site(run, session), check))


def check_new_model(config: LoopConfig, task: Task, model: str) -> None:
    """Raises ValueError where reinforcement learning cannot begin from a model that did not exist before this run."""
    check_critic(config, model)
    run_prompts(task, model, config.batch, config.sampling, config.seed)


def _reward(run: Run, session: Session) -> dict[str, Any]:
    """Train the reward model on the task's comparisons, or on machine-made ones; every report calls the latter so."""
    config, run_dir = run.config, run.run_dir
    if config.reward_model.pairs == "task":
        return _told(train_reward_model(config, config.seed, _site(run, session)))
    path, rule = run_dir / "comparisons.parquet", rule_of(config, run.task)
    if not path.is_file():
        run.progress.stage("compare sampled replies", 1)
        made = _sampled(run, session, path)
        run.progress.remark(
            f"{made.comparisons} machine-made comparisons: of the replies sampled to {made.prompts} prompts, {rule} "
            "says which is better"
        )
        if made.failed:
            run.progress.remark(f"{made.failed} replies got no score from {rule} and are left out of the comparisons")
    source = f"machine-made: the fine-tuned model's replies, compared by {rule}"
    return _told(train_reward_model(config, config.seed, _site(run, session), read_comparisons(path), source))


def _site(run: Run, session: Session) -> TrainingSite:
    return TrainingSite(
        session=session,
        cluster=run.config.cluster,
        run_dir=run.run_dir,
        progress=run.progress,
        copy=run.folder.copy,
    )


def _sampled(run: Run, session: Session, path: Path) -> ComparisonCounts:
    config = run.config
    placed = session.place(place(config.cluster, comparers(config)))
    runtime = Runtime.of(session, placed, config.cluster)
    settings = ComparisonSettings(
        rollout=config.rollout,
        sampling=config.sampling,
        reward=RewardConfig(function=rule_of(config, run.task), timeout_s=config.reward.timeout_s),
        samples=config.reward_model.samples,
        seed=config.seed,
    )
    try:
        return make_comparisons(settings, runtime, run.start, run.prompts, path, run.progress.remark)
    finally:
        placed.remove()


def _rl(run: Run, session: Session) -> dict[str, Any]:
    config, commit = run.config, run.commit
    # the commit was moved aside, together with the stage that it belonged to
    if commit is not None and not (run.run_dir / "checkpoints" / commit.name).is_dir():
        commit = None
    if "rl" in run.taken_up:
        run.progress.remark(
            f"resumed from {f'commit {commit.name}' if commit else 'the beginning, since there is no commit'}"
        )
    reward = reward_of(config, run.task, run.run_dir)
    run.progress.stage("tokenise prompts", 0)
    prompts = run.prompts
    inputs = ReinforceInputs(
        model=run.policy_start(),
        reward=reward,
        environment=EnvironmentSource.of(config.environment, run.task, config.rollout, config.sampling),
        prompts=prompts,
        commit=commit,
    )
    return _told(reinforce(config, session, run.folder, run.progress, inputs, run.stop))


def _evaluate(run: Run, session: Session) -> dict[str, Any]:
    """Evaluate the policy against its starting model, by the reward that it was trained on and by the rule."""
    config, run_dir = run.config, run.run_dir
    reward = reward_of(config, run.task, run_dir)
    is_talk = bool(config.environment.name)
    judges = judges_of_conversations(reward) if is_talk else judges_of(reward, rule_of(config, run.task))
    settings = EvaluationSettings.of(run.task, config.evaluation, config)
    found = evaluate(
        settings,
        session,
        run_dir,
        run.progress,
        policy=str(run_dir / "policy"),
        baseline=run.policy_start(),
        judges=judges,
    )
    write(found, run_dir, run_dir)
    run.evaluation = found
    return {"gain": {name: asdict(judged.gain) for name, judged in found.judges.items()}}


_ATTEMPTS = 3  # at a stage whose data nodes took along
_STAGES: dict[StageName, Callable[[Run, Session], dict[str, Any]]] = {
    "sft": _sft,
    "reward": _reward,
    "rl": _rl,
    "evaluate": _evaluate,
}


def _told(result: Any) -> dict[str, Any]:
    """A stage's result as JSON values, without its paths, since the run folder may be moved."""
    return {name: value for name, value in asdict(result).items() if not isinstance(value, Path)}
