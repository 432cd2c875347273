"""The user's modules: the folders in which they are looked for, and the files that a run calls.

They are looked for in the recipe's folder first, then in the folder where the command was given. A run records both, so
it can be resumed from anywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path

from cluster.imports import OWN
from cluster.storage import Folder, StoredFile
from pipeline.config.run_config import RunConfig
from pipeline.folder.run_folder import HISTORY, read_history


def roots_of(path: Path) -> tuple[str, ...]:
    """The folders in which a recipe's modules are looked for: its own or, for a run's recipe, the recorded ones."""
    folder = path.absolute().parent
    try:
        remembered = json.loads((folder / HISTORY).read_text(encoding="utf-8"))[-1]["roots"]
    except (OSError, ValueError, LookupError, TypeError):
        remembered = []
    bundled = Path(str(resources.files("pipeline") / "recipes"))
    return tuple(map(str, remembered)) or (() if folder == bundled else (str(folder),))


def code_before(path: Path) -> Mapping[str, StoredFile]:
    """The user's modules at the last start of the run whose recipe the file is; none where it is no run's."""
    try:
        return read_history(path.absolute().parent)[-1].code
    except ValueError:
        return {}


def code_of(config: RunConfig, rule: str) -> dict[str, StoredFile]:
    """Import path -> file of each user module that a run calls; all are imported already.

    rule: import path of the task's reward function, or "".
    """
    found = {}
    own = (config.environment.name, config.manager.check, config.reward.function, rule)
    for name in dict.fromkeys((config.task, config.algorithm.name, *own)):
        module = name.partition(":")[0]
        file = getattr(sys.modules.get(module), "__file__", None) if ":" in name else None
        if file and module.partition(".")[0] not in OWN:
            found[name] = replace(Folder(Path(file).parent).stored(Path(file).name), name=file)
    return found


def changes_of(before: Mapping[str, StoredFile], now: Mapping[str, StoredFile]) -> list[str]:
    """One line for each module whose contents have changed since the last start."""
    lines = []
    for name, old in before.items():
        new = now.get(name)
        if new is not None and new.checksum != old.checksum:
            where = (
                f"{new.name} is not what it was"
                if new.name == old.name
                else f"it is {new.name} now, it was {old.name} with other contents"
            )
            lines.append(f"the code of {name} has changed, {where}: the run goes on with it as it is")
    return lines


@contextmanager
def told_where(before: Mapping[str, StoredFile]) -> Iterator[None]:
    """Add to any ValueError raised inside where missing modules were at the last start."""
    try:
        yield
    except ValueError as error:
        gone = [f"{name} was in {file.name}" for name, file in before.items() if not Path(file.name).is_file()]
        if not gone:
            raise
        raise ValueError(f"{error}; when the run was last started, {', '.join(gone)}") from error
