"""What is sent with a job, and how its end is read; the jobs themselves are in test_pipeline_job.py."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.dashboard import REQUEST_S, job_client
from cluster.faults import RunError
from pipeline.arguments.submission import parse_submission
from pipeline.submission import jobs, package, submit
from pipeline.submission.jobs import Job, Jobs
from pipeline.submission.package import pack

ADDRESS = ("--address", "http://head:8265", "--run-dir", "/shared/run")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder, with what belongs into a job and what does not."""
    folder = tmp_path / "project"
    kept = ("my_reward.py", "data/prompts.jsonl", "data/.gitignored.txt", "cluster_notes.md")
    left = (
        ".git/HEAD",
        ".venv/bin/python",
        "runs/first/config.toml",
        "__pycache__/a.pyc",
        ".env",
        "keys/a.pem",
        "a.pyc",
    )
    for name in (*kept, *left, ".gitignore", "pipeline/mine.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("data/\n")
    return folder


def test_a_job_gets_the_folder_and_the_program_without_what_it_does_not_need(project: Path, tmp_path: Path) -> None:
    """What .gitignore names goes along; a user's package named as one of the program's gives way to it."""
    into = tmp_path / "job"
    into.mkdir()
    found = pack(project, "mine.submitted.toml", "steps = 1\n", into)
    files = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
    assert len(files) == found.files
    assert {name for name in files if name.split("/")[0] not in ("cluster", "actors", "pipeline")} == {
        "my_reward.py",
        "data/prompts.jsonl",
        "data/.gitignored.txt",
        "cluster_notes.md",
        "mine.submitted.toml",
    }
    assert {"pipeline/cli.py", "pipeline/recipes/quickstart.toml", "actors/experience.py"} <= files
    assert "pipeline/mine.py" not in files
    assert not any("__pycache__" in name for name in files)
    assert found.size == sum((into / name).stat().st_size for name in files)


def test_a_folder_that_is_too_large_is_refused_and_says_what_is_large(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "LIMIT", 4 * 1024 * 1024)
    (project / "data" / "many.bin").write_bytes(bytes(3 * 1024 * 1024))
    (project / "model.bin").write_bytes(bytes(2 * 1024 * 1024))
    with pytest.raises(
        ValueError,
        match=r"working directory: what is sent with a job must be at most 4\.0 MB, got .* MB in .*; the largest are "
        r"data/many\.bin \(3\.0 MB\), model\.bin \(2\.0 MB\), ",
    ):
        pack(project, "mine.toml", "", tmp_path / "never-made")
    assert not (tmp_path / "never-made").exists(), "nothing is copied before"


def test_paths_of_the_folder_are_sent_as_they_are_there() -> None:
    given: dict[str, Any] = {
        "data": {"prompts": "/home/me/project/data/a.jsonl"},
        "stop": ["/home/me/other"],
        "steps": 3,
    }
    assert submit._relative(given, Path("/home/me/project")) == {
        "data": {"prompts": "data/a.jsonl"},
        "stop": ["/home/me/other"],
        "steps": 3,
    }


def test_the_name_of_a_job_tells_folders_of_one_name_apart() -> None:
    one, other = (
        submit._stem(parse_submission(["walks", *ADDRESS[:3], path]).run_dir) for path in ("/a/r 1", "/b/r 1")
    )
    assert one != other
    assert one.startswith("r-1-") and other.startswith("r-1-")


@pytest.mark.parametrize(
    ("status", "exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 143), ("STOPPED", 0, 143)],
)
def test_a_job_ends_with_the_code_of_its_driver(status: str, exit_code: int | None, code: int) -> None:
    job = Job(name="j", status=status, metadata={}, message="", exit_code=exit_code, started=0)
    assert (job.is_over, job.code) == (True, code)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "TARGET: `raylign submit` needs one"),
        (["walks"], "--address: must be the dashboard of a cluster, such as http://HEAD:8265, got none"),
        (["walks", "--address", "head:6379", "--run-dir", "/r"], "--address: must be the dashboard"),
        (["walks", *ADDRESS[:2]], "--run-dir: must be an absolute path that all nodes of the cluster see"),
        (["walks", *ADDRESS[:2], "--run-dir", "runs/x"], "got runs/x"),
        (["walks", *ADDRESS, "--driver-label", "spot"], "--driver-label: must be KEY=VALUE, got 'spot'"),
        (["missing.toml", *ADDRESS], "recipe: must be a TOML file or one of"),
        (["walks", *ADDRESS, "--batch.prompts", "0"], "batch.prompts"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_submission(words)


class Flaky:
    """A client whose log is sent from its beginning each time, and breaks off at the given lengths at first."""

    def __init__(self, log: str, breaks: list[int], status: str = "SUCCEEDED") -> None:
        self.log, self.breaks, self.status, self.asked = log, breaks, status, 0

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        length = self.breaks.pop(0) if self.breaks else len(self.log)
        for start in range(0, length, 4):
            yield self.log[start : min(start + 4, length)]
        if length < len(self.log):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, name: str) -> Any:
        self.asked += 1
        return SimpleNamespace(
            submission_id=name, status=self.status, metadata={}, message="", driver_exit_code=0, start_time=1
        )


def jobs_of(client: Flaky, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(jobs, "job_client", lambda address: client)
    found = Jobs("http://head:8265")
    found._retry_s = 0.0
    return found


def test_a_log_whose_connection_is_lost_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    client = Flaky("one\ntwo\nthree\nfour\n", [6, 2, 11])
    job = jobs_of(client, monkeypatch).follow("night-1", written.append)
    assert "".join(written) == client.log
    assert (job.name, job.code) == ("night-1", 0)


def test_a_head_that_is_gone_for_good_ends_the_following_and_not_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "GIVE_UP_S", 0.05)
    client = Flaky("one\ntwo\n", [5] * 100_000)
    with pytest.raises(RunError, match=r"following job night-1.*closed unexpectedly.*The job may go on"):
        jobs_of(client, monkeypatch).follow("night-1", lambda text: None)
    assert client.asked == 0


def test_a_request_has_a_deadline_and_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client waits for ever, and prefers the environment."""
    asked: list[tuple[str, float]] = []

    def request(method: str, url: str, **more: Any) -> Any:
        asked.append((url, more["timeout"]))
        return SimpleNamespace(
            status_code=200, text="", json=lambda: {"ray_version": "2.60.0"}, raise_for_status=lambda: None, headers={}
        )

    monkeypatch.setattr("requests.request", request)
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    job_client("http://head:8265")
    assert asked and all(url.startswith("http://head:8265/") and timeout == REQUEST_S for url, timeout in asked)
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:8265"
