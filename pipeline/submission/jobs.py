"""The jobs of a Ray cluster, through its dashboard: submit one, follow its log, stop it.

Every request has a deadline. A connection that is lost while a log is followed is made again, since the job does not
know of it; only a head that does not answer for `GIVE_UP_S` ends the following, and even then not the job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.dashboard import job_client
from cluster.faults import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

QUIET_S, GIVE_UP_S = 15.0, 300.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SIGTERM = 143  # exit code of a run that was stopped
_PHASE = "talking to the cluster's dashboard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it. metadata: what was given when it was submitted. exit_code: of its driver."""

    name: str
    status: str
    metadata: Mapping[str, str]
    message: str
    exit_code: int | None
    started: int

    @property
    def is_over(self) -> bool:
        """Whether it has ended, however."""
        return self.status in ENDED

    @property
    def code(self) -> int:
        """The exit code that stands for its end: that of its driver, if that is known."""
        if self.status == "SUCCEEDED":
            return 0
        return SIGTERM if self.status == "STOPPED" else self.exit_code or 1


@dataclass(slots=True)
class _Written:
    """How much of a log is written, in characters, and how much of it this connection has sent."""

    write: Callable[[str], None]
    written: int = 0
    seen: int = 0

    def take(self, text: str) -> None:
        """Write what of the next text is new."""
        fresh = text[max(0, self.written - self.seen) :]
        self.seen += len(text)
        if fresh:
            self.write(fresh)
            self.written = self.seen


class Jobs:
    """The jobs of the cluster whose dashboard is at an address."""

    def __init__(self, address: str) -> None:
        """address: http://HEAD:8265. Raises RunError when nobody answers there, or the token is wrong."""
        self.address = address
        self._retry_s = 1.0
        with self._told():
            self._client = job_client(self.address)

    def submit(
        self,
        *,
        name: str,
        entrypoint: str,
        folder: Path,
        metadata: Mapping[str, str],
        cpus: float = 0,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Submit a job. folder: what it is sent with. cpus, labels: of the node that its driver runs on."""
        with self._told():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(folder)},
                metadata=dict(metadata),
                entrypoint_num_cpus=cpus or None,
                entrypoint_label_selector=dict(labels) if labels else None,
            )

    def all(self) -> list[Job]:
        """All jobs that were submitted to the cluster, the oldest first."""
        with self._told():
            found = [_job(info) for info in self._client.list_jobs() if info.submission_id]
        return sorted(found, key=lambda job: (job.started, job.name))

    def get(self, name: str) -> Job:
        """One job, as it stands now."""
        with self._told():
            return _job(self._client.get_job_info(name))

    def stop(self, name: str, timeout_s: float) -> Job:
        """Ask a job to stop, and wait until it has. Raises RunError when it has not after `timeout_s`."""
        with self._told():
            self._client.stop_job(name)
        until = time.monotonic() + timeout_s
        while not (job := self.get(name)).is_over:
            if time.monotonic() > until:
                raise RunError("cluster", f"stopping job {name}", f"it is still {job.status} after {timeout_s:g} s")
            time.sleep(0.5)
        return job

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Write the log of a job until it ends, from its beginning; returns how it ended.

        Raises RunError when the head does not answer for GIVE_UP_S; the job goes on all the same.
        """
        log, lost_since = _Written(write), 0.0
        while True:
            try:
                asyncio.run(self._tail(name, log))
                job = self.get(name)
            except RunError as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > GIVE_UP_S:
                    raise RunError(
                        "driver", f"following job {name}", error.cause, "The job may go on; attach to it later."
                    ) from error
            else:
                lost_since = 0.0
                if job.is_over:
                    asyncio.run(self._tail(name, log))  # what it wrote last
                    return job
            time.sleep(self._retry_s)

    async def _tail(self, name: str, log: _Written) -> None:
        """Write what is new in the log, which Ray sends from its beginning, until it ends or falls silent."""
        log.seen = 0
        lines: AsyncIterator[str] = self._client.tail_job_logs(name)
        try:
            while True:
                log.take(await asyncio.wait_for(anext(lines), QUIET_S))
        except (StopAsyncIteration, TimeoutError):
            return
        except Exception as error:  # aiohttp's own and Ray's RuntimeError: the connection is lost
            raise RunError("driver", _PHASE, str(error) or type(error).__name__) from error
        finally:
            await lines.aclose()  # type: ignore[attr-defined]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong in a request, as an error with a remedy."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise RunError(
                "driver",
                _PHASE,
                f"{self.address} asks for a token, and this one is none or a wrong one",
                "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as on the cluster.",
            ) from error
        except OSError as error:  # those of requests are OSErrors
            raise RunError("driver", _PHASE, f"nobody answers at {self.address} ({error})"[:500]) from error
        except RuntimeError as error:
            raise RunError("driver", _PHASE, str(error)[:500]) from error


def _job(info: Any) -> Job:
    return Job(
        name=info.submission_id,
        status=str(getattr(info.status, "value", info.status)),
        metadata=info.metadata or {},
        message=info.message or "",
        exit_code=info.driver_exit_code,
        started=info.start_time or 0,
    )
