"""A source's name in a recipe to the files it stands for: paths and globs, anything fsspec opens, data sets of the Hugging Face hub.

A hub data set is read as the Parquet files that the hub itself makes of every data set (branch refs/convert/parquet), through fsspec like any other
file, so that this package's reader sees its rows. Left out: the `datasets` library, which would hide where a row comes from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from pipeline.data.config import DataConfig, Kind
from pipeline.data.problems import DataError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)/(?P<split>[\w.+-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a source. name: as a person knows it."""

    name: str
    fs: Any
    path: str

    def open(self) -> Any:
        """The file's bytes. Raises OSError."""
        return self.fs.open(self.path, "rb")


def find(source: str, field: str) -> list[File]:
    """The files of a source, sorted by name. Raises DataError naming field and source when there are none, or they cannot be asked for."""
    url = hub_url(source) if is_hub(source) else source
    try:
        fs, root = _filesystem(url)
        paths = _matching(fs, root) if _is_pattern(url) else [_file(fs, root)]
    except FileNotFoundError as error:
        raise DataError(_not_found(source, field, url)) from error
    except IsADirectoryError as error:
        raise DataError(f"{field}: must be files, got the folder {source!r}; name them, such as {source.rstrip('/')}/*.jsonl") from error
    except _unreachable() as error:
        raise DataError(_cannot(source, field, error)) from error
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise DataError(f"{field}: must be files that end in {', '.join(SUFFIXES)}, got {path!r}")
    return [File(name=source if len(paths) == 1 and not is_hub(source) else _name(path, url), fs=fs, path=path) for path in paths]


def is_hub(source: str) -> bool:
    """Whether a source is the name of a hub data set: `owner/name`, no URL, not the name of a file, and nothing here is called so."""
    return bool(_HUB.fullmatch(source)) and not source.endswith(SUFFIXES) and not Path(source).exists()


def hub_url(source: str) -> str:
    """`Anthropic/hh-rlhf` to the pattern of its Parquet files on the hub; without config and split, those called default and train."""
    match = cast(re.Match[str], _HUB.fullmatch(source))
    branch = quote("refs/convert/parquet", safe="")
    return f"hf://datasets/{match['name']}@{branch}/{match['config'] or 'default'}/{match['split'] or 'train'}/*.parquet"


def absolute(data: DataConfig) -> DataConfig:
    """The same sources with local paths in full, since workers stand elsewhere."""
    local = {kind: source for kind, source in named(data).items() if "://" not in source and not is_hub(source)}
    return data.model_copy(update={kind: str(Path(source).absolute()) for kind, source in local.items()})


def named(data: DataConfig) -> dict[Kind, str]:
    """The sources that a recipe names, by what they hold."""
    sources: dict[Kind, str] = {"comparisons": data.comparisons, "demonstrations": data.demonstrations, "prompts": data.prompts}
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
            f"{field}: must be a data set of the Hugging Face hub with Parquet files in {url.rpartition('/')[0]}, found none for {source!r}; "
            f"name its configuration and split as owner/name:config/split, or a file as hf://datasets/{source.partition(':')[0]}/FILE.jsonl"
        )
    return f"{field}: must be an existing file, a pattern that fits some, a URL or the name of a Hugging Face data set, got {source!r}"


def _cannot(source: str, field: str, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if is_hub(source) or source.startswith("hf://"):
        return (
            f"{field}: the data set {source!r} must be read from the Hugging Face hub, which cannot be reached or does not give it ({reason}); "
            f"go online (HF_HUB_OFFLINE unset; a gated data set needs `hf auth login`), or download its files and give their path"
        )
    return f"{field}: {source!r} cannot be read ({reason}); check the address, and that the package for this kind of storage is installed"


def _unreachable() -> tuple[type[Exception], ...]:
    """What a filesystem raises when it cannot be asked. The hub's client raises httpx's own errors."""
    try:
        import httpx
    except ImportError:
        return (OSError, ImportError)
    return (OSError, ImportError, httpx.HTTPError)
