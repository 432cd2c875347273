"""Runs on several raylets that join, are killed and leave: the same final weights as on one quiet machine.

The pools work a step ahead of the learners (max_staleness 1), so samples of the next step are on nodes that go, too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raylets import Cluster, autoscaling_cluster, cluster
from run_helpers import environment

GATED = '''
import os, pathlib, time

GATE = pathlib.Path(__file__).with_name("gate")

def reward(prompts, responses, metadata):
    """The share of one letter; waits while the gate is closed, so that a test can act in the middle of a step."""
    while GATE.exists():
        time.sleep(0.02)
    return [response.count("a") / max(1, len(response)) for response in responses]
'''
RECIPE = [
    *("walks", "--steps", "24", "--commit-every", "4", "--seed", "3", "--max-staleness", "1"),
    *("--model.layers", "1", "--model.width", "16", "--finetune.epochs", "1"),
    *("--batch.prompts", "8", "--batch.epochs", "1", "--rollout.slots", "8", "--rollout.chunk-size", "2"),
    *("--rollout.workers", "3", "--cluster.cpus-per-bundle", "2", "--reward.function", "gated:reward"),
    *("--reward.timeout-s", "900", "--cluster.start-timeout-s", "300"),
]
FORKED = str(Path(__file__).with_name("forked_workers.py"))
PATIENCE_S = 300.0


class Run:
    """A run by the command line on a cluster, or on a Ray of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder / "run"
        self.gate = folder / "gate"
        (folder / "gated.py").write_text(GATED)
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, FORKED, "run", "train", *RECIPE, "--run-dir", str(self.folder)],
                env=environment,
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.output = folder / "output"

    @property
    def log(self) -> str:
        path = self.folder / "log" / "driver.log"
        return path.read_text() if path.is_file() else ""

    def await_line(self, pattern: str, since: int = 0) -> int:
        """Wait until the log has a line that fits, after so many characters; returns where it ends."""
        until = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.log[since:])):
            assert self.process.poll() is None and time.monotonic() < until, f"no {pattern!r} in\n{self.told()}"
            time.sleep(0.05)
        return since + found.end()

    @contextmanager
    def held(self) -> Iterator[int]:
        """Inside, no more than the step that is under way can be done; yields the length of the log at its begin."""
        self.gate.touch()
        yield len(self.log)
        self.gate.unlink()

    def end(self) -> str:
        """Wait for a good end; returns the log."""
        self.process.wait(timeout=PATIENCE_S)
        assert self.process.returncode == 0, self.told()
        return self.log

    def told(self) -> str:
        return f"{self.output.read_text()[-2500:]}\n{self.log[-2500:]}"

    @property
    def weights(self) -> bytes:
        return (self.folder / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the same run on one machine that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("quiet"), environment())
    run.end()
    return run.weights


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with cluster(2) as found:
        yield found


@pytest.mark.slow
def test_nodes_that_join_are_killed_and_leave_change_no_bit(quiet: bytes, tmp_path: Path, nodes: Cluster) -> None:
    """The learners sit on the head. It has room for one worker; two more come and go with their nodes."""
    run = Run(tmp_path, nodes.environment)
    run.await_line("rollout.0. ready")
    with run.held() as at:
        assert "2 of 3 bundles have no place yet; the run begins without them" in run.log
        first = nodes.add(2)
        at = run.await_line(rf"rollout\[1\] ready: pid \d+ on {first.ip}", at)
        second = nodes.add(2)
        at = run.await_line(rf"rollout\[2\] ready: pid \d+ on {second.ip}", at)
    run.await_line("step .* is done", at)
    with run.held() as at:  # chunks wait on every worker
        first.kill()
        at = run.await_line(rf"node \w+ \({first.ip}\) is gone, and with it rollout\[1\]", at)
    run.await_line("step .* is done", at)
    with run.held() as at:
        third = nodes.add(2)
        at = run.await_line(rf"rollout\[1\] ready: pid \d+ on {third.ip}", at)
        second.drain()
        at = run.await_line(rf"node \w+ \({second.ip}\) is about to leave, and with it rollout\[2\]", at)
    run.await_line(r"rollout\[2\] leaves its seat", at)
    log = run.end()
    assert run.weights == quiet
    assert "back to step" not in log, "the learners had nothing to do with it"
    account = ledger(run)
    assert account["issued"] - account["in_flight"] == account["trained"] == 24 * 8
    assert account["reissued"] > 0
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {step["incident/rolled_back"] for step in metrics} == {0}


def ledger(run: Run) -> dict[str, float]:
    """Its account after the last step."""
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {name.removeprefix("ledger/"): value for name, value in last.items() if name.startswith("ledger/")}


@pytest.mark.slow
def test_learners_go_on_elsewhere_when_their_node_is_gone_or_about_to_leave(quiet: bytes, tmp_path: Path) -> None:
    """The head holds the driver alone."""
    with cluster(0, notice_s=120) as nodes:
        first, second = nodes.add(2), nodes.add(2)
        run = Run(tmp_path, nodes.environment)
        run.await_line("step .* is done")
        learners, worker = (first, second) if f"on {first.ip}" in ready(run, "policy[0]") else (second, first)
        assert f"on {worker.ip}" in ready(run, "rollout[1]")
        with run.held() as at:
            learners.kill()
            # no node is free, so the other workers make room
            at = run.await_line(r"policy\[0\] failed during .*; back to step \d+, recovered in", at)
            assert f"on {worker.ip}" in ready(run, "policy[0]")
            third = nodes.add(2)
            at = run.await_line(rf"rollout\[1\] ready: pid \d+ on {third.ip}", at)
        run.await_line("step .* is done", at)
        with run.held() as at:
            worker.drain()
            at = run.await_line(rf"node \w+ \({worker.ip}\) is about to leave, and with it policy", at)
            fourth = nodes.add(2)
        at = run.await_line(r"the learners' node is about to leave; back to step \d+", at)
        assert f"on {fourth.ip}" in ready(run, "policy[0]")
        log = run.end()
    assert run.weights == quiet
    account = ledger(run)
    assert account["issued"] - account["in_flight"] == account["trained"] == 24 * 8
    (moved,) = re.findall(r"INFO the learners' node is about to leave; back to step (\d+)", log)
    assert f"step {int(moved) - 1} is done" in log, "what was done was committed first"


@pytest.mark.slow
def test_an_autoscaler_brings_nodes_for_the_run_and_takes_them_back(quiet: bytes, tmp_path: Path) -> None:
    with autoscaling_cluster(2, 2, most=2, idle_s=6) as nodes:
        run = Run(tmp_path, nodes.environment)
        at = run.await_line("2 of 3 bundles have no place yet; the run begins without them")
        with run.held():
            assert "rollout[0] ready" not in run.log[:at]
            run.await_line(r"rollout\[1\] ready: ", at)
            run.await_line(r"rollout\[2\] ready: ", at)
            assert nodes.alive() == 3
        run.end()
        until = time.monotonic() + PATIENCE_S
        while nodes.alive() > 1:
            assert time.monotonic() < until, "the nodes were not given back"
    assert run.weights == quiet


def ready(run: Run, who: str) -> str:
    """The last line that says where a process is."""
    return [line for line in run.log.splitlines() if f"{who} ready: " in line][-1]
