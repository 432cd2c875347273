"""The command line. Parses and checks everything before Ray, torch or DeepSpeed are imported.

    raylign COMMAND [RECIPE] [--run-dir DIR] [--section.field value ...]

Overrides are generated from the configuration's own types (tyro), so there is no second list of options.
Exit codes: 0 done, 1 the run failed, 2 the command or its configuration is wrong, 130 interrupted, 143 terminated.
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

    from pipeline.config import RunConfig

HELP = ("-h", "--help")
USAGE = """\
raylign: reinforcement learning from human feedback for causal language models, on Ray

  raylign quickstart                 fine-tune a small GPT-2 on small talk, then PPO towards friendly replies
  raylign train RECIPE               run a recipe: a TOML file, or one of those below
  raylign plan RECIPE                what a recipe would run: processes, placement, batch arithmetic, memory; starts nothing

  --run-dir DIR                      where the run is written (default runs/<recipe>-<time>)
  --section.field value              override a setting; `raylign train RECIPE --help` lists them all

recipes: {recipes}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A parsed and checked command line."""

    name: str
    recipe: str
    run_dir: Path | None
    config: RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what is wrong is said on stderr in one screen, without a traceback where the fault is not ours."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's reward function is named by import path from where they stand
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in (*HELP, "help") or (arguments[0] in ("train", "plan") and arguments[1:] and arguments[1] in HELP):
        print(USAGE.format(recipes=", ".join(_bundled())), end="")
        return 0 if arguments else 2
    try:
        command = parse(arguments)
    except ValueError as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2
    return run(command)


def parse(arguments: Sequence[str]) -> Command:
    """Command, recipe and overrides. Raises ValueError for whatever is wrong with them."""
    from pipeline.config import load, recipe_path

    name, rest = arguments[0], list(arguments[1:])
    if name not in ("quickstart", "train", "plan"):
        raise ValueError(f"command: must be quickstart, train or plan, got {name!r}; see raylign --help")
    recipe = "quickstart"
    if name != "quickstart":
        if not rest or rest[0].startswith("-"):
            raise ValueError(f"recipe: `raylign {name}` needs one, a TOML file or one of {', '.join(_bundled())}")
        recipe = rest.pop(0)
    program = "raylign quickstart" if name == "quickstart" else f"raylign {name} {recipe}"
    parser = argparse.ArgumentParser(prog=program, usage=f"{program} [--run-dir DIR] [--section.field value ...]", add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--algorithm.name", dest="algorithm", default="")  # decides which other settings there are
    known, overrides = parser.parse_known_args(rest)
    path = recipe_path(recipe)
    return Command(name=name, recipe=path.stem, run_dir=known.run_dir, config=_override(load(path, known.algorithm), overrides, program))


def run(command: Command) -> int:
    """Carry out a parsed command. Returns the exit code."""
    from rich.console import Console

    from cluster.faults import RunError

    console = Console()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if command.name == "plan":
            from pipeline.plan import show

            show(command.config, console)
            return 0
        run_dir = _run_dir(command)
        from pipeline.run import train

        train(command.config, run_dir, console)
    except (ValueError, RunError) as error:
        print(f"raylign: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("raylign: interrupted", file=sys.stderr)
        return 130
    return 0


def _terminated(number: int, frame: object) -> None:
    """Leave through every `finally` and `__exit__`, as Ctrl-C does."""
    raise SystemExit(128 + number)


def _override(config: RunConfig, overrides: list[str], program: str) -> RunConfig:
    if not overrides:
        return config
    import tyro

    from pipeline.config import RunConfig, check

    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return check(tyro.cli(RunConfig, default=config, args=overrides, prog=program, config=settings, registry=_toml_booleans()))


def _toml_booleans() -> ConstructorRegistry:
    """true and false, as in a recipe; tyro's own are Python's True and False."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

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
        given = command.run_dir or "none"
        raise ValueError(f"--run-dir: must be an absolute path in a Ray job, got {given}; a relative one would lie in Ray's own package folder")
    return (command.run_dir or Path("runs") / f"{command.recipe}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def _bundled() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.toml"))
