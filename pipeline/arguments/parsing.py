"""The arguments of a command: its name, its recipe or run, its overrides.

Everything is checked before Ray, torch or DeepSpeed are imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.arguments.overrides import configuration
from pipeline.arguments.usage import bundled

if TYPE_CHECKING:
    from pipeline.chat.options import ChatOptions
    from pipeline.config.run_config import RunConfig
    from pipeline.folder.manifests import StageName
    from pipeline.plan.comparison import Comparison

UNTIL: dict[str, StageName] = {
    "quickstart": "evaluate",
    "run": "evaluate",
    "sft": "sft",
    "reward": "reward",
    "train": "rl",
}
_OF_RECIPE = (*UNTIL, "plan")
_OF_RUN = ("resume", "ledger", "replay", "chat")
_EVALUATE = "evaluate"  # of a recipe or of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A parsed and checked command line.

    recipe: of a new run. run_dir: the folder of the new run, or of the run that the command is about. push:
    repository of the Hugging Face hub that the policy goes to when all is done, `owner/name`; "" for none.
    """

    name: str
    recipe: str = ""
    run_dir: Path | None = None
    config: RunConfig
    allowed: tuple[str, ...] = ()
    step: int = 0
    comparison: Comparison | None = None
    push: str = ""
    chat: ChatOptions | None = None


def parse(arguments: Sequence[str]) -> Command:
    """Command, recipe or run folder, and overrides. Raises ValueError for whatever is wrong with them."""
    name, rest = arguments[0], list(arguments[1:])
    if name in _OF_RECIPE:
        return _parse_recipe(name, rest)
    if name in _OF_RUN:
        return _parse_run(name, rest)
    if name == _EVALUATE:
        return _parse_evaluate(rest)
    known = ", ".join((*_OF_RECIPE, "init", "submit", "push", *_OF_RUN))
    raise ValueError(f"command: must be {known} or {_EVALUATE}, got {name!r}; see raylign --help")


def _parse_recipe(name: str, rest: list[str]) -> Command:
    from pipeline.config.recipe import recipe_path

    recipe = "quickstart"
    if name != "quickstart":
        if not rest or rest[0].startswith("-"):
            raise ValueError(f"recipe: `raylign {name}` needs one, a TOML file or one of {', '.join(bundled())}")
        recipe = rest.pop(0)
    program = "raylign quickstart" if name == "quickstart" else f"raylign {name} {recipe}"
    parser = settings_parser(program, "[--run-dir DIR] [--section.field value ...]")
    parser.add_argument("--run-dir", type=_path)
    if UNTIL.get(name) == "evaluate":
        parser.add_argument("--push", default="")
    known, overrides = parser.parse_known_args(rest)
    path = recipe_path(recipe)
    config = configuration(path, known.algorithm, overrides, program)
    push = getattr(known, "push", "")
    return Command(name=name, recipe=path.stem, run_dir=known.run_dir, config=config, push=push)


def _parse_run(name: str, rest: list[str]) -> Command:
    if not rest or rest[0].startswith("-"):
        raise ValueError(f"RUN_DIR: `raylign {name}` needs one, the folder of a run")
    if name == "resume" and "://" in rest[0]:
        return _parse_stored(rest.pop(0), rest)
    run_dir, program = _path(rest.pop(0)), f"raylign {name} RUN_DIR"
    recipe = run_dir / "config.toml"
    if not recipe.is_file():
        raise ValueError(
            f"RUN_DIR: must be the folder of a run, got {run_dir}, which has no config.toml; `raylign run RECIPE` "
            "makes one"
        )
    if name == "resume":
        parser = settings_parser(program, "[--allow-change KEY ...] [--section.field value ...]")
        parser.add_argument("--allow-change", nargs="+", action="extend", default=[])
        parser.add_argument("--push", default="")
        known, overrides = parser.parse_known_args(rest)
        config = configuration(recipe, known.algorithm, overrides, program)
        allowed = tuple(known.allow_change)
        return Command(name=name, run_dir=run_dir, config=config, allowed=allowed, push=known.push)
    if name == "chat":
        chat = _chat_options(program, rest)
        return Command(name=name, run_dir=run_dir, config=configuration(recipe, "", [], program), chat=chat)
    parser = settings_parser(program, "--step N" if name == "replay" else "")
    if name == "replay":
        parser.add_argument("--step", type=int, required=True)
    step = getattr(parser.parse_args(rest), "step", 0)
    return Command(name=name, run_dir=run_dir, config=configuration(recipe, "", [], program), step=step)


def _chat_options(program: str, rest: list[str]) -> ChatOptions:
    """Raises ValueError for a value that is out of its range."""
    from pipeline.chat.options import ChatOptions

    parser = settings_parser(program, "[--temperature X] [--max-tokens N] [--seed N] [--web] [--port N]")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--web", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    return ChatOptions(**vars(parser.parse_args(rest)))


def _parse_stored(url: str, rest: list[str]) -> Command:
    """`resume URL --run-dir NEW`: the run that is on a storage, with the settings that it has there."""
    from cluster.filesystems import check_url
    from pipeline.run.fetch import recipe_of

    check_url("URL", url)
    program = "raylign resume URL"
    parser = settings_parser(program, "--run-dir NEW [--allow-change KEY ...] [--section.field value ...]")
    parser.add_argument("--run-dir", type=_path)
    parser.add_argument("--allow-change", nargs="+", action="extend", default=[])
    parser.add_argument("--push", default="")
    known, overrides = parser.parse_known_args(rest)
    run_dir = known.run_dir
    if run_dir is None or (run_dir.exists() and (not run_dir.is_dir() or (run_dir / "history.json").exists())):
        raise ValueError(
            f"--run-dir: must be a new or empty folder, into which the run is fetched, got {run_dir or 'none'}; a run "
            "that is in a folder already goes on with `raylign resume RUN_DIR`"
        )
    with recipe_of(url) as recipe:
        config = configuration(recipe, known.algorithm, ["--cluster.storage", url, *overrides], program)
    allowed = tuple(known.allow_change)
    return Command(name="resume", run_dir=run_dir, config=config, allowed=allowed, push=known.push)


def _parse_evaluate(rest: list[str]) -> Command:
    """TARGET is a run folder, whose recipe and models are taken, or a recipe.

    Models by name stay as they are; see pipeline/plan/comparison.py.
    """
    from actors.hub import expand
    from pipeline.config.recipe import recipe_path
    from pipeline.plan.comparison import Comparison

    if not rest or rest[0].startswith("-"):
        raise ValueError("TARGET: `raylign evaluate` needs one, the folder of a run or a recipe")
    target = _path(rest.pop(0))
    run_dir = target.absolute() if (target / "config.toml").is_file() else None
    if run_dir is None and target.is_dir():
        raise ValueError(
            f"TARGET: must be the folder of a run or a recipe, got {target}, a folder without "
            "config.toml; to compare models: "
            "raylign evaluate RECIPE --policy DIR --baseline DIR"
        )
    program = "raylign evaluate TARGET"
    parser = settings_parser(
        program, "[--policy DIR] [--baseline DIR] [--reward-model DIR] [--out DIR] [--section.field value ...]"
    )
    for option in ("--policy", "--baseline", "--reward-model"):
        parser.add_argument(option, default="", type=expand)
    parser.add_argument("--out", type=_path)
    known, overrides = parser.parse_known_args(rest)
    path = run_dir / "config.toml" if run_dir else recipe_path(str(target))
    config = configuration(path, known.algorithm, overrides, program)
    comparison = Comparison.of(
        config,
        run_dir,
        policy=known.policy,
        baseline=known.baseline,
        reward_model=known.reward_model,
        out=known.out,
        recipe=path.stem,
    )
    return Command(name=_EVALUATE, run_dir=run_dir, config=config, comparison=comparison)


def _path(given: str) -> Path:
    """A path as a user wrote it. Raises ValueError for what no path can be."""
    from actors.hub import expand

    return Path(expand(given))


def settings_parser(program: str, usage: str) -> argparse.ArgumentParser:
    """A parser of a command's own options; what it leaves are settings of the recipe, if `usage` has them."""
    parser = argparse.ArgumentParser(prog=program, usage=f"{program} {usage}", add_help=False, allow_abbrev=False)
    if "--section.field" in usage:
        parser.add_argument("--algorithm.name", dest="algorithm", default="")  # decides which other settings there are
    return parser
