"""The command `raylign evaluate`: it compares any two models, outside of a run."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cluster.imports import OWN
from cluster.placement import place
from cluster.session import Session
from cluster.stopping import StopRequest
from pipeline.config.run_config import RunConfig
from pipeline.evaluation.evaluate import evaluate, examiners, idle_examiners
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.observe.log import DriverLog
from pipeline.observe.progress import Progress, waiting
from pipeline.plan.comparison import LOG, Comparison
from pipeline.plan.dtypes import emulated
from pipeline.plan.places import sized_for
from pipeline.plan.preflight import preflight_comparison, resolve
from pipeline.report.markdown import write
from pipeline.report.terminal import show_evaluation
from pipeline.report.wording import verdict
from pipeline.run.ending import errors_named_by_phase, stoppable


def compare(config: RunConfig, comparison: Comparison, console: Console, stop: StopRequest) -> None:
    """Evaluate the two models of a comparison, write the result into a folder and show it.

    Raises ValueError when the settings, models or data have a fault that shows before Ray starts; RunError when the
    evaluation fails; Stopped when a signal asked for it, and then nothing is kept.
    """
    with waiting(console, "read settings, models and data"):
        config = resolve(config)
        ready = preflight_comparison(config, comparison)
    log_dir = comparison.out / LOG
    cpus = place(config.cluster, examiners(config.evaluation)).cpus
    folder = comparison.run_dir if comparison.run_dir and comparison.out.is_relative_to(comparison.run_dir) else None
    with (
        DriverLog(log_dir),
        Progress(console) as progress,
        errors_named_by_phase(progress),
        stoppable(stop, progress),
        Session(config.cluster, log_dir, folder=folder, packages=OWN, local_cpus=cpus, check=stop.check) as session,
    ):
        for line in (*emulated(config), *idle_examiners(config.evaluation, config.rollout)):
            progress.remark(line)
        home, sized = (
            comparison.run_dir or comparison.out,
            sized_for(config, ("evaluate",), session.nodes(), progress.remark),
        )
        settings = EvaluationSettings.of(ready.task, config.evaluation, sized)
        found = evaluate(
            settings,
            session,
            home,
            progress,
            policy=comparison.policy,
            baseline=comparison.baseline,
            judges=ready.judges,
        )
    write(found, comparison.out, comparison.run_dir)
    show_evaluation(found, config.evaluation.shown, console)
    console.print(
        Text(f"{verdict(found)}\nsaved in {comparison.out}: report.md, evaluation.json, frontier.png"), soft_wrap=True
    )
