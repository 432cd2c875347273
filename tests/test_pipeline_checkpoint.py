"""Commits: all or nothing, verified on the way back, and only those of the run's history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import shared
from cluster.faults import RunError
from driver_setup import config
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.commits import Checkpoints, Commit, DriverState, commit_at_or_before, newest_commit
from pipeline.samples.ledger import LedgerState, OpenChunk
from run_helpers import new_run

STATE = DriverState(
    step=3,
    version=3,
    weights="abc",
    kl_coef=0.1 + 0.2,  # a number that only survives if all its digits do
    ledger=LedgerState(
        next_group=9,
        next_chunk=3,
        open=(OpenChunk(number=2, first_group=6, groups=3, step=3, version=3, attempt=1),),
        trained=3,
        filtered={"no variance": 2},
        quarantined={4: "error: x"},
    ),
    models={"policy": "m"},
)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with new_run(tmp_path / "run", config()) as folder:
        yield folder


def make(run: RunFolder, step: int, keep: int = 2, harm: Callable[[Path], None] | None = None) -> Commit:
    """A commit of two roles with two files of ten bytes each. harm: what happens to the last file before the manifest
    is written.
    """
    checkpoints = Checkpoints(run, keep)
    where = checkpoints.prepare(step)
    shards = {}
    for role in ("policy", "critic"):
        folder = checkpoints.folder.folder(where(role)[len(checkpoints.folder.url) + 1 :])
        shards[role] = tuple(
            folder.write_file(f"rank-{r}", lambda path, r=r: path.write_bytes(b"%d%d" % (step, r) * 5))
            for r in range(2)
        )
    if harm is not None:
        harm(Path(where("critic")) / "rank-1")
    return checkpoints.write(STATE.model_copy(update={"step": step}), shards)


def latest(run: RunFolder) -> tuple[Commit | None, list[str]]:
    said: list[str] = []
    return Checkpoints(run, 2).latest(said.append), said


def test_a_commit_comes_back_as_it_was(run: RunFolder) -> None:
    made = make(run, 3)
    assert made.size == 4 * 10
    assert latest(run) == (made, [])
    assert made.state == STATE


def test_the_newest_two_are_kept(run: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        make(run, step)
    assert Checkpoints(run, 2).folder.folders() == ["step=00000003-epoch=0001", "step=00000004-epoch=0001"]


def test_nothing_is_committed_before_the_manifest(run: RunFolder) -> None:
    assert latest(run) == (None, [])
    checkpoints = Checkpoints(run, 2)
    (Path(checkpoints.prepare(2)("policy"))).mkdir(parents=True)
    assert latest(run) == (
        None,
        [
            "commit step=00000002-epoch=0001 has no commit.json: it was broken off, or has lost it; looking for the "
            "one before it"
        ],
    )
    made = make(run, 1)
    assert latest(run)[0] == made


@pytest.mark.parametrize(
    ("harm", "said"), [("remove", "rank-1 is missing"), ("truncate", "rank-1 has 9 bytes, must have 10")]
)
def test_a_commit_is_not_sealed_before_the_driver_has_seen_every_shard(
    run: RunFolder, harm: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank on a node of its own says that it wrote its shard, and it did, there."""
    monkeypatch.setattr(shared, "PATIENCE_S", 0)
    before = make(run, 1)
    with pytest.raises(RunError) as caught:
        make(run, 2, harm={"remove": remove, "truncate": truncate}[harm])
    assert (caught.value.who, caught.value.phase) == ("critic[1]", "commit")
    assert said in str(caught.value)
    assert str(caught.value).endswith("Put --run-dir on a filesystem that all nodes share, mounted at the same place.")
    assert latest(run)[0] == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("file", ["policy/rank-0", "critic/rank-1", "commit.json"])
@pytest.mark.parametrize("harm", [truncate, flip, empty, remove])
def test_a_damaged_commit_is_said_aloud_and_the_one_before_it_is_used(
    run: RunFolder, file: str, harm: Callable[[Path], None]
) -> None:
    before, newest = make(run, 1), make(run, 2)
    harm(run.path / "checkpoints" / newest.name / file)
    commit, said = latest(run)
    assert commit == before
    [line] = said
    assert newest.name in line
    assert file in line
    assert line.endswith("looking for the one before it")


def test_every_bit_of_the_manifest_counts(run: RunFolder) -> None:
    """Flip any byte of it: it is never taken for another commit."""
    text = make(run, 2).to_text()
    for place in range(len(text)):
        other = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        try:
            read = Commit.from_text(other)
        except (ValueError, KeyError):
            continue
        assert read == Commit.from_text(text), f"a flip at {place} was not noticed"


def test_when_all_are_damaged_the_run_does_not_begin_anew_by_itself(run: RunFolder) -> None:
    for step in (1, 2):
        truncate(run.path / "checkpoints" / make(run, step).name / "policy" / "rank-0")
    with pytest.raises(
        ValueError, match=r"must hold a commit that is whole, got 2 damaged in .*start anew: raylign run"
    ):
        latest(run)


def test_a_leftover_of_an_earlier_epoch_does_not_count(run: RunFolder) -> None:
    """The old process commits once more after the new one has begun: into its own epoch's folder, which the new one
    does not look at.
    """
    first = make(run, 2)
    with_old_epoch = run.history
    run.begin(config(), from_step=2)
    second, run.history = run.history, with_old_epoch
    with pytest.raises(RunError, match="has taken over"):
        make(run, 4)
    run.check_epoch = lambda: None  # type: ignore[method-assign]  # it looked just before the other began
    late = make(run, 4)
    run.history = second
    del run.check_epoch  # type: ignore[method-assign]
    assert (run.path / "checkpoints" / late.name / "commit.json").is_file()
    assert latest(run) == (first, [])
    newest = make(run, 3)
    assert latest(run) == (newest, [])
    assert Checkpoints(run, 2).folder.folders() == [first.name, newest.name], "and it is removed"


def test_looking_at_a_run_needs_no_lock(run: RunFolder) -> None:
    one, two = make(run, 1), make(run, 2)
    folder = Checkpoints(run, 2).folder
    assert newest_commit(folder, run.history) == two
    assert commit_at_or_before(folder, run.history, 5) == two
    assert commit_at_or_before(folder, run.history, 1) == one
    assert commit_at_or_before(folder, run.history, 0) is None
