"""The command `raylign submit`: a run as a job of a cluster, followed to its end.

The jobs of a run are numbered, `<name of its folder>-<hash of its path>-1`, `-2` ... A run folder has one job at work
at most: to submit the same again attaches to it, and after its end goes on with what is left, since a run in the
folder of a run does only what is not done. The address, the token and the run folder are the cluster's; the recipe and
the working directory are this machine's.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from pipeline.config.recipe import as_toml
from pipeline.submission.jobs import Job, Jobs
from pipeline.submission.package import megabytes, pack
from pipeline.submission.submission import Submission

STOP_S = 600.0  # a job has Ray's own limit to stop; this one is for a cluster that does not say that it has
_RUN, _RECIPE = "raylign_run_dir", "raylign_recipe"  # keys of a job's metadata


def carry_out(submission: Submission, say: Callable[[str], None], write: Callable[[str], None]) -> int:
    """Submit, attach or stop; returns the exit code. say: a line of ours. write: text of the job's log."""
    if submission.what == "stop":
        return stop(submission, say)
    return attach(submission, say, write) if submission.what == "attach" else submit(submission, say, write)


def submit(submission: Submission, say: Callable[[str], None], write: Callable[[str], None]) -> int:
    """Submit a run, or attach to it if it is at work already; returns its exit code, or 0 if nobody waits for it.

    Raises ValueError for what cannot be sent, and when a job with other settings is at work in the same folder;
    RunError when the cluster does not answer or refuses.
    """
    assert submission.config is not None
    jobs = Jobs(submission.address)
    text = as_toml(_relative(submission.config.model_dump(mode="json"), Path.cwd()))
    given = xxhash.xxh3_64_hexdigest(f"{submission.what}\n{text}".encode())
    earlier = _jobs_of(jobs.all(), submission.run_dir)
    working = next((job for job in earlier if not job.is_over), None)
    if working is None:
        name = f"{_stem(submission.run_dir)}-{len(earlier) + 1}"
        recipe = f"{submission.recipe}.submitted.toml"
        with tempfile.TemporaryDirectory(prefix="raylign-job-") as folder:
            package = pack(Path.cwd(), recipe, text, Path(folder))
            say(f"sending {Path.cwd()}: {package.files} files, {megabytes(package.size)}")
            words = [submission.python, "-m", "pipeline", submission.what, recipe, "--run-dir", str(submission.run_dir)]
            jobs.submit(
                name=name,
                entrypoint=shlex.join(words),
                folder=package.folder,
                metadata={_RUN: str(submission.run_dir), _RECIPE: given},
                cpus=submission.cpus,
                labels=submission.labels,
            )
        say(f"job {name} at {submission.address}" + (f", after {len(earlier)} before it" if earlier else ""))
    elif working.metadata.get(_RECIPE) == given:
        name = working.name
        say(f"job {name} is at work with these settings")
    else:
        raise ValueError(
            f"--run-dir: must be of no other run, got {submission.run_dir}, in which job {working.name} is at work "
            f"with other settings; stop it first: {_command(submission, '--stop')}"
        )
    if not submission.wait:
        say(f"follow it: {_command(submission, '--attach')}\nstop it: {_command(submission, '--stop')}")
        return 0
    return _follow(jobs, name, submission, say, write)


def attach(submission: Submission, say: Callable[[str], None], write: Callable[[str], None]) -> int:
    """Follow the latest job of a run folder to its end; returns its exit code. Raises ValueError if there is none."""
    jobs = Jobs(submission.address)
    return _follow(jobs, _latest(jobs, submission).name, submission, say, write)


def stop(submission: Submission, say: Callable[[str], None]) -> int:
    """Stop the job of a run folder, which then commits, and wait until it has; returns 0.

    Raises ValueError if there is none; RunError when it does not end.
    """
    jobs = Jobs(submission.address)
    job = _latest(jobs, submission)
    if not job.is_over:
        say(f"stopping job {job.name} ...")
        job = jobs.stop(job.name, STOP_S)
    say(f"job {job.name}: {job.status.lower()}. To go on, submit the same again")
    return 0


def _relative(values: Any, folder: Path) -> Any:
    """The values of a recipe whose paths in `folder` begin there, since that folder lies elsewhere on the cluster."""
    if isinstance(values, dict):
        return {key: _relative(value, folder) for key, value in values.items()}
    if isinstance(values, list):
        return [_relative(value, folder) for value in values]
    return values.removeprefix(f"{folder}/") if isinstance(values, str) else values


def _follow(
    jobs: Jobs, name: str, submission: Submission, say: Callable[[str], None], write: Callable[[str], None]
) -> int:
    try:
        job = jobs.follow(name, write)
    except KeyboardInterrupt:
        say(f"job {name} goes on. To follow it again: {_command(submission, '--attach')}")
        raise
    said = f": {job.message.strip().splitlines()[0]}" if job.status == "FAILED" and job.message.strip() else ""
    say(f"job {name}: {job.status.lower()}{said}")
    return job.code


def _latest(jobs: Jobs, submission: Submission) -> Job:
    found = _jobs_of(jobs.all(), submission.run_dir)
    if not found:
        raise ValueError(
            f"RUN_DIR: must be the folder of a submitted run, got {submission.run_dir}, of which {submission.address} "
            "knows no job"
        )
    return found[-1]


def _jobs_of(jobs: Sequence[Job], run_dir: PurePosixPath) -> list[Job]:
    return [job for job in jobs if job.metadata.get(_RUN) == str(run_dir)]


def _stem(run_dir: PurePosixPath) -> str:
    """The first part of the names of a run's jobs: readable, and unlike that of a folder of that name elsewhere."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", run_dir.name).strip("-") or "run"
    return f"{readable}-{xxhash.xxh3_64_hexdigest(str(run_dir).encode())[:6]}"


def _command(submission: Submission, option: str) -> str:
    where = shlex.quote(str(submission.run_dir))
    return f"raylign submit {where} --address {shlex.quote(submission.address)} {option}"
