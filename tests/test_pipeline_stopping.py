"""A signal is a request at first, and a command the second time; and what a run says and leaves when it is stopped,
whatever it is doing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.signals import PostponedStop, hang_up_blocked, postponed
from cluster.stopping import StopNow, Stopped, StopRequest
from pipeline.folder.standing import how_it_ends, kept_work
from run_helpers import ROOT, command, environment

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _closed_terminals_are_heard() -> Iterator[None]:
    """The suite may run under nohup, which has SIGHUP ignored, in the processes that a test starts, too."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


# ---- a request ----


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        signal.raise_signal(number)
        assert stop
        assert stop.number == number
        with pytest.raises(StopNow):
            stop.check()
        with stop.held(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_on_arrival_stays_ignored(number: signal.Signals) -> None:
    """As under nohup, and SIGINT in the background of a shell."""
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop, PostponedStop() as signals, stop.at_once():
            signal.raise_signal(number)
            assert not stop
            assert not signals
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, former)


def test_what_is_held_is_done_whole() -> None:
    stop = StopRequest()
    stop.number = signal.SIGTERM
    with stop.held():
        stop.check()
        with stop.held():
            stop.check()
        stop.check()
    with pytest.raises(StopNow):
        stop.check()


def test_at_once_it_is_raised_where_the_program_is_unless_held_or_noted() -> None:
    with StopRequest() as stop, stop.at_once(), pytest.raises(StopNow):
        signal.raise_signal(signal.SIGTERM)
    for inside in (StopRequest.held, lambda stop: stop.at_once(False)):
        with StopRequest() as stop, stop.at_once():
            with inside(stop):
                signal.raise_signal(signal.SIGTERM)
            assert stop
        with pytest.raises(StopNow), stop.at_once():
            pytest.fail("it was asked for before")


def test_entered_again_inside_itself_it_is_one_request() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_that_it_was_heard_is_told_once_also_while_it_is_held() -> None:
    stop, told = StopRequest(), list[str]()
    stop.tell = told.append
    stop.check()
    stop.number = signal.SIGHUP
    with stop.held():
        stop.check()
        stop.check()
    assert told == ["SIGHUP: stopping as soon as everything is kept; a second signal stops at once"]


def test_outside_the_main_thread_it_only_stands_by() -> None:
    def inside() -> None:
        with StopRequest() as stop, postponed(), hang_up_blocked():
            stop.check()

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(60)
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_says_where_the_run_stands() -> None:
    assert (
        str(Stopped(signal.SIGTERM, "after step 7 of 40, which is committed"))
        == "stopped by SIGTERM after step 7 of 40, which is committed"
    )


# ---- signals in foreign code ----


def test_a_postponed_signal_reaches_its_handler_once_it_is_delivered() -> None:
    with PostponedStop() as signals:
        assert not signals
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert (signals.number, signals.count) == (signal.SIGINT, 2)
    with pytest.raises(KeyboardInterrupt):
        signals.deliver()
    PostponedStop().deliver()


def test_a_postponed_signal_becomes_a_request_at_the_end_of_the_block() -> None:
    reached = []

    def start() -> None:
        with postponed():
            with postponed():
                signal.raise_signal(signal.SIGTERM)
                reached.append("inner")
            reached.append("outer")

    with StopRequest() as stop, stop.at_once(), pytest.raises(StopNow):
        start()
    assert stop.number == signal.SIGTERM
    assert reached == ["inner", "outer"]


def test_processes_that_are_started_inside_are_deaf_to_a_closed_terminal() -> None:
    with hang_up_blocked():
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    [mask] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:")]
    assert mask & 1 << signal.SIGHUP - 1
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


# ---- what is kept ----


def test_what_is_kept_is_said_and_no_more(tmp_path: Path) -> None:
    assert how_it_ends(tmp_path, "again") == "Nothing was begun."
    epoch = {"number": 1, "from_step": 0, "pid": 1, "host": "here", "started": "", "versions": {}, "config": {}}
    (tmp_path / "history.json").write_text(json.dumps([epoch, epoch | {"number": 2, "from_step": 4}]))
    assert how_it_ends(tmp_path, "again") == "Nothing was finished or committed yet. To begin again: again"
    (tmp_path / "sft" / "checkpoints" / "updates-00000016").mkdir(parents=True)
    assert kept_work(tmp_path) == "", "a checkpoint that was not written whole"
    (tmp_path / "sft" / "checkpoints" / "updates-00000016" / "commit.json").write_text("{}")
    assert kept_work(tmp_path) == "fine-tuning up to update 16"
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "sft.json").write_text(json.dumps({"stage": "sft", "depends": {}, "finished": True}))
    for name in ("step=00000006-epoch=0001", "step=00000004-epoch=0002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "commit.json").write_text("{}")
    assert kept_work(tmp_path) == "fine-tuning, reinforcement learning up to step 4", (
        "epoch 2 began at step 4, so step 6 of epoch 1 counts no more"
    )
    assert how_it_ends(tmp_path, "again") == f"Kept in {tmp_path}: {kept_work(tmp_path)}. To go on from there: again"


# ---- output that nobody reads, or that cannot show a character ----

TALK = """
import sys
from pipeline.observe.output import steady_output
with steady_output():
    for number in range(20_000):
        print("reward ▁", number)
    print("done", file=sys.stderr)
"""


def talk(shell: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = f'"{sys.executable}" -c "$TALK" {shell}'
    return subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "TALK": TALK, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_reader_that_goes_away_ends_nothing() -> None:
    done = talk("| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "reward ▁ 0\n", "done\n")
    full = talk("> /dev/full")
    assert (full.returncode, full.stderr) == (0, "done\n")


def test_a_console_that_cannot_show_a_character_shows_another() -> None:
    done = talk("", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "done\n")
    assert done.stdout.startswith("reward ? 0\n")
    assert done.stdout.endswith("reward ? 19999\n")


# ---- real runs ----

TINY = [
    "--finetune.epochs",
    "3000",  # an end that the fastest machine is far from when it is stopped
    "--finetune.early-stop",
    "false",
    "--finetune.checkpoint-every",
    "8",
    "--model.layers",
    "1",
    "--model.width",
    "16",
    "--cluster.start-timeout-s",
    "300",
]


def stopped(number: signal.Signals, arguments: list[str], when: str) -> tuple[int, str]:
    """Start a run, and stop its whole process group, as a closed terminal does, at the first line it prints that
    matches `when`: exit code and last words.

    Nothing of it may be left: no process, no folder of Ray's.
    """
    # sockets lie in it, whose names must be short
    with (
        tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as short,
        tempfile.TemporaryFile("w+") as err,
    ):
        process = subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=environment() | {"RAY_TMPDIR": short},
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert any(re.match(when, line) for line in process.stdout), err.seek(0) or err.read()
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
        process.communicate(timeout=250)
        deadline = time.monotonic() + 60  # agents of Ray end by themselves once they see that it is gone
        while has_processes(process.pid):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.05)
        assert os.listdir(short) == []
        err.seek(0)
        return process.returncode, err.read()


def has_processes(group: int) -> bool:
    """Whether a process of this group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_run_is_stopped_at_its_start_and_in_fine_tuning_and_says_how_to_go_on(tmp_path: Path) -> None:
    """A closed terminal while Ray starts, then SIGTERM after some updates, which are checkpointed."""
    run_dir = tmp_path / "my run"
    again = f"to go on: raylign resume '{run_dir}'\n"
    code, said = stopped(signal.SIGHUP, ["sft", "walks", *TINY, "--run-dir", str(run_dir)], r"start Ray \.\.\.")
    assert (code, said) == (129, f"raylign: stopped by SIGHUP during 'start Ray'; {again}")
    code, said = stopped(signal.SIGTERM, ["resume", str(run_dir)], r"fine-tune \d+/6000 .* loss")
    told = re.fullmatch(
        r"raylign: stopped by SIGTERM after update (\d+) of 48000 of 'fine-tune', which is checkpointed; (.*\n)", said
    )
    assert told, said
    assert (code, told[2]) == (143, again)
    assert kept_work(run_dir) == f"fine-tuning up to update {told[1]}"
    assert json.loads((run_dir / "sft" / "metrics.jsonl").read_text().splitlines()[-1])["updates"] == int(told[1])
    assert f"the run ends: stopped by SIGTERM after update {told[1]}" in (run_dir / "log" / "driver.log").read_text()
    assert list((run_dir / "sft" / "tensorboard").glob("events*"))
