"""A process that does not see the folder that the driver writes into is told so, by name, before it does anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster import shared
from cluster.faults import RunError
from cluster.handshake import compare, fingerprint
from cluster.shared import FolderMark, check_seen
from cluster.storage import Folder, files_in


@pytest.fixture
def mark(tmp_path: Path) -> FolderMark:
    (tmp_path / "run" / "log").mkdir(parents=True)
    return replace(FolderMark.leave(tmp_path / "run", tmp_path / "run" / "log"), patience_s=0)


def test_who_sees_the_mark_has_no_problem_and_it_is_removed(mark: FolderMark) -> None:
    assert mark.problem() == ""
    compare(fingerprint([]), fingerprint([], mark), "policy[0]")
    mark.remove()
    mark.remove()
    assert list(Path(mark.folder, "log").iterdir()) == []


@pytest.mark.parametrize(("harm", "said"), [("remove", "No such file or directory"), ("write", "says something else")])
def test_another_folder_of_the_same_name_is_noticed(mark: FolderMark, harm: str, said: str) -> None:
    mark.remove() if harm == "remove" else Path(mark.file).write_text("of another run")
    with pytest.raises(RunError) as caught:
        compare(fingerprint([]), fingerprint([], mark), "policy[1]")
    told = str(caught.value)
    assert told.startswith("policy[1] failed during 'handshake': on its node, ")
    assert f"{mark.folder} is not the folder that the driver writes into ({mark.file}" in told
    assert said in told
    assert told.endswith("Put --run-dir on a filesystem that all nodes share, mounted at the same place.")


def test_a_file_that_shows_late_is_waited_for(mark: FolderMark, monkeypatch: pytest.MonkeyPatch) -> None:
    mark.remove()
    monkeypatch.setattr("time.sleep", lambda seconds: Path(mark.file).write_text(mark.text))
    assert replace(mark, patience_s=60).problem() == ""


def test_only_what_lies_in_the_folder_needs_it(mark: FolderMark, tmp_path: Path) -> None:
    (tmp_path / "run" / "finetuned").mkdir()
    (tmp_path / "runs").mkdir()
    assert mark.covers(str(tmp_path / "run" / "finetuned"))
    assert not mark.covers(str(tmp_path / "runs")), "its name only begins alike"
    assert not mark.covers("gpt2")
    assert not mark.covers("")


def test_what_another_process_says_it_wrote_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PATIENCE_S", 0)
    (tmp_path / "model" / "parts").mkdir(parents=True)
    (tmp_path / "model" / "parts" / "weights").write_bytes(b"12345")
    (tmp_path / "model" / "config.json").write_text("{}")
    files = files_in(tmp_path / "model")
    assert [(file.name, file.size) for file in files] == [("config.json", 2), ("parts/weights", 5)]
    check_seen("sft[0]", "export", Folder(tmp_path / "model"), files)
    (tmp_path / "model" / "parts" / "weights").write_bytes(b"1234")
    with pytest.raises(
        RunError,
        match=r"sft\[0\] failed during 'export': it wrote into .*model on its node, and the driver .*weights has 4 "
        r"bytes, must have 5",
    ):
        check_seen("sft[0]", "export", Folder(tmp_path / "model"), files)
    assert files_in(tmp_path / "nothing") == ()
