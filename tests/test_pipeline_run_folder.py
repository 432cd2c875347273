"""Whose a run folder is: locks, epochs, and what counts as its history."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.faults import RunError
from driver_setup import config
from pipeline.run_folder import HISTORY, Epoch, RunFolder, counts, read_history

HOLD = """
import sys, time
from pathlib import Path
from pipeline.run_folder import RunFolder
with RunFolder.open(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def begun(path: Path) -> Path:
    with RunFolder.create(path, config()):
        pass
    return path


def test_every_start_takes_an_epoch_and_writes_it_down(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", config()) as folder:
        assert folder.epoch == 1
    with RunFolder.open(tmp_path / "run") as folder:
        assert folder.epoch == 1, "nothing is taken before the settings are checked"
        folder.begin(config(), from_step=4)
        assert folder.epoch == 2
    history = read_history(tmp_path / "run")
    assert [(epoch.number, epoch.from_step) for epoch in history] == [(1, 0), (2, 4)]
    assert history[0].config == config().model_dump(mode="json")
    assert {"torch", "ray", "deepspeed", "transformers"} == history[0].versions.keys()


def test_a_folder_in_use_by_a_living_process_is_refused(tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"RUN_DIR: must not be in use, but process {holder.pid} on .* is at work"):
            RunFolder.open(path)
        holder.kill()  # -9: the kernel gives the lock back
        holder.wait(10)
        RunFolder.open(path).__exit__(None, None, None)


def test_without_locks_the_epoch_alone_must_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def none(file: object, how: int) -> None:
        raise OSError(37, "No locks available")

    path = begun(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", none)
    with RunFolder.open(path) as old, RunFolder.open(path) as new:
        old.begin(config(), from_step=0)
        old.check_epoch()
        new.history = read_history(path)
        new.begin(config(), from_step=2)
        new.check_epoch()
        with pytest.raises(RunError, match=r"has taken over .* \(epoch 3, ours is 2\)"):
            old.check_epoch()
    assert "cannot be locked" in caplog.text


def epoch(number: int, from_step: int) -> Epoch:
    return Epoch(number=number, from_step=from_step, pid=1, host="h", started="", versions={}, config={})


@pytest.mark.parametrize(
    ("of_epoch", "step", "belongs"),
    [(1, 4, True), (1, 6, False), (2, 4, True), (2, 8, True), (2, 10, False), (3, 10, True)],
)
def test_what_a_later_epoch_went_back_behind_does_not_count(of_epoch: int, step: int, belongs: bool) -> None:
    """Epoch 2 began at step 4, epoch 3 at step 8: a commit of epoch 1 after step 6 was made by a process that was no longer wanted."""
    assert counts([epoch(1, 0), epoch(2, 4), epoch(3, 8)], of_epoch, step) is belongs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"has no {HISTORY}; `raylign run RECIPE` makes one"),
        (b"", "must be as a run writes it"),
        (b'[{"number": 1', "must be as a run writes it"),
        (b"[]", "must name at least one epoch"),
    ],
)
def test_a_folder_without_a_readable_history_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / HISTORY).write_bytes(content)
    with pytest.raises(ValueError, match="RUN_DIR") as caught:
        RunFolder.open(tmp_path)
    assert message in str(caught.value)
