"""Whole runs that break off and go on: with real models, the same to the bit as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.config import CriticConfig, LearnerConfig
from cluster.gang import Gang
from cluster.session import Session
from entry_point import raylign
from pipeline.cli import main
from pipeline.config.recipe import load
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import FinetuneConfig, ModelConfig
from pipeline.observe.metrics import StepMetrics
from pipeline.observe.observer import Observer
from pipeline.run.start import resume, run_stages
from run_helpers import (
    ROOT,
    assert_same,
    await_log,
    environment,
    final_commit,
    forked_command,
    learning,
    metrics_of,
    pid_of,
    quiet,
    recipe,
)


@pytest.fixture(scope="module")
def whole(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run_stages(recipe(), run_dir, quiet())
    return run_dir


def go_on(run_dir: Path, config: RunConfig | None = None, allowed: tuple[str, ...] = ()) -> str:
    """Resume, and what it said."""
    console = quiet()
    resume(config or load(run_dir / "config.toml"), run_dir, allowed, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def taken_back(whole: Path, run_dir: Path, *, to_step: int = 2) -> Path:
    """A copy of a finished run as it was some steps earlier, but for what the steps since have left behind, which must
    do no harm.
    """
    shutil.copytree(whole, run_dir)
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "policy")
    for commit in (run_dir / "checkpoints").iterdir():
        if int(commit.name[5:13]) > to_step:
            shutil.rmtree(commit)
    return run_dir


@pytest.mark.slow
def test_without_a_commit_it_begins_again_with_the_fine_tuned_model(whole: Path, tmp_path: Path) -> None:
    run_dir = taken_back(whole, tmp_path / "run", to_step=0)
    finetuned = (run_dir / "finetuned" / "model.safetensors").stat().st_mtime_ns
    assert "resumed from the beginning, since there is no commit" in go_on(run_dir)
    assert (run_dir / "finetuned" / "model.safetensors").stat().st_mtime_ns == finetuned
    assert_same(run_dir, whole)


def finetuned(whole: Path) -> dict[str, Any]:
    """The settings of a run that begins with the model that was fine-tuned already."""
    return {"model": ModelConfig(path=str(whole / "finetuned")), "finetune": FinetuneConfig(epochs=0)}


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same over two ranks, at two ZeRO stages."""
    run_dir, ranks = (
        tmp_path_factory.mktemp("runs") / "sharded",
        {"learning_rate": 1e-3, "ranks": 2, "micro_batch_size": 5},
    )
    run_stages(
        recipe(
            policy=LearnerConfig(**ranks, zero_stage=2), critic=CriticConfig(**ranks, zero_stage=3), **finetuned(whole)
        ),
        run_dir,
        quiet(),
    )
    return run_dir


@pytest.mark.slow
def test_two_ranks_of_sharded_learners_learn_the_same(whole: Path, sharded: Path) -> None:
    """ZeRO 2 and 3 on two ranks against one process each: the same within float32 sums' accuracy."""
    assert_close(sharded, whole)


def assert_close(run_dir: Path, whole: Path) -> None:
    for ours, theirs in zip(learning(run_dir), learning(whole), strict=True):
        for key in (
            "policy/loss",
            "policy/grad_norm",
            "critic/loss",
            "critic/grad_norm",
            "reward/mean",
            "kl/per_rollout",
        ):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
def test_sharded_over_two_ranks_it_goes_on_past_a_damaged_commit_which_is_told(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 4 are committed; the later one is harmed, and the run is done again from the earlier one.

    A rank dies before it has read its shards.
    """
    run_dir = taken_back(sharded, tmp_path / "run", to_step=4)
    assert len(final_commit(run_dir).shards["policy"]) == 2
    shard = run_dir / "checkpoints" / final_commit(run_dir).name / "policy" / "rank-1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)
    once_met(monkeypatch, lambda: signalling(signal.SIGKILL, "policy[1]")(run_dir))
    said = go_on(run_dir)
    assert "policy[1] failed during 'restore' (the process or its node is gone); back to step 2, recovered in" in said
    assert (
        "commit step=00000004-epoch=0001 is damaged: policy/rank-1.safetensors has other bytes than were written"
        in said
    )
    assert "resumed from commit step=00000002-epoch=0001" in said
    assert_same(run_dir, sharded)


@pytest.mark.slow
def test_it_goes_on_with_other_ranks_and_stages_where_that_is_allowed(whole: Path, tmp_path: Path) -> None:
    run_dir = taken_back(whole, tmp_path / "run")
    config = load(run_dir / "config.toml")
    config = config.model_copy(
        update={"policy": LearnerConfig(learning_rate=1e-3, ranks=2, zero_stage=3, micro_batch_size=4)}
    )
    with pytest.raises(
        ValueError,
        match=r"policy.ranks: 1 -> 2   gives the same weights except for rounding: --allow-change policy.ranks",
    ):
        go_on(run_dir, config)
    said = go_on(run_dir, config, ("policy.ranks", "policy.zero_stage", "policy.micro_batch_size"))
    assert "changed: policy.ranks: 1 -> 2, which gives the same weights except for rounding" in said
    assert load(run_dir / "config.toml").policy.ranks == 2
    assert_close(run_dir, whole)


@pytest.mark.slow
def test_a_finished_run_says_so(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "history.json").read_bytes()
    assert main(["resume", str(whole)]) == 0
    assert "this run is finished: sft, rl, evaluate; everything is in" in capsys.readouterr().out.replace("\n", " ")
    assert (whole / "history.json").read_bytes() == before


# ---- processes that die, in a run that goes on ----


def disturbed(run_dir: Path, at: Mapping[int, Callable[[Path], None]], **changes: Any) -> str:
    """A run in which something is done after the metrics of some steps; what it said."""
    write, console = Observer.step, quiet()

    def step_and_act(self: Observer, metrics: StepMetrics) -> None:
        write(self, metrics)
        act = at.get(metrics.step)
        if act is not None and not (run_dir / f"acted-{metrics.step}").exists():
            (run_dir / f"acted-{metrics.step}").touch()
            act(run_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "step", step_and_act)
        run_stages(recipe(**changes), run_dir, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def once_met(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something the first time that the policy's ranks have met."""
    connect, met = Gang.connect, list[str]()

    def connect_and_act(self: Gang) -> list[Any]:
        found = connect(self)
        met.append(self.role)
        if met == ["policy"]:
            act()
        return found

    monkeypatch.setattr(Gang, "connect", connect_and_act)


def signalling(number: signal.Signals, *names: str) -> Callable[[Path], None]:
    def send(run_dir: Path) -> None:
        for who in names:
            os.kill(pid_of(run_dir, who), number)

    return send


@pytest.mark.slow
def test_rollout_reward_and_reference_workers_and_both_learners_may_die_in_one_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    kill = signal.SIGKILL
    once_met(monkeypatch, lambda: signalling(kill, "policy[0]")(run_dir))  # it idles while the critic loads its model
    deaths = {
        0: signalling(kill, "rollout[0]", "reward[0]", "reference[0]"),
        1: signalling(kill, "critic[0]"),
        2: signalling(kill, "policy[0]"),
    }
    said = disturbed(run_dir, deaths, **finetuned(whole))
    assert_same(run_dir, whole, reissued=True)
    for who in ("critic", "policy"):
        assert re.search(
            rf"{who}\[0\] failed during '[^']+' \(the process or its node is gone\); back to step \d, recovered in "
            r"[\d.]+ s",
            said,
        )
    assert metrics_of(run_dir)[-1]["incident/replaced_workers"] == 3
    assert "policy[0] failed during 'publish' (the process or its node is gone); back to step 0, recovered in" in said
    assert metrics_of(run_dir)[-1]["incident/rolled_back"] == 3


# ---- through the real entry point ----


@pytest.mark.slow
def test_sigterm_then_kill_9_then_the_end_by_the_command_line(whole: Path, tmp_path: Path) -> None:
    """N steps and N more are all at once: `train` is asked to stop, `resume` is killed, `resume` finishes: the same
    bits, and at no time a traceback.
    """
    run_dir, pipe = tmp_path / "run", subprocess.PIPE
    from_there = ("--model.path", str(whole / "finetuned"), "--finetune.epochs", "0")
    start = forked_command(
        "run", str(whole / "config.toml"), "--commit-every", "1", *from_there, "--run-dir", str(run_dir)
    )
    with subprocess.Popen(start, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        await_log(run_dir, "committed step=00000001", process)
        process.terminate()
        _, err = process.communicate(timeout=250)
    assert process.returncode == 143
    assert re.fullmatch(
        rf"raylign: stopped by SIGTERM after step [123] of 4, which is committed; to go on: raylign resume {run_dir}\n",
        err,
    )
    with subprocess.Popen(
        forked_command("resume", str(run_dir)), cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True
    ) as process:
        await_log(run_dir, "epoch 2 begins at step", process)
        process.kill()
        process.communicate(timeout=250)
    out = subprocess.run(
        forked_command("resume", str(run_dir)), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    assert "resumed from commit" in out.stdout
    assert_same(run_dir, whole)
    account = raylign("ledger", str(run_dir), cwd=ROOT).out
    assert "issued 64 = 64 + 0 + 0 + 0: balances" in account
    assert re.search(r"epoch 3: from step \d, ", account)


@pytest.mark.slow
def test_a_replay_finds_what_was_recorded_to_the_bit(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Step 3 from the commit after step 2."""
    assert main(["replay", str(whole), "--step", "3"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"\d\d numbers computed again: the same to the bit", out)
    for name in ("advantages", "returns", "policy/loss", "critic/loss", "policy/grad_norm"):
        assert name in out


@pytest.mark.slow
def test_a_replay_notices_a_recorded_number_that_is_not_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 1, before which no commit is kept: from the model the run began with."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    lines = metrics_of(run_dir)
    lines[1]["policy/loss"] += 0.01
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(run_dir), "--step", "1"]) == 1
    out = capsys.readouterr().out
    assert "NOT what the run recorded" in out
    assert [line for line in out.splitlines() if "policy/loss" in line and " 0 " not in line]
    assert [line for line in out.splitlines() if "critic/loss" in line and " 0 " in line], "all else is as it was"
