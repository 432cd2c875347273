"""Whose a run folder is: locks, epochs, and what counts as its history."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from actors.config import TrainingConfig
from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.session import Session
from driver_setup import config
from pipeline.config.recipe import load
from pipeline.folder.run_folder import HISTORY, RunFolder, RunStart, counts, read_history, steps_at
from pipeline.plan.places import sized_for
from pipeline.plan.preflight import resolve
from pipeline.run.start import _sized
from run_helpers import new_run

HOLD = """
import sys, time
from pathlib import Path
from pipeline.folder.run_folder import RunFolder
with RunFolder.open(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def begun(path: Path) -> Path:
    with new_run(path, config()):
        pass
    return path


def test_what_the_cluster_decides_is_settled_in_the_epoch_and_in_the_saved_recipe(tmp_path: Path) -> None:
    with new_run(tmp_path / "run", config()) as folder:
        folder.begin(config(), from_step=2)
        folder.settle(config(call_timeout_s=7.0))
    before, last = read_history(tmp_path / "run")
    assert before.config == config().model_dump(mode="json")
    assert (last.number, last.from_step, last.config) == (2, 2, config(call_timeout_s=7.0).model_dump(mode="json"))
    assert load(tmp_path / "run" / "config.toml", checked=False) == config(call_timeout_s=7.0)


def test_on_a_joined_cluster_the_cpus_of_a_bundle_come_from_its_nodes_and_stay(
    ray_session: Session, tmp_path: Path
) -> None:
    """A node of 16 CPUs and two bundles.

    A later start finds another cluster, but the bits of the run depend on the number.
    """
    said: list[str] = []
    joined = config(address="10.0.0.1:6379").model_copy(update={"cluster": ClusterConfig(address="10.0.0.1:6379")})
    assert resolve(joined).cluster.cpus_per_bundle == 0, "this machine's cores mean nothing there"
    assert resolve(joined.model_copy(update={"cluster": ClusterConfig(address="local")})).cluster.cpus_per_bundle > 0
    with new_run(tmp_path / "run", joined) as folder:
        first = _sized(joined, ray_session, folder, said.append)
        assert first.cluster.cpus_per_bundle == 8
        folder.settle(first)
        folder.begin(joined, from_step=0)
        wider = joined.model_copy(update={"rollout": joined.rollout.model_copy(update={"workers": 4})})
        assert sized_for(wider, ("rl",), ray_session.nodes(), said.append).cluster.cpus_per_bundle == 4
        assert _sized(wider, ray_session, folder, said.append).cluster.cpus_per_bundle == 8
    huge = joined.model_copy(update={"rollout": joined.rollout.model_copy(update={"workers": 17})})
    assert sized_for(huge, ("rl",), ray_session.nodes(), said.append).cluster.cpus_per_bundle == 1, "nodes may yet come"
    tuned = joined.model_copy(
        update={"finetune": joined.finetune.model_copy(update={"learner": TrainingConfig(ranks=4)})}
    )
    assert sized_for(tuned, ("sft", "rl"), ray_session.nodes(), said.append).cluster.cpus_per_bundle == 4, (
        "every stage has its place"
    )
    assert said == [
        "no node has room for all bundles yet, so each gets 1 CPU; to have more, set cluster.cpus_per_bundle"
    ]


def test_every_start_takes_an_epoch_and_writes_it_down(tmp_path: Path) -> None:
    with new_run(tmp_path / "run", config()) as folder:
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
        with pytest.raises(
            ValueError, match=rf"RUN_DIR: must not be in use, but process {holder.pid} on .* is at work"
        ):
            RunFolder.open(path)
        holder.kill()  # -9: the kernel gives the lock back
        holder.wait(10)
        RunFolder.open(path).__exit__(None, None, None)


def test_without_locks_the_epoch_alone_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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


def epoch(number: int, from_step: int, **config: int) -> RunStart:
    return RunStart(number=number, from_step=from_step, pid=1, host="h", started="", versions={}, config=config)


@pytest.mark.parametrize(
    ("of_epoch", "step", "belongs"),
    [(1, 4, True), (1, 6, False), (2, 4, True), (2, 8, True), (2, 10, False), (3, 10, True)],
)
def test_what_a_later_epoch_went_back_behind_does_not_count(of_epoch: int, step: int, belongs: bool) -> None:
    """Epoch 2 began at step 4, epoch 3 at step 8: a commit of epoch 1 after step 6 was made by a process that was no
    longer wanted.
    """
    assert counts([epoch(1, 0), epoch(2, 4), epoch(3, 8)], of_epoch, step) is belongs


@pytest.mark.parametrize(("step", "steps"), [(0, 8), (3, 8), (4, 20), (9, 20), (10, 30), (99, 30)])
def test_a_step_was_made_at_the_rates_of_a_run_that_was_then_so_long(step: int, steps: int) -> None:
    """Epoch 2 began at step 4 and extended the run, and so did epoch 3 at step 10."""
    history = [epoch(1, 0, steps=8), epoch(2, 4, steps=20), epoch(3, 10, steps=30)]
    assert steps_at(history, step) == steps


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
