"""Stored files: written whole, checked on the way back; local and remote (fsspec's memory filesystem) alike."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.storage import Folder, draft_of


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path / "store") if request.param == "local" else Folder(f"memory://{uuid.uuid4().hex}/store")
    yield folder
    folder.remove()


def test_text_comes_back_and_is_replaced_whole(folder: Folder) -> None:
    assert not folder.exists("note")
    folder.write_text("note", "one")
    folder.write_text("note", "zwei ∑")
    assert folder.read_text("note") == "zwei ∑"
    assert folder.exists("note")
    folder.remove_file("note")
    folder.remove_file("note")
    assert not folder.exists("note")


def test_a_file_is_what_was_written_until_it_is_not(folder: Folder) -> None:
    inner = folder.folder("inner")
    stored = inner.write_file("data", lambda path: path.write_bytes(b"0123456789"))
    assert (stored.name, stored.size, inner.damage(stored)) == ("data", 10, "")
    with inner.local_file("data") as path:
        assert path.read_bytes() == b"0123456789"
    for other, said in (
        (b"012345678", "has 9 bytes, must have 10"),
        (b"0123456788", "other bytes than were written"),
        (b"", "has 0 bytes"),
    ):
        inner.write_file("data", lambda path, other=other: path.write_bytes(other))
        assert said in inner.damage(stored)
    inner.remove_file("data")
    assert inner.damage(stored) == "data is missing"


def test_folders_are_listed_and_removed(folder: Folder) -> None:
    assert folder.folders() == []
    for name in ("b", "a"):
        folder.folder(name).write_file("x", lambda path: path.write_bytes(b"x"))
    folder.write_text("not-a-folder", "")
    assert folder.folders() == ["a", "b"]
    folder.folder("a").remove()
    folder.folder("a").remove()
    assert folder.folders() == ["b"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.write_text("note", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_text("note", "new")
    monkeypatch.undo()
    assert folder.read_text("note") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_no_two_processes_share_a_draft(tmp_path: Path) -> None:
    """Also not two of the same number on two machines: in containers nearly every process has a small one."""
    one, other = draft_of(tmp_path / "commit.json"), draft_of(tmp_path / "commit.json")
    assert one != other
    assert one.parent == other.parent == tmp_path
    for draft in (one, other):
        assert draft.name.startswith(f".commit.json.{socket.gethostname()}-{os.getpid()}-")


def test_a_file_is_seen_once_it_is_there_with_its_size(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [folder.write_file(name, lambda path: path.write_bytes(b"01234")) for name in ("a", "b")]
    assert folder.unseen(files, 0) == ""
    folder.write_file("b", lambda path: path.write_bytes(b"0123"))
    assert folder.unseen(files, 0) == "b has 4 bytes, must have 5"
    folder.remove_file("b")
    assert folder.unseen(files, 0) == "b is missing"
    monkeypatch.setattr("time.sleep", lambda seconds: folder.write_file("b", lambda path: path.write_bytes(b"01234")))
    assert folder.unseen(files, 60) == "", "a network filesystem may show it late"
