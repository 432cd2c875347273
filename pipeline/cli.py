"""The command line. Parses and checks everything before Ray, torch or DeepSpeed are imported.

    raylign COMMAND [RECIPE] [--run-dir DIR] [--section.field value ...]

Overrides are generated from the configuration's own types (tyro), so there is no second list of options.
Exit codes: 0 done, 1 the run failed or a replay differs, 2 the command or its configuration is wrong, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from rich.console import Console
    from tyro.constructors import ConstructorRegistry

    from pipeline.chain import StageName
    from pipeline.config import RunConfig
    from pipeline.contest import Contest

HELP = ("-h", "--help")
USAGE = """\
raylign: reinforcement learning from human feedback for causal language models, on Ray

  raylign quickstart                 the whole chain on embedded small talk: fine-tune, reward model, PPO, evaluation
  raylign run RECIPE                 every stage of a recipe: a TOML file, or one of those below
  raylign sft|reward|train RECIPE    its stages up to fine-tuning, the reward model, or reinforcement learning
  raylign plan RECIPE                what a recipe would run: processes, placement, batch arithmetic, memory; starts nothing

  raylign resume RUN_DIR             go on with a run that was stopped or broke off, from its last commit
  raylign ledger RUN_DIR             the account of a run: what became of every sample
  raylign replay RUN_DIR --step N    compute a step's advantages and losses again, offline, and compare with what was recorded
  raylign evaluate RUN_DIR|RECIPE    two models on held-out prompts: reward, win rate, KL, best-of-n; of a run, its policy against the model it began from

  --run-dir DIR                      where the run is written (default runs/<recipe>-<time>); in the folder of a run, only what has changed is done again
  --section.field value              override a setting; `raylign run RECIPE --help` lists them all
  --policy, --baseline DIR           with evaluate: other models; --reward-model DIR another judge; --out DIR where the result is written
  --allow-change KEY                 with resume: accept that this setting differs from what the run was begun with

recipes: {recipes}
"""
_UNTIL: dict[str, StageName] = {"quickstart": "evaluate", "run": "evaluate", "sft": "sft", "reward": "reward", "train": "rl"}
_OF_RECIPE = (*_UNTIL, "plan")
_OF_RUN = ("resume", "ledger", "replay")
_EVALUATE = "evaluate"  # of a recipe or of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A parsed and checked command line. recipe: of a new run; run_dir: where it is written, or the run that is meant."""

    name: str
    recipe: str = ""
    run_dir: Path | None = None
    config: RunConfig
    allowed: tuple[str, ...] = ()
    step: int = 0
    contest: Contest | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what is wrong is said on stderr in one screen, without a traceback where the fault is not ours."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's reward function is named by import path from where they stand
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in (*HELP, "help") or (arguments[0] in (*_OF_RECIPE[1:], *_OF_RUN, _EVALUATE) and arguments[1:] and arguments[1] in HELP):
        print(USAGE.format(recipes=", ".join(_bundled())), end="")
        return 0 if arguments else 2
    try:
        command = parse(arguments)
    except ValueError as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2
    return run(command)


def parse(arguments: Sequence[str]) -> Command:
    """Command, recipe or run folder, and overrides. Raises ValueError for whatever is wrong with them."""
    name, rest = arguments[0], list(arguments[1:])
    if name in _OF_RECIPE:
        return _parse_recipe(name, rest)
    if name in _OF_RUN:
        return _parse_run(name, rest)
    if name == _EVALUATE:
        return _parse_evaluate(rest)
    raise ValueError(f"command: must be {', '.join((*_OF_RECIPE, *_OF_RUN))} or {_EVALUATE}, got {name!r}; see raylign --help")


def _parse_recipe(name: str, rest: list[str]) -> Command:
    from pipeline.config import load, recipe_path

    recipe = "quickstart"
    if name != "quickstart":
        if not rest or rest[0].startswith("-"):
            raise ValueError(f"recipe: `raylign {name}` needs one, a TOML file or one of {', '.join(_bundled())}")
        recipe = rest.pop(0)
    program = "raylign quickstart" if name == "quickstart" else f"raylign {name} {recipe}"
    parser = _parser(program, "[--run-dir DIR] [--section.field value ...]")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--algorithm.name", dest="algorithm", default="")  # decides which other settings there are
    known, overrides = parser.parse_known_args(rest)
    path = recipe_path(recipe)
    config = load(path, known.algorithm, checked=not overrides)
    return Command(name=name, recipe=path.stem, run_dir=known.run_dir, config=_override(config, overrides, program))


def _parse_run(name: str, rest: list[str]) -> Command:
    from pipeline.config import load

    if not rest or rest[0].startswith("-"):
        raise ValueError(f"RUN_DIR: `raylign {name}` needs one, the folder of a run")
    run_dir, program = Path(rest.pop(0)), f"raylign {name} RUN_DIR"
    recipe = run_dir / "config.toml"
    if not recipe.is_file():
        raise ValueError(f"RUN_DIR: must be the folder of a run, got {run_dir}, which has no config.toml; `raylign run RECIPE` makes one")
    if name == "resume":
        parser = _parser(program, "[--allow-change KEY ...] [--section.field value ...]")
        parser.add_argument("--allow-change", nargs="+", action="extend", default=[])
        known, overrides = parser.parse_known_args(rest)
        return Command(name=name, run_dir=run_dir, config=_override(load(recipe), overrides, program), allowed=tuple(known.allow_change))
    parser = _parser(program, "--step N" if name == "replay" else "")
    if name == "replay":
        parser.add_argument("--step", type=int, required=True)
    return Command(name=name, run_dir=run_dir, config=load(recipe), step=getattr(parser.parse_args(rest), "step", 0))


def _parse_evaluate(rest: list[str]) -> Command:
    """TARGET is a run folder, whose recipe and models are taken, or a recipe. Models by name stay as they are; see pipeline/contest.py."""
    from pipeline.config import load, recipe_path
    from pipeline.contest import Contest

    if not rest or rest[0].startswith("-"):
        raise ValueError("TARGET: `raylign evaluate` needs one, the folder of a run or a recipe")
    target = rest.pop(0)
    run_dir = Path(target).absolute() if (Path(target) / "config.toml").is_file() else None
    if run_dir is None and Path(target).is_dir():
        raise ValueError(f"TARGET: must be the folder of a run or a recipe, got {target}, a folder without config.toml; to compare models: "
                         "raylign evaluate RECIPE --policy DIR --baseline DIR")  # fmt: skip
    program = "raylign evaluate TARGET"
    parser = _parser(program, "[--policy DIR] [--baseline DIR] [--reward-model DIR] [--out DIR] [--section.field value ...]")
    for option in ("--policy", "--baseline", "--reward-model"):
        parser.add_argument(option, default="")
    parser.add_argument("--out", type=Path)
    known, overrides = parser.parse_known_args(rest)
    path = run_dir / "config.toml" if run_dir else recipe_path(target)
    config = _override(load(path, checked=not overrides), overrides, program)
    contest = Contest.of(config, run_dir, policy=known.policy, baseline=known.baseline, reward_model=known.reward_model, out=known.out, recipe=path.stem)
    return Command(name=_EVALUATE, run_dir=run_dir, config=config, contest=contest)


def _parser(program: str, usage: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=program, usage=f"{program} {usage}", add_help=False, allow_abbrev=False)


def run(command: Command) -> int:
    """Carry out a parsed command. Returns the exit code."""
    from rich.console import Console

    from cluster.faults import RunError

    console = Console()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return _carry_out(command, console)
    except (ValueError, RunError) as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("raylign: interrupted", file=sys.stderr)
        return 130


def _carry_out(command: Command, console: Console) -> int:
    match command.name:
        case "plan":
            from pipeline.plan import show

            show(command.config, console)
        case "ledger":
            from pipeline.observe.account import show_account

            show_account(_given(command), command.config, console)
        case "replay":
            from pipeline.replay import replay

            return 0 if replay(command.config, _given(command), command.step, console) else 1
        case "evaluate":
            from pipeline.contest import hold

            assert command.contest is not None
            hold(command.config, command.contest, console)
        case _:
            return _run_stages(command, console)
    return 0


def _run_stages(command: Command, console: Console) -> int:
    """A new run, or an old one further. Whatever ends it early, what is committed stays, and the last words say how to go on."""
    run_dir = _run_dir(command)
    from cluster.faults import RunError
    from pipeline.run import resume, run_stages
    from pipeline.stopping import Stopped

    again = f"raylign resume {run_dir}"
    try:
        if command.name == "resume":
            resume(command.config, run_dir, command.allowed, console)
        else:
            run_stages(command.config, run_dir, console, until=_UNTIL[command.name])
    except Stopped as stopped:
        print(f"raylign: {stopped}; to go on: {again}", file=sys.stderr)
        return 128 + stopped.number
    except RunError as error:
        print(f"raylign: {error}\nWhat is committed is kept in {run_dir}; to go on from there: {again}", file=sys.stderr)
        return 1
    return 0


def _given(command: Command) -> Path:
    assert command.run_dir is not None
    return command.run_dir.absolute()


def _terminated(number: int, frame: object) -> None:
    """Leave through every `finally` and `__exit__`, as Ctrl-C does."""
    raise SystemExit(128 + number)


def _override(config: RunConfig, overrides: list[str], program: str) -> RunConfig:
    if not overrides:
        return config
    import tyro
    from pydantic import ValidationError

    from pipeline.config import RunConfig, check, explain

    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    given = tyro.cli(RunConfig, default=config, args=overrides, prog=program, config=settings, registry=_as_in_a_recipe())
    try:
        return check(RunConfig.model_validate(given.model_dump(warnings=False)))
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def _as_in_a_recipe() -> ConstructorRegistry:
    """Booleans are true and false, where tyro's own are True and False; and sections are put together unchecked, to be checked as a recipe is."""
    from tyro import MISSING
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    from cluster.config import Config

    registry = ConstructorRegistry()

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, Config)):
            return None
        kind, hints = info.type, get_type_hints(info.type, include_extras=True)

        def unchecked(**values: Any) -> Config:
            return kind.model_construct(**values)

        unchecked.__doc__ = kind.__doc__  # what --help says of the section
        fields = [(name, field.description) for name, field in kind.model_fields.items()]
        given = [StructFieldSpec(name=name, type=hints[name], default=getattr(info.default, name, MISSING), helptext=text) for name, text in fields]
        return StructConstructorSpec(instantiate=unchecked, fields=tuple(given))

    @registry.primitive_rule
    def boolean(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
        if info.type is not bool:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            choices=("true", "false"),
            instance_from_str=lambda words: words[0] == "true",
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: ["true" if value else "false"],
        )

    return registry


def _run_dir(command: Command) -> Path:
    """The run folder, absolute. Under a Ray job a relative one would lie in Ray's package folder and vanish with it."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray for the entrypoint of a job
    if in_job and (command.run_dir is None or not command.run_dir.is_absolute()):
        given, name = command.run_dir or "none", "RUN_DIR" if command.name == "resume" else "--run-dir"
        raise ValueError(f"{name}: must be an absolute path in a Ray job, got {given}; a relative one would lie in Ray's own package folder")
    return (command.run_dir or Path("runs") / f"{command.recipe}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def _bundled() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.toml"))
