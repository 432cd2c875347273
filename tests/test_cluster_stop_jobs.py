"""Before a head goes away its jobs are asked to stop, and what they then commit is waited for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.dashboard.modules.job.common import JobStatus

from cluster.faults import RunError
from cluster.stop_jobs import stop_jobs
from test_pipeline_job import ROOT, await_words, head, job  # noqa: F401 (head is a fixture)


@dataclass
class Job:
    submission_id: str | None
    status: JobStatus
    looks: int = 0
    """How often it is seen at work after it was asked to stop."""


@dataclass
class Client:
    """The part of a JobSubmissionClient that is used."""

    jobs: list[Job]
    stopped: list[str] = field(default_factory=list)

    def list_jobs(self) -> list[Job]:
        return self.jobs

    def stop_job(self, name: str) -> bool:
        self.stopped.append(name)
        return True

    def get_job_status(self, name: str) -> JobStatus:
        (found,) = [job for job in self.jobs if job.submission_id == name]
        found.looks -= 1
        return JobStatus.STOPPED if found.looks < 0 else found.status


def test_every_job_that_is_not_at_its_end_is_stopped_and_waited_for() -> None:
    client = Client(
        [
            Job("done", JobStatus.SUCCEEDED),
            Job("night", JobStatus.RUNNING, looks=2),
            Job(None, JobStatus.RUNNING),  # a driver that nobody submitted
            Job("soon", JobStatus.PENDING),
        ]
    )
    said: list[str] = []
    stop_jobs(client, 60, said.append)
    assert client.stopped == ["night", "soon"]
    assert said == ["night: asked to stop", "soon: asked to stop", "soon: STOPPED", "night: STOPPED"]


def test_a_job_that_goes_on_is_named() -> None:
    client = Client([Job("endless", JobStatus.RUNNING, looks=10_000), Job("good", JobStatus.RUNNING)])
    with pytest.raises(RunError, match=r"^endless failed during 'stopping': still at work 0 s after .* --timeout"):
        stop_jobs(client, 0, lambda _: None)


@pytest.mark.slow
def test_the_command_waits_for_what_a_real_job_commits(head: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    script = tmp_path / "job.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def commit(number, frame):\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(tmp_path / 'committed')!r}).write_text('whole')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, commit)\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).write_text('at work')\n"
        "time.sleep(600)\n"
    )
    begun = job(head, "submit", "--no-wait", "--submission-id", "night", "--", sys.executable, str(script))
    assert begun.returncode == 0, begun.stdout + begun.stderr
    await_words(tmp_path / "started", "at work")
    command = [sys.executable, "-m", "cluster.stop_jobs", "--address", head["RAY_ADDRESS"]]
    for said in ("night: asked to stop\nnight: STOPPED\n", ""):  # the second time there is nothing to stop
        done = subprocess.run(command, env=head, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stdout) == (0, said), done.stderr
        assert (tmp_path / "committed").read_text() == "whole"
