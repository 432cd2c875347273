"""Recipes: found by name, read from TOML, their paths in full, and written with every default spelled out."""

from __future__ import annotations

import glob
import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from actors.hub import expand
from cluster.storage import Folder
from pipeline.algorithms.registry import algorithm_class
from pipeline.config.errors import explain
from pipeline.config.rules import check
from pipeline.config.run_config import RunConfig
from pipeline.data.sources import is_local, sources_of


def recipe_path(recipe: str) -> Path:
    """A recipe by file name, or by the name of one that comes with the package. Raises ValueError listing those."""
    path = Path(expand(recipe))
    if path.exists() and not path.is_dir():  # a pipe, too
        return path
    bundled = {
        p.name.removesuffix(".toml"): p
        for p in (resources.files("pipeline") / "recipes").iterdir()
        if p.name.endswith(".toml")
    }
    if recipe in bundled:
        return Path(str(bundled[recipe]))
    what = (
        ", the folder of a run, which `raylign resume` goes on with"
        if (path / "config.toml").is_file()
        else ", a folder"
        if path.is_dir()
        else ""
    )
    raise ValueError(f"recipe: must be a TOML file or one of {sorted(bundled)}, got {recipe!r}{what}")


def load(path: Path, algorithm: str = "", *, checked: bool = True) -> RunConfig:
    """Read a recipe; a user's own algorithm is imported.

    algorithm: the name of another algorithm than the recipe's; it keeps those of the recipe's settings that it has.
    checked: check that fields go together; False if some will be overridden.

    Raises ValueError with one line a fault, each naming field, rule and value.
    """
    recipe = read_toml(path)
    if algorithm:
        recipe = _with_algorithm(recipe, algorithm)
    try:
        config = _located(RunConfig.model_validate(recipe), path.parent)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, recipe)}") from error
    return check(config) if checked else config


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; a byte order mark is fine.

    Raises ValueError in one line for one that cannot be read or is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: must be a file that can be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: must be TOML: byte {error.start + 1} is not UTF-8; save it as text in UTF-8"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # not only TOMLDecodeError: a number of 5,000 digits, a list in a list a thousand times
        raise ValueError(f"{path}: must be TOML: {str(error).partition(chr(10))[0]}") from error


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, every default spelled out."""
    Folder(path.parent).write_text(path.name, as_toml(config.model_dump(mode="json")))


def as_toml(values: Mapping[str, Any]) -> str:
    """The text of a recipe with these values."""
    return tomli_w.dumps(values)


def absolute(model: str) -> str:
    """The absolute path of a local model, because workers run in other folders; a hub name or "" is unchanged."""
    return str(Path(model).absolute()) if model and os.path.isdir(model) else model


def located(name: str, folder: Path) -> str:
    """A path or pattern of a recipe, relative to its `folder` or else to the current one; unchanged if in neither."""
    if not name or "://" in name or name.startswith("~") or Path(name).is_absolute():
        return name
    for base in (folder.absolute(), Path.cwd()):
        if (base / name).exists() or glob.glob(f"{glob.escape(str(base))}/{name}", recursive=True):
            return str(base / name)
    return name


def _located(config: RunConfig, folder: Path) -> RunConfig:
    """A recipe read from a file in `folder`, its local paths in full.

    A source that is nowhere is one of that folder, as will be said of it.
    """
    data: dict[str, str] = {key: located(source, folder) for key, source in sources_of(config.data).items()}
    data |= {
        key: str(folder.absolute() / source)
        for key, source in data.items()
        if is_local(source) and not source.startswith("~")
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update={"path": located(config.model.path, folder)}),
            "reward": config.reward.model_copy(update={"model": located(config.reward.model, folder)}),
            "environment": config.environment.model_copy(
                update={"partner": located(config.environment.partner, folder)}
            ),
        }
    )


def _with_algorithm(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe with another algorithm; with its name alone where there is none of that name."""
    try:
        known = algorithm_class(name).model_fields
    except ValueError:  # as will be said of it
        return recipe | {"algorithm": {"name": name}}
    section = recipe.get("algorithm")
    kept = {key: value for key, value in section.items() if key in known} if isinstance(section, dict) else {}
    return recipe | {"algorithm": kept | {"name": name}}
