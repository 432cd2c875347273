"""The folder that a job is sent with: the program's own packages, the user's folder, and the recipe as it was checked.

    pack(folder, recipe) --> Package: a fresh folder, its size, what is large in it

What no job needs is left out by a list of names (`LEFT_OUT`), whatever a `.gitignore` says: Ray would leave out what
that names without a word. Files that look like secrets stay at home.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.imports import OWN, own_root

LIMIT = 100 * 1024 * 1024  # bytes that Ray takes, compressed; here they are counted as they are
LEFT_OUT = (
    *(".git", ".hg", ".svn", ".venv", "venv", "env", "node_modules", "__pycache__", "*.pyc", "*.egg-info", "*.egg"),
    *(".*_cache", ".cache", ".hypothesis", ".ipynb_checkpoints", ".tox", ".nox", "build", "dist", "site-packages"),
    *("runs", "wandb", "mlruns", "lightning_logs", ".DS_Store", ".gitignore", ".rayignore"),
    *(".env", ".env.*", "*.pem", "*.key", ".ssh", ".aws", ".netrc"),
)
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A folder that is ready to be sent. size: in bytes."""

    folder: Path
    files: int
    size: int


def pack(folder: Path, recipe: str, text: str, into: Path) -> Package:
    """Copy what a job needs into the empty folder `into`.

    folder: of the user, where import paths and relative paths begin. recipe: the name under which `text`, the recipe,
    is added. Raises ValueError when all of it would be larger than LIMIT, before anything is copied.
    """
    found = {path.relative_to(folder): path for path in _files(folder)}
    own = Path(own_root())
    for package in OWN:  # the program's packages win over a user's of the same name, as everywhere
        found = {name: path for name, path in found.items() if name.parts[0] not in (package, f"{package}.py")}
        found |= {path.relative_to(own): path for path in _files(own / package)}
    sizes = {name: path.stat().st_size for name, path in found.items()}
    size = sum(sizes.values()) + len(text.encode())
    if size > LIMIT:
        raise ValueError(_too_large(folder, size, sizes))
    for name, path in found.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into / name)
    (into / recipe).write_text(text, encoding="utf-8")
    return Package(folder=into, files=len(found) + 1, size=size)


def megabytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 1024 / 1024:.1f} MB"


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, in order, without those that are left out. Links to folders are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_left_out(name))
        yield from (path for name in sorted(files) if not _is_left_out(name) and (path := Path(place, name)).is_file())


def _is_left_out(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT)


def _too_large(folder: Path, size: int, sizes: dict[Path, int]) -> str:
    """What is wrong with a folder that is too large, and what is large in it: files, and folders of many files."""
    weights = dict[Path, int]()
    for name, own in sizes.items():
        top = Path(*name.parts[:2])
        weights[top] = weights.get(top, 0) + own
    largest = sorted(weights.items(), key=lambda item: -item[1])[:_SHOWN]
    told = ", ".join(f"{name} ({megabytes(own)})" for name, own in largest)
    return (
        f"working directory: what is sent with a job must be at most {megabytes(LIMIT)}, got {megabytes(size)} in "
        f"{folder}; the largest are {told}. Move data and models to a folder that all nodes see and name them by their "
        "absolute paths, or submit from another folder"
    )
