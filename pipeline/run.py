"""A whole run, stage by stage: what `run`, `sft`, `reward`, `train`, `quickstart` and `resume` do.

    sft --finetuned/--> reward --reward-model/--> rl --policy/--> evaluate --report.md

Which stages there are, and which of them are done already, is the chain's to say (chain.py); here stands what each is given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from actors.config import RewardConfig
from cluster.events import Pump
from cluster.faults import RunError
from cluster.placement import RoleDemand
from cluster.session import Session
from pipeline.chain import Chain, StageName
from pipeline.changes import check_changes
from pipeline.checkpoint import Checkpoints, Commit
from pipeline.config import RunConfig, absolute, check, save
from pipeline.data.sources import absolute as absolute_sources
from pipeline.evaluation import Evaluation
from pipeline.observe.journal import Journal
from pipeline.observe.progress import Progress
from pipeline.observe.report import write
from pipeline.observe.summary import show
from pipeline.prompts import Asked, asked, check_data, fingerprints
from pipeline.roles import Stage, demands, place
from pipeline.run_folder import RunFolder
from pipeline.stages.data import report_texts, report_tokens
from pipeline.stages.evaluate import check_judges, evaluate, examiners, judges_of
from pipeline.stages.finetune import finetune
from pipeline.stages.preferences import Made, make_comparisons, read_comparisons
from pipeline.stages.reinforce import reinforce
from pipeline.stages.reward_model import train_reward_model
from pipeline.tasks.task import Task, task_of

log = logging.getLogger(__name__)

PACKAGES = ("cluster", "actors", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run leaves behind. stages: what each told of itself. evaluation: None where it was not to be done, or was done before."""

    run_dir: Path
    stages: dict[StageName, dict[str, Any]]
    evaluation: Evaluation | None
    seconds: float


@dataclass(kw_only=True)
class Run:
    """One start of a run: what it is to do, and where."""

    config: RunConfig
    task: Task
    chain: Chain
    folder: RunFolder
    commit: Commit | None
    known: Asked | None  # prompts, if the model was there before anything started
    progress: Progress
    results: dict[StageName, dict[str, Any]] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    @property
    def run_dir(self) -> Path:
        return self.folder.path

    @property
    def start(self) -> str:
        """The model that reinforcement learning begins from: the fine-tuned one where there is one."""
        return str(self.run_dir / "finetuned") if self.config.finetune.epochs else self.config.model.path

    @property
    def prompts(self) -> Asked:
        if self.known is None:
            self.known = asked(self.config, self.task, self.start)
        return self.known


def run_stages(config: RunConfig, run_dir: Path, console: Console, until: StageName = "evaluate") -> Result:
    """Carry out the stages of a recipe, up to `until`. In a folder that holds a run already, what still counts of it is not done again.

    Raises ValueError for what is wrong with the recipe or its data, before Ray starts; RunError for what fails on the way, with the
    traceback in `log/driver.log`; Stopped when a signal asked for it.
    """
    config = resolve(check(config))
    task, known = _preflight(config)
    data = fingerprints(config, task)
    with RunFolder.take(run_dir) as folder:
        chain = Chain(config, folder.path, data, until=until)
        if chain.is_finished:
            _say(console, f"nothing is left to do: {', '.join(chain.stages)} are done; everything is in {run_dir}")
            return Result(
                run_dir=run_dir, stages={stage: done.result for stage in chain.stages if (done := chain.finished(stage))}, evaluation=None, seconds=0.0
            )
        commit = None if chain.changed("rl") else _newest(folder, config, console)
        folder.begin(config, from_step=commit.state.step if commit else 0, until=until)
        save(config, run_dir / "config.toml")
        return _carry_out(config, task, known, folder, chain, commit, console)


def resume(config: RunConfig, run_dir: Path, allowed: Collection[str], console: Console) -> Result | None:
    """Go on with a run, with the settings it was begun with but for those `allowed` to change; None if it is finished.

    Raises as `run_stages` does, and ValueError when the folder holds no run, is in use, or other settings differ.
    """
    with RunFolder.open(run_dir) as folder:
        until = folder.history[-1].until
        changed = check_changes(folder.history[-1].config, check(config), allowed)
        task, known = _preflight(config)
        chain = Chain(config, run_dir, fingerprints(config, task), until=until, allowed=allowed)
        if chain.is_finished:
            _say(console, f"this run is finished: {', '.join(chain.stages)}; everything is in {run_dir}")
            return None
        for line in changed:
            _say(console, f"changed: {line}")
        commit = None if chain.changed("rl") else _newest(folder, config, console)
        for library, before in folder.history[-1].versions.items():
            if before != (now := metadata.version(library)):
                _say(console, f"{library} is {now}, it was {before}: the run goes on, but no longer to the bit")
        folder.begin(config, from_step=commit.state.step if commit else 0, until=until)
        save(config, run_dir / "config.toml")
        if chain.manifest("rl") is not None:
            _say(console, f"resumed from {f'commit {commit.name}' if commit else 'the beginning, since nothing was committed'}")
        return _carry_out(config, task, known, folder, chain, commit, console)


def _newest(folder: RunFolder, config: RunConfig, console: Console) -> Commit | None:
    return Checkpoints(folder, config.keep_commits).latest(lambda line: _say(console, line))


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _preflight(config: RunConfig) -> tuple[Task, Asked | None]:
    """The task, and its prompts if the model is there already. Raises ValueError for what cannot work, while nothing is started."""
    task = task_of(config)
    rule = rule_of(config, task)
    if not config.reward_model.epochs or rule:
        check_judges(judges_of(config.reward, rule))
    if config.reward_model.epochs and config.reward_model.pairs == "sampled" and not rule:
        raise ValueError(f'reward_model.pairs: must be "task" when no rule can compare replies, got "sampled" for task {task.name!r}; set reward.function')
    check_data(config, task)
    return task, asked(config, task, config.model.path) if config.model.path else None


def rule_of(config: RunConfig, task: Task) -> str:
    """Import path of the function that judges by rule; "" where there is none."""
    return config.reward.function or task.reward


def reward_of(config: RunConfig, task: Task, run_dir: Path) -> RewardConfig:
    """What reinforcement learning is rewarded by: the reward model trained in this run, or the one the recipe names, or the rule."""
    if config.reward_model.epochs:
        return config.reward.model_copy(update={"function": "", "model": str(run_dir / "reward-model")})
    return config.reward if config.reward.model else config.reward.model_copy(update={"function": rule_of(config, task)})


def _carry_out(config: RunConfig, task: Task, known: Asked | None, folder: RunFolder, chain: Chain, commit: Commit | None, console: Console) -> Result:
    started, run_dir = time.monotonic(), folder.path
    with Journal(run_dir / "log"), Progress(console) as progress, named(progress):
        log.info("epoch %d begins at step %d, process %d", folder.epoch, folder.history[-1].from_step, folder.history[-1].pid)
        current = Run(config=config, task=task, chain=chain, folder=folder, commit=commit, known=known, progress=progress)
        with Session(config.cluster, run_dir / "log", packages=PACKAGES, local_cpus=_cpus(config)) as session:
            for asking in (demands(config), examiners(config)):
                session.preflight(place(config, asking))  # before fine-tuning, not after it
            if line := report_texts(task, run_dir):
                progress.remark(line)
            for stage in chain.stages:
                _do(stage, current, session)
            report_tokens(config, task, run_dir, current.start, current.known)
    result = Result(run_dir=run_dir, stages=current.results, evaluation=current.evaluation, seconds=time.monotonic() - started)
    show(result, config, console)
    return result


def _do(stage: StageName, run: Run, session: Session) -> None:
    """One stage, unless it is done."""
    done = run.chain.finished(stage)
    if done is None:
        why = run.chain.begin(stage)
        if why:
            run.progress.remark(f"{stage} is done again: {why}")
        started = time.monotonic()
        result = _STAGES[stage](run, session)
        done = run.chain.finish(stage, result, time.monotonic() - started)
    run.results[stage] = done.result


def _sft(run: Run, session: Session) -> dict[str, Any]:
    return _told(finetune(run.config, session, run.run_dir, run.progress))


def _reward(run: Run, session: Session) -> dict[str, Any]:
    """The comparisons are the task's own, people's as a rule; or made by a rule, which is said wherever they are shown."""
    config, run_dir = run.config, run.run_dir
    if config.reward_model.pairs == "task":
        return _told(train_reward_model(config, session, run_dir, run.progress))
    path, rule = run_dir / "comparisons.parquet", rule_of(config, run.task)
    if not path.is_file():
        run.progress.stage("compare sampled replies", 1)
        made = _sampled(run, session, path)
        run.progress.remark(f"{made.comparisons} machine-made comparisons: of the replies sampled to {made.prompts} prompts, {rule} says which is better")
    source = f"machine-made: the fine-tuned model's replies, compared by {rule}"
    return _told(train_reward_model(config, session, run_dir, run.progress, comparisons=read_comparisons(path), source=source))


def _sampled(run: Run, session: Session, path: Path) -> Made:
    config = run.config
    placed = session.place(place(config, [RoleDemand(role="comparer", workers=config.rollout.workers, gpus=config.rollout.gpus)]))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
    try:
        return make_comparisons(config, stage, run.start, run.prompts, rule_of(config, run.task), path)
    finally:
        placed.remove()


def _rl(run: Run, session: Session) -> dict[str, Any]:
    config, commit = run.config, run.commit
    if commit is not None and not (run.run_dir / "checkpoints" / commit.name).is_dir():  # moved aside with what it came from
        commit = None
    reward = reward_of(config, run.task, run.run_dir)
    run.progress.stage("start actors", 1)
    return _told(reinforce(config, session, run.folder, run.progress, model=run.start, reward=reward, prompts=run.prompts, commit=commit))


def _evaluate(run: Run, session: Session) -> dict[str, Any]:
    """The policy against the model it began from, by what it was trained on and by the rule."""
    config, run_dir = run.config, run.run_dir
    judges = judges_of(reward_of(config, run.task, run_dir), rule_of(config, run.task))
    found = evaluate(config, session, run_dir, run.progress, policy=str(run_dir / "policy"), baseline=run.start, judges=judges)
    write(found, run_dir, run_dir)
    run.evaluation = found
    return {"gain": {name: asdict(judged.gain) for name, judged in found.judges.items()}}


_STAGES: dict[StageName, Callable[[Run, Session], dict[str, Any]]] = {"sft": _sft, "reward": _reward, "rl": _rl, "evaluate": _evaluate}


def _told(result: Any) -> dict[str, Any]:
    """A stage's result as JSON values; paths are those of the run folder, which may be moved."""
    return {name: value for name, value in asdict(result).items() if not isinstance(value, Path)}


@contextmanager
def named(progress: Progress) -> Iterator[None]:
    """Whatever goes wrong inside becomes an error that names its phase."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError("driver", progress.name, str(error)) from error


def resolve(config: RunConfig) -> RunConfig:
    """Fix what depends on the machine, so that the saved configuration says what really ran."""
    cpus = config.cluster.cpus_per_bundle or place(config, demands(config)).bundles[0].cpus
    return config.model_copy(
        update={
            "data": absolute_sources(config.data),
            "cluster": config.cluster.model_copy(update={"cpus_per_bundle": cpus}),
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "reward": config.reward.model_copy(update={"model": absolute(config.reward.model)}),
        }
    )


def _cpus(config: RunConfig) -> int:
    """Cores that a local Ray must count for every stage to fit."""
    trained = [config.finetune.learner.ranks if config.finetune.epochs else 0, config.reward_model.learner.ranks if config.reward_model.epochs else 0]
    return max(place(config, demands(config)).cpus, place(config, examiners(config)).cpus, config.cluster.cpus_per_bundle * max(trained))
