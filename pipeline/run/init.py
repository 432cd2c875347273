"""The command `raylign init DIR`: a commented recipe, a reward function and a task to start from.

The files lie in `pipeline/recipes/start` and are copied as they are.
"""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

from cluster.storage import Folder

WHAT = {
    "recipe.toml": "what is done, with which settings",
    "my_task.py": "prompts, and demonstrations of how to answer them",
    "my_reward.py": "what a good answer is",
}


def parse_init(arguments: list[str]) -> Path:
    """The folder that `raylign init` was given. Raises ValueError when it was not given exactly one."""
    from actors.hub import expand

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError(f"DIR: `raylign init` needs one, a new or empty folder, got {' '.join(arguments) or 'none'}")
    return Path(expand(arguments[0]))


def init(folder: Path) -> str:
    """Write the files into a new or empty folder; returns what to tell the user.

    Raises ValueError when the folder holds anything, is a file, or cannot be written; then nothing is written.
    """
    _check_empty(folder)
    source = resources.files("pipeline") / "recipes" / "start"
    try:
        for name in WHAT:
            Folder(folder.absolute()).write_text(name, (source / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"DIR: must be a folder that can be written, got {folder}: {error.strerror}") from error
    lines = "\n".join(f"  {name:<14}{what}" for name, what in WHAT.items())
    return (
        f"raylign init: written into {folder}\n{lines}\nnext: cd {shlex.quote(str(folder))} && raylign run recipe.toml"
    )


def _check_empty(folder: Path) -> None:
    try:
        held = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"DIR: must be a new or empty folder, got {folder}: {error.strerror}") from error
    if held:
        raise ValueError(
            f"DIR: must be a new or empty folder, got {folder}, which holds {', '.join(held[:3])}"
            f"{', ...' if len(held) > 3 else ''}; name another one"
        )
