"""Where Python finds modules: first the program's own packages, then the user's modules.

`cluster`, `actors` and `pipeline` are common words, and a user's folder may hold packages of these names. So driver and
workers import the program's copies before a user's folder is searched. Ray puts the current folder first on every
worker; here it is told to put the program before that. Left out: sending a user's modules to other machines.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_config import JobConfig

OWN = ("cluster", "actors", "pipeline")
_roots: list[str] = []  # of this process, as sys.path is


def use_roots(folders: Sequence[str]) -> None:
    """Search these folders for modules, in this order, after the program's own; here and in later workers."""
    own = own_root()
    sys.path.insert(0, own)
    try:
        for package in OWN:
            importlib.import_module(package)
    finally:
        sys.path.remove(own)
    _roots[:] = [*dict.fromkeys((*folders, *_roots))]
    sys.path[:0] = [folder for folder in _roots if folder not in sys.path and Path(folder).is_dir()]


def roots() -> tuple[str, ...]:
    """All folders that were given to `use_roots`, the latest first."""
    return tuple(_roots)


def job_config() -> JobConfig | None:
    """The job configuration for `ray.init` with which workers find the program's packages first.

    None where none is needed, as in a Ray job, which ships everything in one folder. It uses a private hook of Ray
    2.60, which a test checks.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    own = own_root()
    if own in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) and not _is_shadowed(Path.cwd()):
        return None  # workers find it where they find Ray
    from ray.job_config import JobConfig

    class OwnFirst(JobConfig):
        def _serialize(self) -> str:
            self._py_driver_sys_path.append(own)  # each folder is put before the earlier ones
            return super()._serialize()  # type: ignore[no-any-return]

    return OwnFirst()


def own_root() -> str:
    """The folder in which the program's own packages lie."""
    return str(Path(__file__).resolve().parents[1])


def _is_shadowed(folder: Path) -> bool:
    return any((folder / name).exists() for package in OWN for name in (package, f"{package}.py"))
