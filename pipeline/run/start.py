"""The start of a run, new or resumed: the commands `run`, `sft`, `reward`, `train`, `quickstart` and `resume`.

    recipe --preflight--> folder, chain --start Ray--> stages --report

Left out: which stages a run has and which are done (folder/manifests.py), and the inputs of each stage (stages.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.imports import OWN, use_roots
from cluster.session import Session, cluster_address
from cluster.stopping import StopRequest
from cluster.storage import StoredFile
from pipeline.config.recipe import save
from pipeline.config.rules import check
from pipeline.config.run_config import RunConfig
from pipeline.encoding.data_report import report_texts, report_tokens
from pipeline.encoding.prompts import RunPrompts, data_checksums
from pipeline.evaluation.evaluate import idle_examiners
from pipeline.folder.compatibility import check_changes, check_data_changes, moved, paths_changed
from pipeline.folder.manifests import STEPS, Chain, StageName, stages_of
from pipeline.folder.run_folder import RunFolder, RunStart
from pipeline.folder.user_code import changes_of, code_of, told_where
from pipeline.loop.commits import Checkpoints, Commit
from pipeline.observe.log import DriverLog
from pipeline.observe.progress import Progress, waiting
from pipeline.plan.dtypes import emulated
from pipeline.plan.idle import idle_workers
from pipeline.plan.places import placements, sized_for, with_cpus
from pipeline.plan.preflight import preflight, resolve, rule_of, unfollowed, with_full_paths
from pipeline.report.result import Result
from pipeline.report.terminal import show
from pipeline.run.ending import errors_named_by_phase, stoppable
from pipeline.run.fetch import open_storage
from pipeline.run.stages import Run, carry_out
from pipeline.tasks.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """The checked inputs of a run.

    known: the prompts in the model's tokens; None if there is no model yet. data, code: as in `RunStart`. remarks:
    lines to print for the user.
    """

    task: Task
    known: RunPrompts | None
    data: dict[str, str]
    code: dict[str, StoredFile]
    remarks: tuple[str, ...]


def run_stages(
    config: RunConfig, run_dir: Path, console: Console, until: StageName = "evaluate", stop: StopRequest | None = None
) -> Result:
    """Carry out the stages of a recipe, up to and including `until`.

    If the folder already holds a run, its stages that are still valid are not done again. stop: where signals are
    noted; without it, Ctrl-C raises KeyboardInterrupt until reinforcement learning begins.

    Raises ValueError, before Ray starts, when the recipe or its data is wrong; RunError when a stage fails, with the
    traceback in `log/driver.log`; Stopped when a signal asked for it.
    """
    config = check(config)
    mirror = open_storage(config.cluster, run_dir, lambda line: _say(console, line))
    with waiting(console, "read settings and data"):
        config = resolve(config)
        inputs = _inputs(config)
    with RunFolder.take(run_dir) as folder:
        if mirror is not None:
            mirror.follow(folder)
        same = _moved(folder.history[-1], config, inputs) if folder.history else {}
        chain = Chain(config, folder.path, inputs.data, until=until, moved=same)
        if chain.is_finished:
            folder.copy()
            _say(console, f"nothing is left to do: {', '.join(chain.stages)} are done; everything is in {run_dir}")
            return Result(
                run_dir=run_dir,
                stages={stage: done.result for stage in chain.stages if (done := chain.finished(stage))},
                evaluation=None,
                seconds=0.0,
            )
        return _go(config, inputs, folder, chain, console, stop)


def resume(
    config: RunConfig, run_dir: Path, allowed: Collection[str], console: Console, stop: StopRequest | None = None
) -> Result | None:
    """Resume a run; returns None if it is finished.

    allowed: names of settings, `data` or `model`, that may differ from the run's; all others must be the same. A file
    or a model may be at another path if its contents are the same. A larger number of steps is always allowed: the run
    goes on from its last commit, also after it has finished.

    Raises the errors of `run_stages`. Also raises ValueError when the folder holds no run or is in use, when settings
    or data differ that are not allowed to, and when the run has done more steps than the recipe now asks for.
    """
    mirror = open_storage(config.cluster, run_dir, lambda line: _say(console, line))
    with RunFolder.open(run_dir) as folder:
        if mirror is not None:
            mirror.follow(folder)
        last = folder.history[-1]
        use_roots(last.roots)
        config = with_full_paths(check(config))
        check_changes(last.config, config, allowed, same=paths_changed(last.config, config))
        with waiting(console, "read settings and data"):
            with told_where(last.code):
                inputs = _inputs(config)
            same = _moved(last, config, inputs)
            changed = check_changes(last.config, config, allowed, same)
            changed += check_data_changes(last.data, inputs.data, allowed)
        chain = Chain(config, run_dir, inputs.data, until=last.until, allowed=allowed, moved=same)
        if chain.is_finished:
            folder.copy()
            _say(console, f"this run is finished: {', '.join(chain.stages)}; everything is in {run_dir}")
            return None
        said = [*(f"changed: {line}" for line in changed), *changes_of(last.code, inputs.code)]
        for library, before in last.versions.items():
            if before != (now := metadata.version(library)):
                said.append(f"{library} is {now}, it was {before}: the run goes on, but no longer to the bit")
        return _go(config, inputs, folder, chain, console, stop, said)


def _moved(last: RunStart, config: RunConfig, inputs: RunInputs) -> dict[str, str]:
    """Setting -> path at the last start, for every file or model that is now at another path with the same contents."""
    return moved(paths_changed(last.config, config), last.data, inputs.data)


def _go(
    config: RunConfig,
    inputs: RunInputs,
    folder: RunFolder,
    chain: Chain,
    console: Console,
    stop: StopRequest | None,
    said: Sequence[str] = (),
) -> Result:
    """Take the folder's next epoch and do the remaining stages.

    said: lines to print after the last check that can refuse the start. Raises ValueError when the number of steps does
    not fit what the run has done.
    """
    commit = (
        None
        if chain.changed("rl")
        else Checkpoints(folder, config.keep_commits).latest(lambda line: _say(console, line))
    )
    _check_steps(config, chain, commit)
    chain.accept()
    for line in (*said, *inputs.remarks):
        _say(console, line)
    folder.begin(
        config, from_step=commit.state.step if commit else 0, until=chain.until, data=inputs.data, code=inputs.code
    )
    save(config, folder.path / "config.toml")
    return _carry_out(config, inputs, folder, chain, commit, console, StopRequest() if stop is None else stop)


def _check_steps(config: RunConfig, chain: Chain, commit: Commit | None) -> None:
    """Raises ValueError when the number of steps in the recipe does not fit what the run has done.

    It does not fit if it is smaller than the number of steps done, or if it is larger and no commit is left to go on
    from.
    """
    if "rl" not in chain.stages or any(chain.changed(stage) for stage in chain.stages if stage != "evaluate"):
        return  # reinforcement learning is not part of this run, or begins anew
    manifest = chain.manifest("rl")
    before = int(manifest.depends[STEPS]) if manifest and manifest.finished else 0
    done = max(before, commit.state.step if commit else 0)
    if config.steps < done:
        raise ValueError(
            f"steps: must be >= {done}, which this run has done, got {config.steps}; for a shorter run, begin a new "
            "one in another --run-dir"
        )
    if commit is None and before and config.steps > before:
        raise ValueError(
            f"steps: must be {before}, which this run has done, got {config.steps}; to go on it needs a commit, and "
            "none is left in checkpoints/"
        )


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _inputs(config: RunConfig) -> RunInputs:
    """Check and gather the inputs of all stages before anything starts. Raises ValueError for what cannot work."""
    ready = preflight(config)
    return RunInputs(
        task=ready.task,
        known=ready.prompts,
        data=data_checksums(config, config.reward, ready.task, config.environment.partner),
        code=code_of(config, rule_of(config, ready.task)),
        remarks=ready.remarks,
    )


def _carry_out(
    config: RunConfig,
    inputs: RunInputs,
    folder: RunFolder,
    chain: Chain,
    commit: Commit | None,
    console: Console,
    stop: StopRequest,
) -> Result:
    started, run_dir = time.monotonic(), folder.path
    with (
        DriverLog(run_dir / "log"),
        Progress(console) as progress,
        errors_named_by_phase(progress),
        stoppable(stop, progress, run_dir),
    ):
        log.info(
            "epoch %d begins at step %d, process %d", folder.epoch, folder.history[-1].from_step, folder.history[-1].pid
        )
        for line in emulated(config):
            log.warning(line)
            progress.remark(f"warning: {line}")
        current = Run(
            config=config,
            task=inputs.task,
            chain=chain,
            folder=folder,
            commit=commit,
            known=inputs.known,
            progress=progress,
            stop=stop,
        )
        progress.stage("connect to Ray" if cluster_address(config.cluster) else "start Ray", 0)
        cpus = max(placement.cpus for placement in placements(config, chain.left).values())
        with Session(config.cluster, run_dir / "log", packages=OWN, local_cpus=cpus, check=stop.check) as session:
            _settle(current, session)
            for stage in chain.stages:
                carry_out(stage, current, session)
            report_tokens(config, inputs.task, run_dir, current.start, current.known)
            folder.copy()
    result = Result(
        run_dir=run_dir, stages=current.results, evaluation=current.evaluation, seconds=time.monotonic() - started
    )
    show(result, config.evaluation.shown, console)
    return result


def _settle(run: Run, session: Session) -> None:
    """Prepare the stages on the cluster: settle the CPUs, check that every stage has its place, print the remarks.

    The number of CPUs per bundle is settled only if the configuration leaves it open.
    """
    if not run.config.cluster.cpus_per_bundle:
        run.config = _sized(run.config, session, run.folder, run.progress.remark)
        run.folder.settle(run.config)
    for line in (*idle_workers(run.config), *idle_examiners(run.config.evaluation, run.config.rollout)):
        run.progress.remark(line)
    for placement in placements(run.config, run.chain.left).values():
        session.preflight(placement)
    for line in filter(None, (report_texts(run.task, run.run_dir), *unfollowed(run.config))):
        run.progress.remark(line)


def _sized(config: RunConfig, session: Session, folder: RunFolder, say: Callable[[str], None]) -> RunConfig:
    """The configuration with a number of CPUs per bundle: that of an earlier start, else as many as fit the cluster.

    The exact results of a run depend on this number, so every start of a run must have the same.
    """
    before = [epoch.config.get("cluster", {}).get("cpus_per_bundle", 0) for epoch in folder.history]
    return (
        with_cpus(config, next(filter(None, reversed(before))))
        if any(before)
        else sized_for(config, stages_of(config), session.nodes(), say)
    )
