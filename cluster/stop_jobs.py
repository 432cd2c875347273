"""Stops the jobs of a cluster whose head is about to go away, and waits until each has committed and ended.

    python -m cluster.stop_jobs [--address http://127.0.0.1:8265] [--timeout 300]

A Kubernetes pod runs it as its preStop hook, an operator before `ray down`. Token authentication is read from the
environment, as by `ray job stop`. Left out: force. A job is killed RAY_JOB_STOP_WAIT_TIME_S (of the head) after it was
asked to stop, so that time must be longer than a step and a commit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from cluster.dashboard import job_client
from cluster.faults import RunError


def stop_jobs(client: Any, timeout_s: float, say: Callable[[str], None]) -> None:
    """Ask every job that is pending or running to stop, and wait for all of them.

    client: a `ray.job_submission.JobSubmissionClient`. say: is given one line for each job. Raises RunError naming the
    jobs that have not ended within timeout_s.
    """
    deadline = time.monotonic() + timeout_s
    # a driver that nobody submitted has no submission id, and Ray cannot stop it
    running = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    for name in running:
        client.stop_job(name)
        say(f"{name}: asked to stop")
    while running:
        ended = {name: status for name in running if (status := client.get_job_status(name)).is_terminal()}
        for name, status in ended.items():
            say(f"{name}: {status.value}")
        running = [name for name in running if name not in ended]
        if running and time.monotonic() > deadline:
            raise RunError(
                ", ".join(running),
                "stopping",
                f"still at work {timeout_s:g} s after it was asked to stop",
                "Give it more time: --timeout, RAY_JOB_STOP_WAIT_TIME_S of the head, the pod's grace period.",
            )
        if running:
            time.sleep(0.5)


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit code is 0 once no job runs, and 1 if one still does."""
    parser = argparse.ArgumentParser(prog="python -m cluster.stop_jobs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="of the head's dashboard (default: here)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for all jobs together (default: 300)")
    asked = parser.parse_args(arguments)
    try:
        stop_jobs(job_client(asked.address), asked.timeout, lambda line: print(line, flush=True))  # noqa: T201
    except (RunError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
