"""A whole run: fine-tune where the recipe asks for it, reinforce, compare, export. What `train`, `quickstart` and `resume` do.

recipe --finetune--> finetuned/ --start_roles--> Driver.run --> policy/ --evaluate, against what it began from--> evaluation.json

Each part leaves a file when it is done, and a run that goes on begins with the first that is missing: finetuned.json, commits, evaluation.json.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.events import Pump
from cluster.faults import RunError
from cluster.placement import RoleDemand
from cluster.session import Session
from cluster.storage import Folder
from pipeline.changes import check_changes
from pipeline.checkpoint import Checkpoints, Commit
from pipeline.config import RunConfig, absolute, check, save
from pipeline.driver import Driver
from pipeline.evaluation import Evaluation
from pipeline.observe.journal import Journal
from pipeline.observe.observer import Observer
from pipeline.observe.progress import Progress
from pipeline.observe.report import write
from pipeline.observe.summary import show
from pipeline.prompts import Asked, asked, check_data
from pipeline.roles import Stage, declare_roles, demands, place
from pipeline.run_folder import RunFolder
from pipeline.stages.evaluate import check_judges, evaluate, examiners, judges_of
from pipeline.stages.finetune import Finetuned, finetune
from pipeline.tasks.task import Task, load_task

log = logging.getLogger(__name__)

PACKAGES = ("cluster", "actors", "pipeline")
_FINETUNED = "finetuned.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run leaves behind."""

    run_dir: Path
    finetuned: Finetuned | None
    evaluation: Evaluation
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A start of a run: what it is to do, where, and from which commit."""

    config: RunConfig
    task: Task
    asked: Asked | None  # None: the model is still to be made
    folder: RunFolder
    commit: Commit | None
    progress: Progress


def train(config: RunConfig, run_dir: Path, console: Console) -> Result:
    """Run a recipe from the beginning.

    Raises ValueError for what is wrong with the recipe or its data, before Ray starts; RunError for what fails on the way, with the
    traceback in `log/driver.log`; Stopped when a signal asked for it.
    """
    config = resolve(check(config))
    task, known = _preflight(config)
    with RunFolder.create(run_dir, config) as folder:
        return _carry_out(config, task, known, folder, None, console)


def resume(config: RunConfig, run_dir: Path, allowed: Collection[str], console: Console) -> Result | None:
    """Go on with a run from its last whole commit, with the settings it was begun with but for those `allowed` to change; None if it is finished.

    Raises as `train` does, and ValueError when the folder holds no run, is in use, or other settings differ.
    """
    with RunFolder.open(run_dir) as folder:
        if folder.is_finished:
            console.print(Text(f"this run is finished: {config.steps} steps; the aligned model is {run_dir / 'policy'}"), soft_wrap=True)
            return None

        def say(line: str) -> None:
            console.print(Text(line), soft_wrap=True)

        for line in check_changes(folder.history[-1].config, check(config), allowed):
            say(f"changed: {line}")
        task, known = _preflight(config)
        commit = Checkpoints(folder, config.keep_commits).latest(say)
        for library, before in folder.history[-1].versions.items():
            if before != (now := metadata.version(library)):
                say(f"{library} is {now}, it was {before}: the run goes on, but no longer to the bit")
        step = commit.state.step if commit else 0
        folder.begin(config, from_step=step)
        save(config, run_dir / "config.toml")
        say(f"resumed from {f'commit {commit.name}' if commit else 'the beginning, since nothing was committed'}")
        return _carry_out(config, task, known, folder, commit, console)


def _preflight(config: RunConfig) -> tuple[Task, Asked | None]:
    """The task, and its prompts if the model is there already. Raises ValueError for what cannot work, while nothing is started."""
    task = load_task(config.task)
    check_judges(judges_of(config.reward, task.reward))
    check_data(config, task)
    return task, asked(config, task, config.model.path) if config.model.path else None


def _carry_out(config: RunConfig, task: Task, known: Asked | None, folder: RunFolder, commit: Commit | None, console: Console) -> Result:
    started = time.monotonic()
    run_dir = folder.path
    with Journal(run_dir / "log"), Progress(console) as progress, named(progress):
        log.info("epoch %d begins at step %d, process %d", folder.epoch, folder.history[-1].from_step, folder.history[-1].pid)
        run = _Run(config=config, task=task, asked=known, folder=folder, commit=commit, progress=progress)
        with Session(config.cluster, run_dir / "log", packages=PACKAGES, local_cpus=_cpus(config)) as session:
            for asking in (demands(config), examiners(config)):
                session.preflight(place(config, asking))  # before fine-tuning, not after it
            finetuned = _finetune(run, session) if config.finetune.epochs else None
            start = str(finetuned.folder) if finetuned else config.model.path
            _reinforce(run, session, start)
            judges = judges_of(config.reward, task.reward)
            evaluation = evaluate(config, session, run_dir, progress, policy=str(run_dir / "policy"), baseline=start, judges=judges)
        write(evaluation, run_dir, run_dir)  # with it the run is finished
    result = Result(run_dir=run_dir, finetuned=finetuned, evaluation=evaluation, seconds=time.monotonic() - started)
    show(result, config, console)
    return result


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
            "cluster": config.cluster.model_copy(update={"cpus_per_bundle": cpus}),
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "reward": config.reward.model_copy(update={"model": absolute(config.reward.model)}),
        }
    )


def _finetune(run: _Run, session: Session) -> Finetuned:
    """The fine-tuned model: the one that an earlier start has finished, or made now, from its beginning."""
    config, run_dir = run.config, run.folder.path
    done = Folder(run_dir)
    if done.exists(_FINETUNED):
        record = json.loads(done.read_text(_FINETUNED))
        return Finetuned(folder=run_dir / "finetuned", perplexity_before=record["perplexity_before"], perplexity=record["perplexity"])
    shutil.rmtree(run_dir / "finetuned", ignore_errors=True)
    run.progress.stage("start fine-tuning", 1)
    learner = config.finetune.learner
    placed = session.place(place(config, [RoleDemand(role="policy", workers=learner.ranks, gpus=learner.gpus)]))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
    try:
        finetuned = finetune(config, stage, run_dir, run.progress)
    finally:
        placed.remove()
    done.write_text(_FINETUNED, json.dumps(asdict(finetuned) | {"folder": "finetuned"}))
    return finetuned


def _reinforce(run: _Run, session: Session, model: str) -> None:
    """From `model` to the folder `policy`; its processes are gone afterwards, so an evaluation has the memory."""
    config, folder, progress = run.config, run.folder, run.progress
    progress.stage("start actors", 1)
    prompts = run.asked or asked(config, run.task, model)
    placed = session.place(place(config, demands(config)))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
    roles = declare_roles(config, stage, model, run.task.reward)
    try:
        with Observer(folder.path, progress) as observer:
            roles.start()
            driver = Driver(config, folder, roles, stage, prompts.train, observer)
            progress.stage("reinforce", config.steps)
            driver.restore(run.commit)
            driver.run(folder.path / "policy")
    finally:
        roles.close()
        placed.remove()


def _cpus(config: RunConfig) -> int:
    asked_for = (demands(config), examiners(config), [RoleDemand(role="policy", workers=config.finetune.learner.ranks, gpus=0)])
    return max(place(config, asking).cpus for asking in asked_for)
