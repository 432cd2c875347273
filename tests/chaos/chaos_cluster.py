"""Processes and nodes of one cluster die, stop, drain and join in one run, thirty times and more, as a seed decides:
the run ends, the ledger balances, nothing is trained twice, the same final weights as on one quiet machine.

Not part of `make test`: `make chaos-cluster` runs it. Prints how long the run took to recover from each kind of event,
and the share of useful time. RAYLIGN_CHAOS_SEED and RAYLIGN_CHAOS_EVENTS change the order and the number.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from chaos_processes import steps_done

from raylets import Cluster, Node, cluster
from run_helpers import assert_same, environment, final_commit, learning, metrics_of

SEED, EVENTS = int(os.environ.get("RAYLIGN_CHAOS_SEED", "7")), int(os.environ.get("RAYLIGN_CHAOS_EVENTS", "32"))
FORKED = str(Path(__file__).parents[1] / "forked_workers.py")
STEPS, SAMPLES = 8 * EVENTS + 20, 8
PATIENCE_S = 240.0
SLOW = '''
import pathlib, time

GATE = pathlib.Path(__file__).with_name("gate")

def reward(prompts, responses, metadata):
    """The share of one letter, after a little while, so that an event meets the middle of a step; waits at a gate."""
    time.sleep(0.15)
    while GATE.exists():
        time.sleep(0.02)
    return [response.count("a") / max(1, len(response)) for response in responses]
'''
RECIPE = [
    *("walks", "--steps", str(STEPS), "--commit-every", "2", "--seed", "3", "--evaluation.prompts", "4"),
    *("--model.layers", "1", "--model.width", "16", "--finetune.epochs", "1"),
    *("--batch.prompts", str(SAMPLES), "--batch.epochs", "1", "--rollout.slots", "8", "--rollout.chunk-size", "2"),
    *("--rollout.workers", "3", "--reward.workers", "2", "--reference.workers", "2"),
    *("--policy.ranks", "2", "--policy.micro-batch-size", "4", "--reward.function", "slow:reward"),
    *("--reward.timeout-s", "300"),
    *("--cluster.cpus-per-bundle", "1", "--cluster.start-timeout-s", "300", "--cluster.pulse-timeout-s", "6"),
    *("--cluster.peer-timeout-s", "10", "--cluster.max-replacements", "60", "--cluster.max-rebuilds", "6"),
]


class Story:
    """A run on a cluster, and what happens to it. recovered: kind -> seconds until it was two steps further."""

    def __init__(self, folder: Path, nodes: Cluster) -> None:
        self.folder, self.run_dir, self.nodes = folder, folder / "run", nodes
        self.moments = random.Random(SEED)
        self.recovered: dict[str, list[float]] = {}
        self.driver = self.start("run", *RECIPE, "--run-dir", str(self.run_dir))

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "output").open("a") as output:
            command = [sys.executable, FORKED, "run", *arguments]
            return subprocess.Popen(
                command, env=self.nodes.environment, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT
            )

    def await_step(self, step: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while steps_done(self.run_dir) < min(step, STEPS):
            assert self.driver.poll() is None and time.monotonic() < until, f"step {step}\n{self.told()}"
            time.sleep(0.02)

    def happen(self, kind: str, event: Callable[[], str]) -> None:
        """Let something happen at a random moment after a step, and wait until the run is two steps further."""
        self.await_step(steps_done(self.run_dir) + 1)
        time.sleep(self.moments.random() * 0.4)
        met, began = steps_done(self.run_dir), time.monotonic()
        what = event()
        time.sleep(0.2)
        self.await_step(met + 2)
        seconds = time.monotonic() - began
        self.recovered.setdefault(kind, []).append(seconds)
        print(f"  step {met:3}: {kind:22} {what:24} two steps further after {seconds:5.1f} s", flush=True)

    # ---- what may happen ----

    def signal_one(self, number: signal.Signals, *roles: str) -> str:
        """Signal a living process of one of these roles, when there is one."""
        log = (self.run_dir / "log" / "driver.log").read_text()
        newest = dict(re.findall(rf"((?:{'|'.join(roles)})\[\d\]) ready: pid (\d+)", log))
        living = sorted(who for who, pid in newest.items() if is_running(int(pid)))
        assert living, f"no process of {roles}"
        who = self.moments.choice(living)
        with suppress(ProcessLookupError):
            os.kill(int(newest[who]), number)
        return who

    def kill_driver(self) -> str:
        log = self.run_dir / "log" / "driver.log"
        self.driver.kill()
        self.driver.wait(timeout=30)
        at, until = len(log.read_text()), time.monotonic() + PATIENCE_S
        self.driver = self.start("resume", str(self.run_dir))
        while "reinforce begins" not in log.read_text()[at:]:
            assert self.driver.poll() is None and time.monotonic() < until, self.told()
            time.sleep(0.02)
        return "resumed"

    def some_node(self) -> Node:
        return self.moments.choice([node for node in self.nodes.nodes[1:] if node.is_alive])

    def kill_node(self) -> str:
        node = self.some_node()
        node.kill()
        return node.ip

    def drain_node(self) -> str:
        node = self.some_node()
        node.drain()
        return node.ip

    def replenish(self) -> None:
        """Have four nodes again, one more than are needed. The run stands meanwhile: a node takes long to start."""
        gate = self.folder / "gate"
        gate.touch()
        while sum(node.is_alive for node in self.nodes.nodes[1:]) < 4:
            self.nodes.add(1)
        gate.unlink()

    def told(self) -> str:
        log = self.run_dir / "log" / "driver.log"
        return f"{(self.folder / 'output').read_text()[-2000:]}\n{log.read_text()[-4000:] if log.is_file() else ''}"


def is_running(pid: int) -> bool:
    """Whether a process lives, and is neither a zombie nor stopped."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZXT"
    return False


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    (folder / "slow.py").write_text(SLOW)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def quiet(folder: Path) -> Path:
    """The same run on one machine to which nothing happens."""
    done = subprocess.run(
        [sys.executable, FORKED, "run", "run", *RECIPE, "--run-dir", str(folder / "quiet")],
        env=environment() | {"RAY_TMPDIR": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return folder / "quiet"


@pytest.mark.timeout(3600)
def test_a_run_on_a_cluster_that_is_never_quiet(folder: Path, quiet: Path) -> None:
    with cluster(0, notice_s=40) as nodes:
        for _ in range(4):
            nodes.add(1)
        story = Story(folder, nodes)
        story.await_step(1)
        workers, ranks = ("rollout", "reward", "reference"), ("policy", "critic")
        kinds: dict[str, Callable[[], str]] = {
            "kill a worker": lambda: story.signal_one(signal.SIGKILL, *workers),
            "stop a worker": lambda: story.signal_one(signal.SIGSTOP, *workers),
            "kill a rank": lambda: story.signal_one(signal.SIGKILL, *ranks),
            "stop a rank": lambda: story.signal_one(signal.SIGSTOP, *ranks),
            "kill the driver": story.kill_driver,
            "kill a node": story.kill_node,
            "drain a node": story.drain_node,
        }
        order = [kind for _ in range(-(-EVENTS // len(kinds))) for kind in kinds]
        random.Random(SEED).shuffle(order)
        print(f"\nseed {SEED}, {len(order)} events")
        for kind in order:
            story.happen(kind, kinds[kind])
            story.replenish()
        assert steps_done(story.run_dir) < STEPS, "the run was over before the last event"
        story.driver.wait(timeout=600)
        assert story.driver.returncode == 0, story.told()
    ledger = final_commit(story.run_dir).state.ledger
    last = learning(story.run_dir)[-1]
    assert last["ledger/issued"] == last["ledger/trained"] == STEPS * SAMPLES
    assert_same(story.run_dir, quiet, reissued=ledger.reissued > 0, metrics=False)
    report(story)


def report(story: Story) -> None:
    print("\nseconds until two steps further, an undisturbed step being short:")
    for kind, seconds in story.recovered.items():
        print(
            f"  {kind:22} {len(seconds)} times: {min(seconds):5.1f} to {max(seconds):5.1f}, median "
            f"{statistics.median(seconds):5.1f}"
        )
    useful = sum(step["time/step"] for step in metrics_of(story.run_dir))
    step = statistics.median(step["time/step"] for step in metrics_of(story.run_dir))
    lost = [max(0.0, each - 2 * step) for seconds in story.recovered.values() for each in seconds]
    print(f"useful: {useful:.0f} s of steps; {statistics.mean(lost):.1f} s lost to an event (mean)")
    print(f"share of useful time at one event a minute: {1 - statistics.mean(lost) / 60:.1%}")
