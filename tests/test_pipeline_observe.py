"""What a run says of itself: a JSON line a step, TensorBoard, a live view in a terminal and plain lines elsewhere, a
summary.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import re
import shlex
import struct
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from actors.learner.learner import UpdateReport
from actors.learner.tally import Staleness
from driver_setup import config
from evaluation_helpers import measured
from pipeline.arguments.parsing import parse
from pipeline.assembly.report import AssemblyReport
from pipeline.evaluation.results import Likelihood, assess
from pipeline.loop.commits import Checkpoints, DriverState
from pipeline.loop.metrics import StepCounts, step_metrics
from pipeline.loop.phases import Update
from pipeline.observe import progress as progress_module
from pipeline.observe.metrics import StepMetrics
from pipeline.observe.observer import Observer, read_metrics
from pipeline.observe.progress import PLAIN_EVERY_S, SPARK, Progress, sparkline
from pipeline.preparation.reward_model_report import judge
from pipeline.report import terminal as summary
from pipeline.report.frontier import smoothed
from pipeline.report.ledger import show_account
from pipeline.report.markdown import write
from pipeline.report.result import Result
from pipeline.report.wording import price, verdict, yardstick
from pipeline.samples.buffer import Batch
from pipeline.samples.collector import CollectionCounts
from pipeline.samples.ledger import Account, LedgerState, OpenChunk
from pipeline.training.trainer import _Curves
from run_helpers import new_run

NAN = math.nan

ASSEMBLED = AssemblyReport(
    samples=100,
    action_tokens=900,
    prompt_tokens=100,
    reward_mean=0.5,
    reward_std=0.25,
    shaped_mean=0.375,
    kl_per_rollout=1.5,
    kl_per_token=0.125,
    kl_bounded=0.0,
    flat_groups=0.25,
    advantage_std=1.0,
    return_mean=0.75,
    value_mean=0.625,
    explained_variance=0.875,
    response_tokens=9.0,
    stopped=0.0625,
    token_distinct_2=0.375,
    version_min=-2,
    version_mean=-1.25,
)
POLICY = UpdateReport(
    samples=4,
    updates=4,
    skipped=1,
    loss=-0.03125,
    grad_norm=2.0,
    grad_norm_max=3.0,
    learning_rate=0.00025,
    statistics={"entropy": 1.25, "clip_fraction": 0.5},
    ratio_deviation=0.0078125,
    logprob_gap=0.015625,
    logprob_gap_max=0.046875,
    action_tokens=900,
    seconds=1.0,
    staleness=Staleness(effective_sample_size=0.75, kl=0.03125, far=0.125),
)
CRITIC = dataclasses.replace(POLICY, loss=4.0, skipped=0, statistics={"value_error": 0.5})
ACCOUNT = Account(issued=210, trained=200, filtered=2, quarantined=3, in_flight=5, reissued=7)


def metrics(step: int = 0, *, reward: float = 0.5, critic: UpdateReport | None = CRITIC) -> StepMetrics:
    batch = Batch(step=step, chunks=(), emptied=(), rollouts=(), scores=(), sample_ids=(), staleness=0)
    summary = dataclasses.replace(ASSEMBLED, reward_mean=reward)
    counts = StepCounts(
        account=ACCOUNT,
        collected=CollectionCounts(action_tokens=800, generate_s=0.5),
        seconds={"rollout": 1.0, "learn": 2.0},
        incidents={"rolled_back": 1.0},
    )
    update = Update(batch=batch, summary=summary, policy=POLICY, critic=critic)
    return step_metrics(update, counts, version=step + 1, kl_coef=0.2)


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100, color_system=None), out


class Clock:
    """Time as the test says."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_the_numbers_of_a_step() -> None:
    values = metrics().values
    expected = {
        "reward/mean": 0.5,
        "reward/std": 0.25,
        "reward/shaped_mean": 0.375,
        "reward/flat_groups": 0.25,
        "kl/per_rollout": 1.5,
        "kl/per_token": 0.125,
        "kl/bounded_fraction": 0.0,
        "kl/coef": 0.2,
        "advantage/std": 1.0,
        "return/mean": 0.75,
        "value/mean": 0.625,
        "value/explained_variance": 0.875,
        "rollout/response_tokens": 9.0,
        "rollout/stopped": 0.0625,
        "rollout/token_distinct_2": 0.375,
        "rollout/tokens_per_second": 1600.0,  # of the workers, while they generate
        "policy/loss": -0.03125,
        "policy/grad_norm": 2.0,
        "policy/grad_norm_max": 3.0,
        "policy/learning_rate": 0.00025,
        "policy/skipped_updates": 1.0,
        "policy/entropy": 1.25,
        "policy/clip_fraction": 0.5,
        "policy/ratio_deviation": 0.0078125,
        "policy/logprob_gap_mean": 0.015625,
        "policy/logprob_gap_max": 0.046875,
        "staleness/versions": 1.25,
        "staleness/versions_max": 2.0,
        "staleness/effective_sample_size": 0.75,
        "staleness/kl": 0.03125,
        "staleness/far": 0.125,
        "critic/loss": 4.0,
        "critic/grad_norm": 2.0,
        "critic/grad_norm_max": 3.0,
        "critic/learning_rate": 0.00025,
        "critic/skipped_updates": 0.0,
        "critic/value_error": 0.5,
        "time/rollout": 1.0,
        "time/learn": 2.0,
        "time/step": 3.0,
        "time/tokens_per_second": 300.0,  # of the whole step
        "ledger/issued": 210.0,
        "ledger/trained": 200.0,
        "ledger/filtered": 2.0,
        "ledger/quarantined": 3.0,
        "ledger/in_flight": 5.0,
        "ledger/reissued": 7.0,
        "incident/rolled_back": 1.0,
    }
    assert values == expected


def test_without_a_critic_there_are_no_numbers_of_one() -> None:
    assert {key.split("/")[0] for key in metrics().values} - {
        key.split("/")[0] for key in metrics(critic=None).values
    } == {"critic"}


def test_metrics_are_one_json_line_a_step_on_disk_before_the_next(tmp_path: Path) -> None:
    """A killed run keeps the line of every step it finished: the file is read while it is still being written."""
    path = tmp_path / "metrics.jsonl"
    with Observer(tmp_path, Progress(console(terminal=False)[0])) as observer:
        for step in range(3):
            observer.phase("learn")
            observer.step(metrics(step, reward=step / 4))
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(step + 1))
            assert lines[-1] == {"step": step, "version": step + 1, **metrics(step, reward=step / 4).values}


def test_a_later_observer_appends(tmp_path: Path) -> None:
    for step in range(2):
        with Observer(tmp_path, Progress(console(terminal=False)[0])) as observer:
            observer.step(metrics(step))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_steps_that_are_done_again_replace_their_metrics(tmp_path: Path) -> None:
    """A run of five steps was killed in the middle of a line and goes on after step 2."""
    with Observer(tmp_path, Progress(console(False)[0])) as observer:
        for step in range(5):
            observer.step(metrics(step))
        observer.sync()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "vers')
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    out, printed = console(False)
    with Observer(tmp_path, progress := Progress(out)) as observer:
        progress.stage("reinforce", 4)
        observer.rewind(2)
        progress.rewind(2)
        for step in (2, 3):
            observer.step(metrics(step, reward=0.25))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["reward/mean"]) for record in records] == [(0, 0.5), (1, 0.5), (2, 0.25), (3, 0.25)]
    assert "reinforce 4/4" in printed.getvalue()


def test_the_account_of_a_run_names_reasons_and_starts(tmp_path: Path) -> None:
    run = config(steps=9)
    with new_run(tmp_path / "run", run) as folder:
        ledger = LedgerState(
            next_group=100,
            next_chunk=9,
            trained=90,
            filtered={"no variance": 2, "lost a member": 1},
            reissued=4,
            quarantined={7: "error: a", 9: "timeout: b", 12: "error: a"},
        )
        open_chunk = OpenChunk(number=8, first_group=96, groups=4, step=2, version=2, attempt=0)
        state = DriverState(step=5, kl_coef=0.1, ledger=ledger.model_copy(update={"open": (open_chunk,)}))
        Checkpoints(folder, 2).write(state, {})
        with Observer(folder.path, Progress(console(False)[0])) as observer:
            for step in range(7):
                observer.step(metrics(step))
        out, printed = console(False)
        show_account(folder.path, run, out)
    said = printed.getvalue()
    assert "samples after 5 of 9 committed steps" in said
    assert "issued 100 = 90 + 3 + 3 + 4: balances" in said
    assert re.search(r"re-issued\s*│\s*4", said)
    assert "every sample below 96 has ended" in said
    assert "quarantined 2: error: a" in said
    assert "filtered 2: no variance" in said
    assert "quarantined 1: timeout: b" in said
    assert "quarantined samples: 7, 9, 12" in said
    assert "steps 5 to 6 are done but not committed: they would be done again" in said
    assert "epoch 1: from step 0" in said
    assert "of steps after the last one" not in said
    out, printed = console(False)
    show_account(folder.path, run.model_copy(update={"steps": 2}), out)
    assert "4 are of steps after the last one, and are generated if the run is made longer" in printed.getvalue()


def test_a_kl_that_is_measured_every_few_steps_stays_in_view() -> None:
    out, text = console(terminal=False)
    progress = Progress(out)
    progress.stage("reinforce", 2)
    progress.step(metrics(0))
    progress.step(dataclasses.replace(metrics(1), values=metrics(1).values | {"kl/per_rollout": NAN}))
    assert "reinforce 2/2" in text.getvalue()
    assert text.getvalue().splitlines()[-1].count("KL 1.500") == 1


def silent(step: int) -> StepMetrics:
    return dataclasses.replace(metrics(step), values=metrics(step).values | {"policy/grad_norm_max": 0.0})


def test_steps_that_teach_nothing_are_said_once_also_after_a_break(tmp_path: Path) -> None:
    out, text = console(terminal=False)
    with Observer(tmp_path, Progress(out)) as observer:
        for step in range(5):
            observer.step(silent(step))
        observer.rewind(4)
        observer.step(silent(4))
    assert (
        text.getvalue().count(
            "warning: in the last 3 steps the policy's gradient was 0, so no weight changed; look at "
        )
        == 1
    )


def test_what_is_not_a_number_is_null(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Strict readers of JSON (jq, JavaScript) refuse a bare NaN; TensorBoard's writer would complain of it on the
    terminal.
    """
    odd = dataclasses.replace(metrics(), values=metrics().values | {"kl/per_rollout": NAN, "policy/loss": math.inf})
    with Observer(tmp_path, Progress(console(terminal=False)[0])) as observer:
        observer.step(odd)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["kl/per_rollout"], line["policy/loss"], line["reward/mean"]) == (None, None, 0.5)
    assert capfd.readouterr() == ("", "")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a TensorBoard file holds, by tag. Its records: length (8 bytes), checksum (4), an Event, checksum (4)."""
    [path] = folder.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), dict[str, list[tuple[int, float]]]()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_has_every_number_of_every_step(tmp_path: Path) -> None:
    with Observer(tmp_path, Progress(console(terminal=False)[0])) as observer:
        for step in range(2):
            observer.step(metrics(step, reward=step / 4))
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == set(metrics().values)
    assert found["reward/mean"] == [(0, 0.0), (1, 0.25)]
    for name, value in metrics(1, reward=0.25).values.items():
        step, written = found[name][1]
        assert step == 1
        assert written == pytest.approx(value, rel=1e-6)


def test_a_training_has_curves_too_and_what_is_taken_back_is_drawn_anew(tmp_path: Path) -> None:
    records = [{"epoch": 1, "updates": updates, "loss": 4.0 - updates, "text": "loss"} for updates in (2, 3, 5)]
    curves = _Curves(tmp_path)
    curves.restart(records[:1])
    for record in records[1:]:
        curves.add(record)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == records
    assert scalars(tmp_path / "tensorboard") == {
        "epoch": [(2, 1.0), (3, 1.0), (5, 1.0)],
        "loss": [(2, 2.0), (3, 1.0), (5, -1.0)],
    }
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()
    curves.restart(records[:2])
    curves.close()
    assert scalars(tmp_path / "tensorboard")["loss"] == [(2, 2.0), (3, 1.0)]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == records[:2]


def test_elsewhere_than_in_a_terminal_a_plain_line_now_and_then(clock: Clock) -> None:
    """When a stage begins, then after PLAIN_EVERY_S, and when it is done; no control characters, however narrow the
    log.
    """
    to, out = console(terminal=False)
    with Progress(to) as progress:
        progress.stage("reinforce", 4)
        for step, seconds in enumerate((1.0, PLAIN_EVERY_S, 1.0, 1.0)):
            clock.now += seconds
            progress.phase("learn")
            progress.step(metrics(step, reward=0.125 * step))
    assert out.getvalue().splitlines() == [
        "reinforce ...",
        "reinforce 2/4  reward 0.125  KL 1.500  entropy 1.250  token distinct-2 0.375  length 9.000  tok/s 300  left "
        "0:06",
        "reinforce 4/4  reward 0.375  KL 1.500  entropy 1.250  token distinct-2 0.375  length 9.000  tok/s 300  in "
        "0:08",
    ]


def test_remarks_do_not_keep_the_plain_line_away(clock: Clock) -> None:
    to, out = console(terminal=False)
    with Progress(to) as progress:
        progress.stage("reinforce", 40)
        for step in range(30):
            clock.now += 1
            progress.remark("warning: no gradient")
            progress.step(metrics(step))
    shown = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("reinforce") and "left" in line]
    assert shown == ["6/40", "12/40", "18/40", "24/40", "30/40"]


def test_a_stage_that_counts_without_metrics_says_how_it_went(clock: Clock) -> None:
    to, out = console(terminal=False)
    with Progress(to) as progress:
        progress.stage("fine-tune", 2)
        for note in ("loss [/b] 3.2", "loss :smile: 3.1"):  # neither markup nor emoji of ours
            clock.now += 70
            progress.advance(note)
    assert out.getvalue().splitlines() == [
        "fine-tune ...",
        "fine-tune 1/2  loss [/b] 3.2  left 1:10",
        "fine-tune 2/2  loss :smile: 3.1  in 2:20",
    ]


def test_a_wait_is_shown_with_its_time_and_leaves_a_line(clock: Clock) -> None:
    """What is over in no time leaves none."""
    for terminal in (False, True):
        to, out = console(terminal)
        with Progress(to) as progress:
            progress.stage("load libraries", 0)
            progress.stage("start actors", 1)
            clock.now += 70
            progress.phase("waiting for policy")
            clock.now += 5
            progress.remark("by the way")
        lines = [
            line.strip()
            for line in re.sub(r"\x1b\[[?0-9]*[a-zA-Z]|\r", "", out.getvalue()).splitlines()
            if line.strip()
        ]
        assert [line for line in lines if " in " in line] == ["start actors  in 1:15"]
        if terminal:
            assert "start actors 1:15 waiting for policy 0:05" in lines
        else:
            assert lines == ["load libraries ...", "start actors ...", "by the way", "start actors  in 1:15"]


def test_where_there_is_no_terminal_a_long_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "SILENT_S", 0.06)
    to, out = console(terminal=False)
    with Progress(to) as progress:
        progress.stage("start Ray", 0)
        progress.phase("waiting for a node")
        deadline = time.monotonic() + 10
        while "start Ray since 0:00  waiting for a node\n" not in out.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_pace_counts_from_where_a_stage_really_begins(clock: Clock) -> None:
    """The first time left is neither 0:00 nor that of the start-up."""
    to, out = console(terminal=False)
    with Progress(to) as progress:
        progress.stage("fine-tune", 10)
        clock.now += 60  # workers start
        progress.rewind(4)
        clock.now += 10
        progress.advance("loss 3.2")
        clock.now += 10
        progress.advance("loss 3.1")
    assert [line.rsplit("left ", 1)[1] for line in out.getvalue().splitlines() if "left" in line] == ["0:50", "0:40"]


def test_a_console_of_ascii_gets_bars_of_ascii(clock: Clock) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(Console(file=out, force_terminal=True, width=100, color_system=None)) as progress:
        progress.stage("reinforce", 4)
        for step, reward in enumerate((0.0, 1.0)):
            progress.step(metrics(step, reward=reward))
    out.seek(0)
    assert "reward _#" in out.read()


def test_the_time_left_is_of_this_stage_at_its_pace_so_far(clock: Clock) -> None:
    to, out = console(terminal=False)
    with Progress(to) as progress:
        clock.now += 500  # start-up is no part of a stage
        progress.stage("fine-tune", 1)
        clock.now += 10
        progress.advance("done")
        progress.stage("reinforce", 10)
        for step in range(10):
            clock.now += 60 if step < 5 else 30
            progress.step(metrics(step))
    told = [line.split("  ")[-1] for line in out.getvalue().splitlines() if not line.endswith("...")]
    assert told == [
        "in 0:10",
        *(f"left {left}" for left in ("9:00", "8:00", "7:00", "6:00", "5:00", "3:40", "2:34", "1:37", "0:46")),
        "in 7:30",
    ]


def test_in_a_terminal_a_few_lines_are_drawn_and_wiped(clock: Clock) -> None:
    to, out = console(terminal=True)
    with Progress(to) as progress:
        progress.stage("reinforce", 4)
        progress.phase("publish")
        for step, reward in enumerate((0.0, 1.0)):
            clock.now += 30
            progress.step(metrics(step, reward=reward))
    drawn = out.getvalue()
    assert re.search(r"reinforce +\S+━.* 2/4 1:00 left 1:00 publish 1:00", drawn)
    assert "reward  KL     entropy  token distinct-2  length  tok/s" in drawn
    assert "1.000   1.500  1.250    0.375             9.000   300" in drawn
    assert f"reward {SPARK[0]}{SPARK[-1]}" in drawn
    assert drawn.endswith("\x1b[2K")  # the last thing it does is to clear its lines


def test_a_new_stage_starts_from_nothing_in_a_terminal(clock: Clock) -> None:
    to, out = console(terminal=True)
    with Progress(to) as progress:
        progress.stage("reinforce", 4)
        progress.step(metrics())
        progress.stage("evaluate after", 2)
    assert re.search(r"evaluate after .* 0/2 0:00 left -:--", out.getvalue())
    assert "entropy" not in out.getvalue().split("evaluate after")[-1]


def test_the_live_view_ends_with_an_error_too() -> None:
    """The cursor comes back, whatever happens."""
    to, out = console(terminal=True)

    def run() -> None:
        with Progress(to) as progress:
            progress.stage("reinforce", 4)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert out.getvalue().count("\x1b[?25h") == out.getvalue().count("\x1b[?25l") == 1


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([], 60, ""),
        ([3.0], 60, "▁"),
        ([2.0, 2.0, 2.0], 60, "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 60, "▁▂▃▄▅▆▇█"),
        ([7, 0, 7], 60, "█▁█"),
        ([-1.0, 1.0], 60, "▁█"),
        ([0, 2, 4, 6, 8, 10, 12, 14], 4, "▁▃▅█"),  # means 1 5 9 13
        ([0, 0, 9], 2, "▁█"),
    ],
)
def test_sparkline(values: list[float], width: int, bars: str) -> None:
    assert sparkline(values, width) == bars


def test_a_long_sparkline_loses_no_value() -> None:
    for n in range(1, 200):
        marked = [0.0] * n
        marked[n // 3] = 1.0
        assert len(sparkline(marked)) == min(n, 60)
        assert n == 1 or SPARK[-1] in sparkline(marked)


def result(
    after: list[float], tmp_path: Path, *, words: tuple[str, str] = ("yes", "no"), kl: float = 0.5, best_of_n: int = 1
) -> Result:
    """Three prompts, a reply of each model to each; four of the baseline where best-of-n is asked for."""
    before = [[reward] + [reward + 0.5 * k for k in range(1, best_of_n)] for reward in (0.0, 1.0, 2.0)]
    found = measured([[reward] for reward in after], before, kl=kl, words=words)
    return Result(
        run_dir=tmp_path,
        stages={},
        evaluation=assess(found, policy="policy", baseline="finetuned", best_of_n=best_of_n, seed=0),
        seconds=61.4,
    )


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ([1.0, 2.0, 3.0], "The reward rose: +1.000 a prompt, 95 % interval +1.000 to +1.000."),
        ([-1.0, 0.0, 1.0], "The reward fell: -1.000 a prompt, 95 % interval -1.000 to -1.000."),
        (
            [0.0, 1.0, 2.0],
            "The reward cannot be told from what it was: +0.000 a prompt, 95 % interval +0.000 to +0.000.",
        ),
        (
            [1.0, 0.0, 2.0],
            "The reward cannot be told from what it was: +0.000 a prompt, 95 % interval -1.000 to +1.000.",
        ),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval_allows(after: list[float], words: str, tmp_path: Path) -> None:
    assert verdict(result(after, tmp_path).evaluation) == words


def test_the_summary_shows_both_sides_and_where_everything_is(tmp_path: Path) -> None:
    to, out = console(terminal=False)
    summary.show(result([1.0, 2.0, 3.0], tmp_path, best_of_n=4), 5, to)
    text = out.getvalue()
    assert re.search(r"prompt 0 +│ no 0 0 +│ yes 0 0 ", text)
    assert re.search(r"reward by the rule +│ \+1\.750 \(0\.750 to 2\.750\) +│ \+2\.000 \(1\.000 to 3\.000\)", text)
    assert re.search(r"win rate by the rule +│ +│ +62\.5% ", text)
    assert re.search(r"KL to the baseline, nats +│ +0 │ +0\.50 +\(0\.50 to 0\.50\)", text)
    assert re.search(r"best-of-n at that KL +│ \+2\.\d+ ", text)
    assert re.search(r"distinct-2 +│ +1\.000 │ +1\.000", text)
    assert re.search(r"tokens of a reply +│ +8\.0 │ +8\.0", text)
    assert f'from_pretrained("{tmp_path}/policy")' in text
    assert "a prompt, 95 % interval +0.250 to +0.250. 61 s in all.\n" in text
    assert ("pip install tensorboard" in text) == (importlib.util.find_spec("tensorboard") is None)
    for name in ("metrics.jsonl", "experience/", "report.md", "evaluation.json", "config.toml", "log/"):
        assert name in text


def test_the_commands_to_try_next_are_commands(tmp_path: Path) -> None:
    """They stand there whatever was run, so each must be right by itself."""
    tried = summary.next_steps(result([1.0, 2.0, 3.0], tmp_path)).partition("try next")[2]
    commands = [
        re.split(r" {3,}", line.strip())[0].split() for line in tried.splitlines() if line.startswith("  raylign ")
    ]
    assert [parse(words[1:]).recipe for words in commands] == ["walks", "walks", "quickstart"]


def test_printed_commands_stand_a_folder_with_a_space(tmp_path: Path) -> None:
    told = summary.next_steps(result([1.0, 2.0, 3.0], folder := tmp_path / "it's mine"))
    again, curves = (re.search(pattern, told) for pattern in (r"the run again: (.*)", r"(tensorboard --logdir .*)"))
    assert again and shlex.split(again[1]) == ["raylign", "run", f"{folder}/config.toml"]
    assert curves and shlex.split(curves[1]) == ["tensorboard", "--logdir", str(folder)]


def test_what_a_model_writes_is_shown_as_it_is(tmp_path: Path) -> None:
    """A language model may write anything, `[/b]` included, which rich would take for a tag that closes nothing."""
    to, out = console(terminal=False)
    odd = result([1.0, 2.0, 3.0], tmp_path / "run [/x]", words=("[/b] [red]hi[/red] :smile:", "no"))
    summary.show(odd, 5, to)
    assert "[/b] [red]hi[/red] :smile:" in out.getvalue()
    assert f"{tmp_path}/run [/x]/policy" in out.getvalue()


# ---- an evaluation in words, tables and a picture ----


def test_best_of_n_at_the_same_kl_is_told_also_where_the_policy_loses(tmp_path: Path) -> None:
    """Best-of-2 gains half at 0.19 nats; the policy spent 0.19, and gains 1, nothing, or loses."""
    ahead, level, behind = (
        yardstick(result(after, tmp_path, kl=math.log(2) - 0.5, best_of_n=2).evaluation)
        for after in ([2.0, 3, 4], [0.0, 1, 2], [-1.0, 0, 1])
    )
    assert ahead.startswith(
        "Best-of-n from the baseline at the same KL (n about 2.0) has a reward of +1.500: the policy is 1.500 above it "
        "(95 % interval +1.500"
    )
    assert ahead.endswith("Best-of-2 does not reach the policy's reward.")
    assert "the policy is 0.500 below it" in level
    assert "the policy is 1.500 below it" in behind
    assert behind.endswith("The policy's reward costs best-of-n 0.00 nats, the policy 0.19.")


def test_beyond_the_largest_n_a_loss_is_certain_and_a_lead_is_open(tmp_path: Path) -> None:
    lost, open_ = (
        yardstick(result(after, tmp_path, kl=4.0, best_of_n=2).evaluation) for after in ([-1.0, 0, 1], [2.0, 3, 4])
    )
    assert "Best-of-2 from the baseline has a reward of +1.500 at only 0.19 nats: the policy is 1.500 below it" in lost
    assert "n about 147, which the policy's KL would buy, can only be better." in lost
    assert "its KL would buy n about 147, which was not sampled: raise evaluation.best_of to compare." in open_
    assert yardstick(result([1.0, 2, 3], tmp_path).evaluation) == "", "best-of-n was not sampled"


def test_what_the_reward_cost(tmp_path: Path) -> None:
    tokens = np.array([1.0, 3.0])
    likelihood = Likelihood(
        policy=tokens * math.log(1 / 4), baseline=tokens * math.log(1 / 2), tokens=tokens, excluded=0
    )
    found = assess(
        measured([[0.0]] * 2, [[0.0]] * 2, kl=1.5, likelihood=likelihood),
        policy="policy",
        baseline="finetuned",
        best_of_n=1,
        seed=0,
    )
    assert price(found) == (
        "The policy is 1.50 nats a reply from the baseline (1.50 to 1.50); its perplexity on 2 held-out demonstrations "
        "rose: 2.0 before, 4.0 now, x 2.00."
    )


def test_the_report_says_all_and_quotes_replies_as_they_are(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "run" / "evaluation-1"
    out.mkdir(parents=True)
    (run_dir / "data-report.md").write_text("# data")
    judged = judge([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, -1.0]], [[3, 5], [4, 4], [9, 2], [5, 1]])
    (run_dir / "reward-model.json").write_text(
        json.dumps({"source": "machine-made", "loss_before": 0.9, "loss": 0.5, **asdict(judged)})
    )
    steps = [
        {"step": i, "kl/per_rollout": None if i % 5 else 0.1 * i, "reward/mean": 0.2 * i, "policy/grad_norm_max": 0.0}
        for i in range(20)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = result(
        [1.0, 2.0, 3.0], run_dir, words=("a | b `code` *c*", "no\n# heading"), kl=4.0, best_of_n=4
    ).evaluation
    write(found, out, run_dir)
    report = (out / "report.md").read_text()
    for said in (
        "# policy against finetuned\n",
        verdict(found),
        yardstick(found),
        "![reward against KL](frontier.png)",
        "| reward by the rule | +1.750 (0.750 to 2.750) | +2.000 (1.000 to 3.000) |",
        "| 4 | 0.64 | +2.500 (1.500 to 3.500) |",
        "| the policy | 4.00 | +2.000 (1.000 to 3.000) |",
        "## Steps in which nothing was learned\n\nIn 20 of 20 steps the policy's gradient was 0, so no weight changed; "
        "look at ",
        "The data, row by row: [data-report.md](../data-report.md).",
        "comparisons that are machine-made. Of 4 held-out ones it is right on 75.0 % (95 % interval 30.1 to 95.4 %, 4 "
        "comparisons); loss 0.900",
        "| +7 to +7 | 1 | 100.0% (20.7% to 100.0%) | 100.0% |",
        "| ` prompt 0 ` | ` no # heading ` | `` a \\| b `code` *c* `` |",
    ):
        assert said in report, said
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(found.record()))
    picture = (out / "frontier.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) < 100_000


def test_a_report_needs_no_run_and_no_best_of_n(tmp_path: Path) -> None:
    write(result([1.0, 2.0, 3.0], tmp_path, kl=-0.01).evaluation, tmp_path / "out", None)
    assert "Best-of-n" not in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "frontier.png").is_file()


def test_smoothing_keeps_a_line_and_a_mean() -> None:
    line = np.arange(10.0)
    assert smoothed(line, 2)[2:-2] == pytest.approx(line[2:-2])
    assert smoothed(np.array([0.0, 3.0, 0.0]), 1).tolist() == [1.5, 1.0, 1.5]
    assert smoothed(line, 0).tolist() == line.tolist()
