"""The copy of a run folder on a real server of objects, and the way back: nothing half is ever taken for whole."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import remote
from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.remote import RemoteFolder
from cluster.session import Session
from cluster.storage import Folder
from entry_point import raylign
from object_server import ObjectServer, object_server
from pipeline.config.run_config import RunConfig
from pipeline.folder.mirror import Mirror
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.commits import Checkpoints, DriverState
from pipeline.run.fetch import fetch, open_storage
from pipeline.run.start import resume, run_stages
from run_helpers import ROOT, assert_same, await_log, environment, forked_command, new_run, quiet, recipe


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with object_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    yield running
    running.serve_again()


@pytest.fixture
def url(server: ObjectServer, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/runs/{request.node.name}"


def stored(url: str, timeout_s: float = 0.5) -> RunConfig:
    cluster = recipe().cluster
    return recipe(cluster=cluster.model_copy(update={"storage": url, "storage_timeout_s": timeout_s}))


def begun(path: Path, url: str) -> RunFolder:
    """A run that copies itself to the storage from now on, or goes on doing so."""
    config = stored(url)
    if (path / "history.json").exists():
        folder = RunFolder.open(path)
        mirrored(folder, url)
        folder.begin(config, from_step=len(folder.history))
    else:
        folder = new_run(path, config)
        mirrored(folder, url)
        folder.copy()
    return folder


def mirrored(folder: RunFolder, url: str) -> Mirror:
    mirror = Mirror.of(stored(url).cluster)
    assert mirror is not None
    mirror.follow(folder)
    return mirror


def commit(folder: RunFolder, step: int) -> str:
    """Commit a step with two shards and an experience file; returns the commit's name."""
    checkpoints = Checkpoints(folder, keep=2)
    Folder(folder.path).folder(f"experience/step={step}").write_text("experience.parquet", f"of step {step}")
    to = checkpoints.prepare(step)("policy")
    files = tuple(
        Folder(to).write_file(f"rank-{rank}.safetensors", lambda path: path.write_bytes(bytes([step]) * 1000))
        for rank in (0, 1)
    )
    return checkpoints.write(DriverState(step=step, kl_coef=0.1), {"policy": files}).name


def commits_of(folder: RunFolder) -> list[str]:
    return [name[:13] for name in Folder(folder.path / "checkpoints").folders()]


def fetched(url: str, to: Path) -> tuple[str, list[str]]:
    """The name of the commit that was fetched, or "", and what was said."""
    said: list[str] = []
    fetch(RemoteFolder(url, 0.5), to, said.append)
    with RunFolder.open(to) as folder:
        found = Checkpoints(folder, keep=2).latest(said.append)
    return found.name if found else "", said


def written(server: ObjectServer, url: str) -> list[str]:
    """The objects that were written, in order; pyarrow marks a folder from which it has removed a file."""
    prefix = f"PUT {url.removeprefix('s3:/')}/"
    done = [request for request in server.requests if not request.endswith("refused")]
    names = [request.removeprefix(prefix).split("?")[0] for request in done if request.startswith(prefix)]
    return [name for name in names if name and not name.endswith("/")]


def test_every_manifest_is_written_after_what_it_relies_on(server: ObjectServer, url: str, tmp_path: Path) -> None:
    with begun(tmp_path / "run", url) as folder:
        Folder(folder.path).write_text("stages/rl.json", "{}")
        (folder.path / "log" / "driver.log").write_text("not copied")
        (folder.path / ".shared-mark").write_text("not copied")
        before = len(written(server, url))
        name = commit(folder, 1)
        order = written(server, url)[before:]
        shards = [f"checkpoints/{name}/policy/rank-{rank}.safetensors" for rank in (0, 1)]
        manifests = ["files.json", f"checkpoints/{name}/commit.json", "stages/rl.json"]
        assert sorted(order[: -len(manifests)]) == [*shards, "experience/step=1/experience.parquet"]
        assert order[-len(manifests) :] == manifests
        assert written(server, url)[:before] == [".writable", "history.json", "config.toml", "files.json"]
        folder.copy()
        assert len(written(server, url)) == before + len(order), "nothing is copied twice"
    with begun(tmp_path / "run", url):
        again = written(server, url)[before + len(order) :]
    assert {*again} == {".writable", "history.json", *manifests[1:]}, "not by another process either"


def test_old_commits_go_there_once_they_are_gone_here_and_others_never(url: str, tmp_path: Path) -> None:
    with begun(tmp_path / "run", url) as folder:
        names = [commit(folder, step) for step in (1, 2, 3, 4)]
        there = {name.split("/")[1] for name in RemoteFolder(url, 10).sizes("checkpoints")}
        assert there == {*names[1:]}, "the older one goes with the next commit"
        assert commits_of(folder) == ["step=00000003", "step=00000004"]
        shutil.rmtree(folder.path / "checkpoints")  # by a user who needs room
        folder.copy()
    assert fetched(url, tmp_path / "new")[0] == names[-1]


def harmed(url: str, name: str, how: str) -> str:
    """Harm an object of a commit; returns what must be said of it."""
    folder, shard = Folder(url).folder("checkpoints").folder(name), "policy/rank-1.safetensors"
    if how == "missing":
        folder.remove_file(shard)
        return f"is damaged: {shard} is missing; looking for the one before it"
    if how == "shorter":
        folder.write_text(shard, "x")
        return f"is damaged: {shard} has 1 bytes, must have 1000; looking"
    if how == "other":
        folder.write_text(shard, "x" * 1000)
        return f"is damaged: {shard} has other bytes than were written; looking"
    folder.remove_file("commit.json")
    return "has no commit.json: its upload was broken off"


@pytest.mark.parametrize("how", ["missing", "shorter", "other", "unsealed"])
def test_a_commit_that_is_not_whole_there_is_told_of_and_the_one_before_it_taken(
    url: str, tmp_path: Path, how: str
) -> None:
    with begun(tmp_path / "run", url) as folder:
        older, newest = commit(folder, 1), commit(folder, 2)
    what = harmed(url, newest, how)
    found, said = fetched(url, tmp_path / "new")
    assert found == older
    assert [f"commit {newest} in {url} {what}" in line for line in said] == [True]
    assert Folder(tmp_path / "new" / "checkpoints").folders() == [older]
    assert (tmp_path / "new" / "experience" / "step=1" / "experience.parquet").read_text() == "of step 1"


def test_without_any_whole_commit_it_is_not_begun_anew_in_silence(url: str, tmp_path: Path) -> None:
    with begun(tmp_path / "run", url) as folder:
        harmed(url, commit(folder, 1), "missing")
    with pytest.raises(ValueError, match=r"cluster.storage: must hold a commit that is whole, got 1 damaged in s3://"):
        fetched(url, tmp_path / "new")
    assert not (tmp_path / "new" / "history.json").exists()


def test_a_storage_that_stays_away_ends_the_run_and_nothing_is_lost(
    server: ObjectServer, url: str, tmp_path: Path
) -> None:
    with begun(tmp_path / "run", url) as folder:
        names = [commit(folder, step) for step in (1, 2)]
        server.refuse("PUT .*step=00000003")
        with pytest.raises(RunError) as caught:
            commit(folder, 3)
        text = str(caught.value)
        assert text.startswith("storage failed during 'upload': writing checkpoints/step=00000003-epoch=0001/policy/")
        assert "SLOW_DOWN" in text and "Nothing is lost: the run folder has everything" in text
        assert commits_of(folder) == ["step=00000001", "step=00000002", "step=00000003"], "none is removed"
        assert fetched(url, tmp_path / "early")[0] == names[1]
        server.serve_again()
        folder.copy()
        assert fetched(url, tmp_path / "late")[0] == "step=00000003-epoch=0001"


def test_a_list_that_could_not_be_written_is_written_with_the_next_copy(
    server: ObjectServer, url: str, tmp_path: Path
) -> None:
    with begun(tmp_path / "run", url) as folder:
        server.refuse("PUT .*files.json")
        with pytest.raises(RunError, match=r"files\.json"):
            commit(folder, 1)
        server.serve_again()
        folder.copy()
    assert fetched(url, tmp_path / "new") == ("step=00000001-epoch=0001", [])
    assert (tmp_path / "new" / "experience" / "step=1" / "experience.parquet").is_file()


def test_a_busy_storage_is_waited_for(server: ObjectServer, url: str, tmp_path: Path) -> None:
    with begun(tmp_path / "run", url) as folder:
        server.refuse(".", every=5)
        name = commit(folder, 1)
        assert fetched(url, tmp_path / "new")[0] == name
    assert sum(request.endswith("refused") for request in server.requests) > 5


def test_of_two_writers_the_earlier_stops_and_cannot_begin_again(url: str, tmp_path: Path) -> None:
    with begun(tmp_path / "run", url) as first:
        commit(first, 1)
        fetched(url, tmp_path / "elsewhere")
        with begun(tmp_path / "elsewhere", url) as second:
            with pytest.raises(RunError, match=r"has taken over s3://.* \(epoch 2\). Two processes must not"):
                commit(first, 2)
            newest = commit(second, 3)
    assert fetched(url, tmp_path / "new")[0] == newest
    with RunFolder.open(tmp_path / "run") as first, pytest.raises(ValueError, match=r"go on from there: raylign resum"):
        mirrored(first, url)


def test_the_storage_of_another_run_is_refused(url: str, tmp_path: Path) -> None:
    with begun(tmp_path / "run", url) as one:
        text = (one.path / "history.json").read_text().replace('"pid": ', '"pid": 1')
    (tmp_path / "run" / "history.json").write_text(text)
    with RunFolder.open(tmp_path / "run") as other, pytest.raises(ValueError, match="must be empty or hold this run"):
        mirrored(other, url)


def test_a_fetch_that_breaks_off_is_begun_again(server: ObjectServer, url: str, tmp_path: Path) -> None:
    with begun(tmp_path / "run", url) as folder:
        name = commit(folder, 1)
    config, said = ClusterConfig(storage=url, storage_timeout_s=0.5), list[str]()
    server.refuse("rank-1")
    with pytest.raises(ValueError, match=r"cluster.storage: must be a run that can be read, got s3://.*rank-1"):
        open_storage(config, tmp_path / "new", said.append)
    (tmp_path / "new" / "left-over").mkdir()
    server.serve_again()
    open_storage(config, tmp_path / "new", said.append)
    assert said == [f"fetching the run from {url}"] * 2
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        *(".lock", "history.json", "config.toml", "checkpoints", "experience"),
    }
    with RunFolder.open(tmp_path / "new") as folder:
        assert Checkpoints(folder, keep=2).latest(said.append)
    open_storage(config, tmp_path / "new", said.append)
    assert len(said) == 2, "what is there is not fetched again"
    assert name


def test_files_that_are_missing_are_told_of_and_a_model_of_which_some_is_missing_is_made_again(
    url: str, tmp_path: Path
) -> None:
    with begun(tmp_path / "run", url) as folder:
        for name in ("config.json", "model.safetensors"):
            Folder(folder.path / "start-with-options").write_text(name, name)
        name = commit(folder, 1)
    Folder(url).folder("start-with-options").remove_file("model.safetensors")
    Folder(url).folder("experience").folder("step=1").remove_file("experience.parquet")
    found, said = fetched(url, tmp_path / "new")
    assert found == name
    assert said == [
        f"{url}: experience/step=1/experience.parquet is missing",
        f"{url}: start-with-options/model.safetensors is missing",
    ]
    assert not (tmp_path / "new" / "start-with-options").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "walks", "--cluster.storage", "s3://nobody/runs"), "NO_SUCH_BUCKET.*; make the bucket first"),
        (("run", "walks", "--cluster.storage", "runs/first"), "cluster.storage: must be a URL of a folder"),
        (("plan", "walks", "--cluster.storage", "s3://me:hidden@bucket/x"), "cluster.storage: must be a URL without"),
        (("resume", "s3://bucket/nothing", "--run-dir", "new"), "URL: must be the storage of a run, got s3://bucket"),
        (("resume", "s3://bucket/nothing"), "--run-dir: must be a new or empty folder, .* got none"),
    ],
)
def test_the_command_line_says_what_is_wrong_before_ray_is_there(
    server: ObjectServer, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    found = raylign(*arguments, cwd=tmp_path, **server.environment)
    assert found.code == 2
    assert re.match(f"raylign: .*{said}", found.err)
    assert "hidden" not in found.out + found.err
    assert "ray" not in found.imported
    assert not [*tmp_path.glob("*/*/history.json")], "no run was begun"


# ---- whole runs ----


@pytest.fixture(scope="module")
def whole(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that knows of no storage, and that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run_stages(recipe(), run_dir, quiet())
    return run_dir


def resumed(*arguments: str, cwd: Path) -> str:
    """What `raylign resume` printed, with a Ray of its own."""
    out = subprocess.run(
        forked_command("resume", *arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    assert "Traceback" not in out.stderr
    return out.stdout


@pytest.mark.slow
def test_a_run_is_killed_its_folder_lost_and_it_goes_on_elsewhere_to_the_same_bits(
    whole: Path, server: ObjectServer, url: str, tmp_path: Path
) -> None:
    """All the while, one request of 25 is refused."""
    lost, new = tmp_path / "lost", tmp_path / "elsewhere" / "new"
    server.refuse(".", every=25)
    start = forked_command("run", str(whole / "config.toml"), "--cluster.storage", url, "--run-dir", str(lost))
    pipe = subprocess.PIPE
    with subprocess.Popen(start, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        await_log(lost, "committed step=00000002", process)
        process.kill()
        process.communicate(timeout=60)
    shutil.rmtree(lost)
    said = resumed(url, "--run-dir", str(new), cwd=ROOT)
    assert f"fetching the run from {url}" in said
    assert re.search(r"resumed from commit step=0000000[24]-epoch=0001", said)
    assert_same(new, whole)
    server.serve_again()
    # then its exported model and its newest commit are lost there, and the run has no folder
    shutil.rmtree(new)
    newest = max(name.split("/")[1] for name in RemoteFolder(url, 10).sizes("checkpoints"))
    Folder(url).folder("checkpoints").folder(newest).folder("critic").remove_file("rank-0.safetensors")
    Folder(url).folder("policy").remove_file("model.safetensors")
    said, again = quiet(), tmp_path / "again"
    run_stages(stored(url), again, said)
    assert isinstance(said.file, io.StringIO)
    text = said.file.getvalue()
    assert f"{url}: policy/model.safetensors is missing" in text
    assert f"commit {newest} in {url} is damaged: critic/rank-0.safetensors is missing; looking for the one" in text
    assert "rl is done again: policy/model.safetensors is missing" in text
    assert_same(again, whole)


@pytest.mark.slow
def test_a_storage_that_goes_away_in_the_middle_stops_the_run_which_goes_on_once_it_is_back(
    whole: Path, server: ObjectServer, url: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = stored(url)
    server.refuse("PUT .*step=00000004")
    with pytest.raises(RunError, match=r"storage failed during 'upload': .*step=00000004.*SLOW_DOWN.*Nothing is lost"):
        run_stages(config, run_dir, quiet())
    server.serve_again()
    resume(config, run_dir, (), quiet())
    assert_same(run_dir, whole)
    there = RemoteFolder(url, 10).sizes()
    assert {name.split("/")[1][:13] for name in there if name.startswith("checkpoints/")} >= {"step=00000004"}
    assert [name for name in there if name.startswith("sft/checkpoints/") and name.endswith("/commit.json")]
    assert {"policy/model.safetensors", "metrics.jsonl", "report.md", "stages/evaluate.json"} <= there.keys()
    assert not [name for name in there if name.startswith("log/")]
