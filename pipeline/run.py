"""A whole run: fine-tune where the recipe asks for it, reinforce, compare, export. What `train` and `quickstart` do.

recipe --finetune--> finetuned/ --start_roles--> Driver.run --export--> policy/
                                   `-- evaluate before ... after --> evaluation.json
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from actors.reward import load_function
from cluster.events import Pump
from cluster.faults import RunError
from cluster.placement import RoleDemand
from cluster.session import Session
from pipeline.config import RunConfig, check, save
from pipeline.driver import Driver
from pipeline.evaluation import Comparison, Evaluator, compare, heldout_groups
from pipeline.observe.observer import Observer
from pipeline.observe.progress import Progress
from pipeline.observe.summary import show
from pipeline.roles import Stage, declare_roles, demands, place
from pipeline.stages.finetune import Finetuned, finetune
from pipeline.tasks.task import PromptStream, Task, load_task

PACKAGES = ("cluster", "actors", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run leaves behind."""

    run_dir: Path
    finetuned: Finetuned | None
    comparison: Comparison
    seconds: float


def train(config: RunConfig, run_dir: Path, console: Console) -> Result:
    """Run a recipe from the beginning.

    Raises ValueError for what is wrong with the recipe, before Ray starts; RunError for what fails on the way, with the
    traceback in `log/driver.log`.
    """
    started = time.monotonic()
    config = resolve(check(config))
    task = load_task(config.task)
    if not config.reward.model:
        load_function(config.reward.function or task.reward)
    _make(run_dir, config)
    with Progress(console) as progress, _told(run_dir, progress):
        with Session(config.cluster, run_dir / "log", packages=PACKAGES, local_cpus=_cpus(config)) as session:
            session.preflight(place(config, demands(config)))  # before fine-tuning, not after it
            finetuned = _finetune(config, session, run_dir, progress) if config.finetune.epochs else None
            model = str(finetuned.folder) if finetuned else config.model.path
            comparison = _reinforce(config, session, run_dir, progress, task, model)
        record = comparison.record(len(comparison.before.prompts))
        (run_dir / "evaluation.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    result = Result(run_dir=run_dir, finetuned=finetuned, comparison=comparison, seconds=time.monotonic() - started)
    show(result, config, console)
    return result


@contextmanager
def _told(run_dir: Path, progress: Progress) -> Iterator[None]:
    """Whatever goes wrong inside becomes an error that names its phase; the traceback goes to the log."""
    try:
        yield
    except (RunError, ValueError, OSError) as error:
        with suppress(OSError):  # the disk may be what is full
            (run_dir / "log" / "driver.log").write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(error, RunError):
            raise
        raise RunError("driver", progress.name, str(error)) from error


def resolve(config: RunConfig) -> RunConfig:
    """Fix what depends on the machine, so that the saved configuration says what really ran."""
    cpus = config.cluster.cpus_per_bundle or place(config, demands(config)).bundles[0].cpus
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"cpus_per_bundle": cpus}),
            "model": config.model.model_copy(update={"path": _absolute(config.model.path)}),
            "reward": config.reward.model_copy(update={"model": _absolute(config.reward.model)}),
        }
    )


def _absolute(path: str) -> str:
    """A folder of this machine by its full name, since workers stand elsewhere; a hub name as it is."""
    return str(Path(path).absolute()) if path and Path(path).is_dir() else path


def _finetune(config: RunConfig, session: Session, run_dir: Path, progress: Progress) -> Finetuned:
    progress.stage("start fine-tuning", 1)
    learner = config.finetune.learner
    placed = session.place(place(config, [RoleDemand(role="policy", workers=learner.ranks, gpus=learner.gpus)]))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
    try:
        return finetune(config, stage, run_dir, progress)
    finally:
        placed.remove()


def _reinforce(config: RunConfig, session: Session, run_dir: Path, progress: Progress, task: Task, model: str) -> Comparison:
    from actors.model import context_of, load_tokenizer

    progress.stage("start actors", 1)
    tokenizer, context = load_tokenizer(model), context_of(model)

    def stream(split: str, seed: int) -> PromptStream:
        return PromptStream(
            task.prompts(split),  # type: ignore[arg-type]
            tokenizer,
            seed=seed,
            max_prompt_tokens=config.batch.max_prompt_tokens,
            context=context,
            max_new_tokens=config.sampling.max_new_tokens,
        )

    prompts, heldout = stream("train", config.seed), stream("heldout", 0)
    placed = session.place(place(config, demands(config)))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
    roles = declare_roles(config, stage, model, task.reward)
    try:
        with Observer(run_dir, progress) as observer:
            roles.start()
            driver = Driver(config, run_dir, roles, stage, prompts, observer)
            chosen = heldout.draw(heldout_groups(config.evaluation.prompts, len(heldout)))
            evaluator = Evaluator(config, roles, stage, tokenizer, chosen)
            progress.stage("evaluate before", 1)
            before = evaluator.evaluate(driver.weights)
            progress.stage("reinforce", config.steps)
            driver.run()
            driver.export(run_dir / "policy")
            progress.stage("evaluate after", 1)
            after = evaluator.evaluate(driver.weights)
    finally:
        roles.close()
        placed.remove()
    return compare(before, after, config.seed)


def _cpus(config: RunConfig) -> int:
    return max(place(config, demands(config)).cpus, config.cluster.cpus_per_bundle * config.finetune.learner.ranks)


def _make(run_dir: Path, config: RunConfig) -> None:
    """The run folder, with the resolved recipe in it."""
    try:
        if run_dir.exists() and any(run_dir.iterdir()):
            raise ValueError(f"--run-dir: must be a new or empty folder, got {run_dir}; choose another, nothing in it was touched")
        (run_dir / "log").mkdir(parents=True, exist_ok=True)
        save(config, run_dir / "config.toml")
    except OSError as error:
        raise ValueError(f"--run-dir: must be a folder that can be written, got {run_dir}: {error.strerror}") from error
