"""Any two models compared: what `raylign evaluate` does, outside of a run.

Of a run it takes the recipe, the policy, the model that began and the judges; each can be named anew. Left out: more than two models at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import strftime
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig, absolute

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Who against whom, by which judge besides the rule, and where the result is written. run_dir: the run that the target is, if it is one."""

    policy: str
    baseline: str
    reward_model: str  # "": the rule alone
    out: Path
    run_dir: Path | None

    @classmethod
    def of(cls, config: RunConfig, run_dir: Path | None, *, policy: str, baseline: str, reward_model: str, out: Path | None, recipe: str) -> Contest:
        """What was not named is the run's. Raises ValueError when there is no run to take it from, or `out` is in use."""
        found = {"policy": "", "baseline": config.model.path, "reward-model": config.reward.model}
        if run_dir is not None:
            folders = {"policy": "policy", "baseline": "finetuned", "reward-model": "reward-model"}
            found |= {role: str(run_dir / name) for role, name in folders.items() if (run_dir / name).is_dir()}
        named = {"policy": policy, "baseline": baseline, "reward-model": reward_model}
        models = {role: absolute(named[role] or found[role]) for role in found}
        for role in ("policy", "baseline"):
            if not models[role]:
                where = f"{run_dir} has none yet" if run_dir else "a recipe has none"
                raise ValueError(f"--{role}: must be given, since {where}; name the folder of a causal language model")
        out = (out or _new_folder(run_dir, recipe)).absolute()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out: must be a new or empty folder, got {out}; choose another, nothing in it was touched")
        return cls(policy=models["policy"], baseline=models["baseline"], reward_model=models["reward-model"], out=out, run_dir=run_dir)


def _new_folder(run_dir: Path | None, recipe: str) -> Path:
    if run_dir is None:
        return Path("runs") / f"{recipe}-evaluation-{strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while (run_dir / f"evaluation-{number}").exists():
        number += 1
    return run_dir / f"evaluation-{number}"


def hold(config: RunConfig, contest: Contest, console: Console) -> None:
    """Evaluate, write and show. Raises ValueError for what is wrong with the models and can be seen before Ray starts; RunError for what fails."""
    from rich.text import Text

    from cluster.session import Session
    from pipeline.observe.journal import Journal
    from pipeline.observe.progress import Progress
    from pipeline.observe.report import write
    from pipeline.observe.summary import show_evaluation
    from pipeline.observe.words import verdict
    from pipeline.prompts import heldout
    from pipeline.roles import place
    from pipeline.run import PACKAGES, named, resolve
    from pipeline.stages.evaluate import check_judges, evaluate, examiners, judges_of
    from pipeline.tasks.task import task_of

    config, task = resolve(config), task_of(config)
    judges = judges_of(config.reward.model_copy(update={"model": contest.reward_model}), task.reward)
    check_judges(judges)
    check_models(contest)
    heldout(config, task, contest.baseline)  # read again later, when it can no longer fail
    log_dir = contest.out / "log"
    log_dir.mkdir(parents=True, exist_ok=True)
    cpus = place(config, examiners(config)).cpus
    with Journal(log_dir), Progress(console) as progress, named(progress), Session(config.cluster, log_dir, packages=PACKAGES, local_cpus=cpus) as session:
        home = contest.run_dir or contest.out
        found = evaluate(config, session, home, progress, policy=contest.policy, baseline=contest.baseline, judges=judges)
    write(found, contest.out, contest.run_dir)
    show_evaluation(found, config.evaluation.shown, console)
    console.print(Text(f"{verdict(found)}\nsaved in {contest.out}: report.md, evaluation.json, frontier.png"), soft_wrap=True)


def check_models(contest: Contest) -> None:
    """Raises ValueError when a model or its tokenizer cannot be read, or the two do not speak the same tokens."""
    from actors.model import check_model, load_tokenizer

    vocabularies: dict[str, dict[str, Any]] = {}
    for role, path in (("--policy", contest.policy), ("--baseline", contest.baseline)):
        check_model(path, f"{role}: must be a folder or hub name of a causal language model")
        vocabularies[role] = load_tokenizer(path).get_vocab()
    if vocabularies["--policy"] != vocabularies["--baseline"]:
        raise ValueError(f"--policy: must have the tokenizer of --baseline, but those of {contest.policy!r} and {contest.baseline!r} differ")
