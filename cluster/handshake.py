"""The handshake: checks that driver and worker run the same code and see the same run folder.

The import names `cluster`, `actors`, `pipeline` are common words, and a node may hold an old copy. Left out: sending
the code. A Ray job ships the working directory; the handshake says where two processes differ.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from cluster.faults import RunError
from cluster.shared import REMEDY, FolderMark

_SETS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "bf16")  # instructions that libraries choose kernels by
_LIBRARIES = ("torch", "ray", "deepspeed", "transformers", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The sources and versions that a process runs, and whether it sees the run folder."""

    files: Mapping[str, str]  # "cluster/pool.py" -> hash of its bytes
    python: str
    versions: Mapping[str, str]  # "torch" -> "2.13.0", "" where it is not installed
    unseen: str = ""  # the reason if it must see the run folder and does not


def fingerprint(packages: Sequence[str], mark: FolderMark | None = None) -> Fingerprint:
    """The fingerprint of this process: sources of these packages, and the versions of Python and libraries.

    mark: the driver's mark in the run folder, if this process reads or writes there.
    """
    files = {name: digest for package in packages for name, digest in _sources(package).items()}
    versions = {library: _version(library) for library in _LIBRARIES}
    return Fingerprint(
        files=files, python=platform.python_version(), versions=versions, unseen=mark.problem() if mark else ""
    )


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The kind of this machine's processor, by what decides how numbers are rounded: `x86_64 AuthenticAMD avx512f`.

    cpuinfo: where Linux describes it.
    """
    try:
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    found = {key.strip(): value.strip() for key, value in lines.items()}
    has = found.get("flags", found.get("Features", "")).split()
    return " ".join(
        filter(None, (platform.machine(), found.get("vendor_id", ""), *(set_ for set_ in _SETS if set_ in has)))
    )


def compare(driver: Fingerprint, worker: Fingerprint, who: str) -> None:
    """Raises RunError naming the files or versions in which `who` differs, or the run folder that it does not see.

    The local part of a version does not count: 2.13.0+cpu and 2.13.0+cu130 are one release, and a CPU head may lead GPU
    nodes.
    """
    ours, theirs = {"python": driver.python, **driver.versions}, {"python": worker.python, **worker.versions}
    differing = [name for name in ours if _release(ours[name]) != _release(theirs[name])]
    versions = [f"{name} is {theirs[name] or 'missing'} there, {ours[name] or 'missing'} here" for name in differing]
    if versions:
        raise RunError(
            who,
            "handshake",
            f"its node has other versions than the driver: {'; '.join(versions)}",
            "Install the same versions on every node.",
        )
    different = sorted(
        name for name in driver.files.keys() | worker.files.keys() if driver.files.get(name) != worker.files.get(name)
    )
    if different:
        packages = sorted({name.split("/")[0] for name in different})
        shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
        raise RunError(
            who,
            "handshake",
            f"it imports another copy of {', '.join(packages)} than the driver, or one edited since the run began "
            f"(different: {shown})",
            "Submit the run as a Ray job, which ships the working directory, or install the same copy on every node.",
        )
    if worker.unseen:
        raise RunError(who, "handshake", worker.unseen, REMEDY)


def _sources(package: str) -> dict[str, str]:
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(next(iter(spec.submodule_search_locations)))
    return {
        f"{package}/{path.relative_to(root).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.py"))
    }


def _release(version: str) -> str:
    return version.partition("+")[0]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
