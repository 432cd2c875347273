"""The files of a source: paths and patterns, URLs that fsspec opens, data sets of the Hugging Face hub.

A hub data set is read as the Parquet files that the hub makes of every data set (branch refs/convert/parquet), through
fsspec like any other file. Left out: the `datasets` library, which would hide where a row comes from.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from actors.hub import is_path
from pipeline.data.config import DataConfig, Kind
from pipeline.tasks.task import DataError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)/(?P<split>[\w.+-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a source. name: as messages show it; path: as the filesystem `fs` takes it."""

    name: str
    fs: Any
    path: str

    def open(self) -> Any:
        """Open the file for reading bytes. Raises OSError."""
        return self.fs.open(self.path, "rb")


def find(source: str, field: str) -> list[File]:
    """The files of a source, sorted by name.

    Raises DataError naming field and source when there are none, or when the filesystem cannot be reached.
    """
    url = hub_url(source) if is_hub(source) else source
    try:
        fs, root = _filesystem(url)
        paths = _matching(fs, root) if _is_pattern(url) else [_file(fs, root)]
    except FileNotFoundError as error:
        raise DataError(_not_found(source, field, url)) from error
    except IsADirectoryError as error:
        raise DataError(
            f"{field}: must be files, got the folder {source!r}; name them, such as {source.rstrip('/')}/*.jsonl"
        ) from error
    except _unreachable() as error:
        raise DataError(_cannot(source, field, error)) from error
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise DataError(f"{field}: must be files that end in {', '.join(SUFFIXES)}, got {path!r}")
    return [
        File(name=source if len(paths) == 1 and not is_hub(source) else _name(path, url), fs=fs, path=path)
        for path in paths
    ]


def is_hub(source: str) -> bool:
    """Whether a source names a hub data set: `owner/name`, no URL, and not a path, not even a mistyped one."""
    return bool(_HUB.fullmatch(source)) and not is_path(source.partition(":")[0])


def is_local(source: str) -> bool:
    """Whether a source is a path or pattern on this machine."""
    return "://" not in source and not is_hub(source)


def hub_url(source: str) -> str:
    """The pattern of the Parquet files of a hub data set; default/train unless the source names config and split."""
    match = cast(re.Match[str], _HUB.fullmatch(source))
    branch = quote("refs/convert/parquet", safe="")
    return (
        f"hf://datasets/{match['name']}@{branch}/{match['config'] or 'default'}/{match['split'] or 'train'}/*.parquet"
    )


def absolute(data: DataConfig) -> DataConfig:
    """The same sources with absolute local paths, because workers run in other folders."""
    local = {kind: source for kind, source in sources_of(data).items() if is_local(source)}
    return data.model_copy(update={kind: str(Path(source).absolute()) for kind, source in local.items()})


def sources_of(data: DataConfig) -> dict[Kind, str]:
    """The sources that a recipe names, by what they hold."""
    sources: dict[Kind, str] = {
        "comparisons": data.comparisons,
        "demonstrations": data.demonstrations,
        "prompts": data.prompts,
    }
    return {kind: source for kind, source in sources.items() if source}


def _matching(fs: Any, pattern: str) -> list[str]:
    if not (paths := sorted(str(path) for path in fs.glob(pattern))):
        raise FileNotFoundError(pattern)
    return paths


def _file(fs: Any, path: str) -> str:
    if fs.info(path)["type"] == "directory":
        raise IsADirectoryError(path)
    return path


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url if "://" in url else str(Path(url).absolute()))
    except ValueError as error:  # a protocol that fsspec does not know
        raise OSError(str(error)) from error
    return fs, root


def _is_pattern(url: str) -> bool:
    return bool({"*", "?", "["} & set(url)) and not ("://" not in url and Path(url).exists())


def _name(path: str, url: str) -> str:
    return f"{url.partition('://')[0]}://{path}" if "://" in url else path


def _not_found(source: str, field: str, url: str) -> str:
    if is_hub(source):
        return (
            f"{field}: must be a data set of the Hugging Face hub with Parquet files in {url.rpartition('/')[0]}, "
            f"found none for {source!r}; "
            "name its configuration and split as owner/name:config/split, or a file as "
            f"hf://datasets/{source.partition(':')[0]}/FILE.jsonl"
        )
    return (
        f"{field}: must be an existing file, a pattern that fits some, a URL or the name of a Hugging Face data set, "
        f"got {source!r}"
    )


def _cannot(source: str, field: str, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if is_hub(source) or source.startswith("hf://"):
        return (
            f"{field}: the data set {source!r} must be read from the Hugging Face hub, which cannot be reached or does "
            f"not give it ({reason}); "
            "go online (HF_HUB_OFFLINE unset; a gated data set needs `hf auth login`), or download its files and give "
            "their path"
        )
    return (
        f"{field}: {source!r} cannot be read ({reason}); check the address, and that the package for this kind of "
        "storage is installed"
    )


def _unreachable() -> tuple[type[Exception], ...]:
    """The errors of a filesystem that cannot be reached. The hub's client raises those of httpx."""
    found: list[type[Exception]] = [OSError, ImportError]
    for name in ("httpx", "httpx2"):  # its name depends on the version
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return tuple(found)
