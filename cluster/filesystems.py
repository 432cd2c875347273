"""The filesystem of a URL: S3 by pyarrow, everything else by fsspec's drivers.

pyarrow's client of S3 is installed anyway, and its requests end by themselves when a server falls silent. It finds
credentials and region as every program of Amazon's does: environment, `~/.aws`, the role of the machine. Other servers
that speak S3 are named by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL. Left out: credentials in a URL, which would end up
in config.toml and in logs.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any
from urllib.parse import urlsplit

_ATTEMPTS = 3  # of a single request, by the client itself; remote.py has the deadline
_CONNECT_S, _SILENCE_S = 10.0, 20.0  # the longest wait for a connection, and for a byte
# A `/` in a key makes no folder there, and some drivers would try to make the bucket.
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory")


def check_url(field: str, url: str) -> None:
    """Raises ValueError for a URL that cannot name a folder on a storage, or that holds a secret."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{field}: must be a URL without user, password, ? and #, got one for {parts.scheme}://"
            f"{parts.netloc.rpartition('@')[2]}; give credentials in the environment, such as AWS_ACCESS_KEY_ID, and "
            "another server in AWS_ENDPOINT_URL"
        )
    has_folder = parts.path.strip("/") and (parts.netloc or parts.path.startswith("/"))
    if not parts.scheme or "://" not in url or not has_folder:
        raise ValueError(
            f"{field}: must be a URL of a folder, such as s3://bucket/runs/first or file:///mnt/runs/first, got {url!r}"
        )


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a path or URL, and the path in it.

    Raises ValueError for a protocol that fsspec does not know, ImportError for one whose driver is not installed.
    """
    from fsspec.core import url_to_fs

    if url.startswith("s3://"):
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _s3(named or ""), url.removeprefix("s3://")
    filesystem, path = url_to_fs(url)
    return filesystem, path


def has_folders(url: str) -> bool:
    """Whether a folder must be made there before a file can be written into it."""
    return url.partition("://")[0] not in _OBJECT_STORES


def sizes_below(filesystem: Any, path: str) -> dict[str, int]:
    """Path -> bytes of every file in a folder and below it; empty if there is none."""
    from fsspec.implementations.arrow import ArrowFSWrapper

    if isinstance(filesystem, ArrowFSWrapper):  # its own `find` asks once for each folder
        from pyarrow.fs import FileSelector, FileType

        found = filesystem.fs.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        return {info.path: int(info.size) for info in found if info.type == FileType.File}
    filesystem.invalidate_cache()
    return {name: int(entry["size"]) for name, entry in filesystem.find(path, detail=True).items()}


@cache
def _s3(endpoint: str) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    server = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    client = S3FileSystem(
        **({"endpoint_override": server.netloc, "scheme": server.scheme} if endpoint else {}),
        connect_timeout=_CONNECT_S,
        request_timeout=_SILENCE_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        allow_delayed_open=True,  # a small file is one request
    )
    return ArrowFSWrapper(client, skip_instance_cache=True)
