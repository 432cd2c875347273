"""A folder on a remote storage, whose every call is repeated until it succeeds or its time is over.

A storage refuses requests when it is busy (503) and connections break; neither may end a run. The pauses between two
attempts double, with a random part, up to half a minute. Not repeated is what another attempt cannot change: a wrong
key, a missing bucket. Left out: the client's own attempts (filesystems.py), which come on top and end by themselves.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cluster.filesystems import check_url
from cluster.storage import Folder, StoredFile

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_PROBE = ".writable"
_AT_ONCE = 8  # calls
_CHECK_S = 60.0  # the longest wait before a run, when somebody may be watching
# pyarrow's names; other drivers raise PermissionError
_DENIED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH)"
)
_NO_BUCKET = re.compile(r"AWS Error NO_SUCH_BUCKET")

S = TypeVar("S")
T = TypeVar("T")


class RemoteError(OSError):
    """A call that did not succeed, after all its attempts."""


class RemoteFolder:
    """A folder by its URL. Its methods may be called in several threads at once.

    They raise RemoteError when a call did not succeed in `patience_s` seconds, and FileNotFoundError for a file, or a
    bucket, that is not there.
    """

    def __init__(self, url: str, patience_s: float) -> None:
        """Raises ValueError or ImportError for a URL that this machine cannot speak to."""
        self.url = url.rstrip("/")
        self._folder = Folder(self.url)
        self._patience_s = patience_s
        self._gives_up = threading.Event()

    @classmethod
    def checked(cls, field: str, url: str, patience_s: float) -> RemoteFolder:
        """The folder, in which a file was written and removed.

        Raises ValueError, naming the setting `field`, for whatever keeps this machine from writing there.
        """
        check_url(field, url)
        try:
            probing = cls(url, min(patience_s, _CHECK_S))
            probing.put_text(_PROBE, "")
            probing.remove(_PROBE)
        except ImportError as error:
            raise ValueError(
                f"{field}: must be a URL whose driver is installed, got {url}: {error}; install it with pip"
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{field}: must be a folder that this machine can write to, got {url}: {error}; {_remedy(error)}"
            ) from error
        return cls(url, patience_s)

    def put(self, path: Path, name: str) -> StoredFile:
        """Copy a local file to here; afterwards it is there with its size. Returns what was copied.

        Raises FileNotFoundError also when there is no such local file.
        """

        def put() -> StoredFile:
            stored = self._folder.copy_in(path, name)
            self._check(stored)
            return stored

        return self._until_done(f"writing {name}", put)

    def put_text(self, name: str, text: str) -> None:
        self._until_done(f"writing {name}", lambda: self._folder.write_text(name, text))

    def get(self, name: str, path: Path) -> StoredFile:
        """Copy a file to a local path; returns what was copied."""
        return self._until_done(f"reading {name}", lambda: self._folder.copy_out(name, path))

    def text(self, name: str) -> str | None:
        """The text of a file; None if there is none. Raises ValueError if it is not UTF-8."""
        try:
            return self._until_done(f"reading {name}", lambda: self._folder.read_text(name))
        except FileNotFoundError:
            return None

    def sizes(self, below: str = "") -> dict[str, int]:
        """Name -> bytes of every file in a folder in this one and below it."""
        return self._until_done(f"listing {below or 'it'}", lambda: self._folder.sizes(below))

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        self._until_done(f"removing {name}", lambda: self._folder.remove_file(name))

    def at_once(self, call: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Call the function with each of the items, some at once; returns what it returned, in their order.

        When one call raises, those in other threads fail after their present attempt.
        """
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="storage") as threads:
            try:
                return list(threads.map(call, items))
            except BaseException:
                self._gives_up.set()
                threads.shutdown(cancel_futures=True)
                self._gives_up.clear()
                raise

    def _check(self, stored: StoredFile) -> None:
        if problem := self._folder.unseen([stored], 0):
            raise OSError(f"{problem}, though it was just written")

    def _until_done(self, doing: str, call: Callable[[], T]) -> T:
        started, pause, attempts = time.monotonic(), _FIRST_PAUSE_S, 0
        while True:
            attempts += 1
            try:
                return call()
            except (FileNotFoundError, UnicodeDecodeError):
                raise
            except Exception as error:  # every driver has errors of its own
                text = f"{doing} in {self.url}: {_first_line(error)}"
                if _is_final(error):
                    raise RemoteError(text) from error
                waited = time.monotonic() - started
                if waited + pause > self._patience_s or self._gives_up.is_set():
                    raise RemoteError(f"{text} ({attempts} attempts in {waited:.0f} s)") from error
                log.warning("%s; trying again in %.1f s", text, pause)
            # not from the generators whose state belongs to the run
            self._gives_up.wait(pause * (0.5 + secrets.randbelow(1000) / 2000))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would meet the same error."""
    if isinstance(error, PermissionError | NotImplementedError):
        return True
    return bool(_DENIED.search(str(error)) or _NO_BUCKET.search(str(error)))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _remedy(error: BaseException) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, PermissionError) or _DENIED.search(str(cause)):
        return (
            "give this machine credentials that may read, write, list and delete there, in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), in ~/.aws, or by its role"
        )
    if isinstance(cause, FileNotFoundError) or _NO_BUCKET.search(str(cause)):
        return "make the bucket first, or correct its name"
    return "check the URL, the network and, for a server of your own, AWS_ENDPOINT_URL"
