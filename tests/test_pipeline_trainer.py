"""Training on Ray Train: real workers, real DeepSpeed, two-layer models; and the training loop with a learner that is a
number.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from actors.config import SamplingConfig, TrainingConfig
from actors.learner.trainees.policy import PolicyTrainee
from actors.reward.worker import ClassifierReward
from cluster.config import ClusterConfig
from cluster.faults import Fault, RunError
from cluster.handshake import fingerprint
from cluster.placement import Bundle
from cluster.session import Session
from cluster.signals import PostponedStop
from cluster.stopping import StopNow, StopRequest
from cluster.storage import Folder
from cluster.watchdog import RankLog
from forked_workers import FOLDER
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig, FinetuneConfig, ModelConfig, RewardModelConfig
from pipeline.data.registry import load_task
from pipeline.observe.progress import Progress
from pipeline.preparation.finetune import FinetuneResult, Imitation, Perplexity, finetune
from pipeline.preparation.reward_model import RECORD, RewardModelResult, train_reward_model
from pipeline.preparation.site import TrainingSite
from pipeline.run.stages import check_new_model
from pipeline.tasks.task import Comparison, Split
from pipeline.tasks.walks import RandomWalks, optimality
from pipeline.training.checkpoints import TrainingCheckpoints
from pipeline.training.events import Event, Phase
from pipeline.training.job import HeldoutLoss, Record, TrainingJob, TrainingState
from pipeline.training.reservations import Reservations, hold
from pipeline.training.supervisor import explain_loss
from pipeline.training.trainer import Follower, _Curves, claim, fit
from pipeline.training.training_loop import TrainingLoop
from pipeline.training.worker import LOADING, START, TrainingSetup, as_run_error

PACKAGES = ("cluster", "actors", "pipeline")


# ---- with Ray ----


def recipe(**finetuning: Any) -> RunConfig:
    """A thousand walks, 16 updates an epoch, two parts an epoch."""
    learner = finetuning.pop("learner", TrainingConfig(learning_rate=3e-3, micro_batch_size=32))
    return RunConfig(
        task="walks",
        steps=1,
        model=ModelConfig(layers=2, width=16, heads=2, context=16),
        finetune=FinetuneConfig(
            **{"epochs": 3, "batch_size": 63, "checkpoint_every": 8, "learner": learner} | finetuning
        ),
        batch=BatchConfig(max_prompt_tokens=1),
        sampling=SamplingConfig(max_new_tokens=9),
        cluster=ClusterConfig(cpus_per_bundle=1, peer_timeout_s=60, call_timeout_s=300),
    )


@contextmanager
def opened(run_dir: Path, config: RunConfig) -> Iterator[tuple[Session, Progress, io.StringIO]]:
    """As a run opens it, on the session's Ray."""
    (run_dir / "log").mkdir(parents=True, exist_ok=True)
    said = io.StringIO()
    with (
        Progress(Console(file=said, width=200)) as progress,
        Session(config.cluster, run_dir / "log", packages=PACKAGES) as session,
    ):
        yield session, progress, said


def tuned(run_dir: Path, config: RunConfig) -> FinetuneResult:
    with opened(run_dir, config) as (session, progress, _):
        return fine_tuned(config, session, run_dir, progress)


def fine_tuned(config: RunConfig, session: Session, run_dir: Path, progress: Progress) -> FinetuneResult:
    return finetune(config, config.seed, site(config, session, run_dir, progress), lambda model: None)


def site(config: RunConfig, session: Session, run_dir: Path, progress: Progress) -> TrainingSite:
    return TrainingSite(session=session, cluster=config.cluster, run_dir=run_dir, progress=progress)


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learned(folder: Path) -> list[dict[str, Any]]:
    """The curve without what measures time."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in curve(folder)]


def rows_of(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def checksum(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class Pids(logging.Handler):
    """Who said last that it is ready, under its name in the log: sft[0]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if ready := re.match(r"(\S+) ready: pid (\d+) on ", record.getMessage()):
            self.found[ready[1]] = int(ready[2])


PIDS = Pids()


@pytest.fixture(scope="module", autouse=True)
def _pids() -> Iterator[None]:
    log = logging.getLogger("pipeline.training.trainer")
    log.addHandler(PIDS)
    log.setLevel(logging.INFO)
    yield
    log.removeHandler(PIDS)


@contextmanager
def when(folder: Path, done: int, act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` is called once, as soon as the driver has written so many records: a thread that looks at the
    file now and then may come too late, when the training is over.
    """
    add, acted = _Curves.add, list[int]()

    def add_and_act(self: _Curves, record: Record) -> None:
        add(self, record)
        if not acted and len(curve(folder)) >= done:
            acted.append(done)
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Curves, "add", add_and_act)
        yield
    assert acted


@contextmanager
def once_asked(act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` is called once the driver has asked the workers to stop."""
    check, acted = Follower.check_signals, list[Follower]()

    def check_and_act(self: Follower) -> None:
        check(self)
        if self._is_asked_to_stop and not acted:
            acted.append(self)
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Follower, "check_signals", check_and_act)
        yield
    assert acted


def kill(who: str, number: int = signal.SIGKILL) -> None:
    os.kill(PIDS.found[who], number)


def interrupt() -> None:
    """Ctrl-C, with the worker stopped, so that it cannot have done by the time that it is asked to stop."""
    kill("sft[0]", signal.SIGSTOP)
    signal.raise_signal(signal.SIGINT)


def go_on() -> None:
    """Once the supervisor has heard of the signal."""
    time.sleep(0.5)
    kill("sft[0]", signal.SIGCONT)


def running() -> str:
    """The titles of all workers of this process's Ray: other Rays may run on the machine."""
    titles = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_ours = f"{FOLDER}={os.environ[FOLDER]}" in (path / "environ").read_text(errors="replace").split("\0")
            titles += [(path / "cmdline").read_text().strip("\0")] if is_ours else []
    return "\n".join(title for title in titles if title.startswith("ray::"))


def await_end(cpus: float, who: str = "") -> None:
    """Nothing of the training runs on: the worker's process is gone, and what Ray lent the training is back."""
    import ray

    deadline = time.monotonic() + 300
    while (who and Path(f"/proc/{PIDS.found[who]}").exists()) or ray.available_resources()["CPU"] < cpus:
        assert time.monotonic() < deadline, running()
        time.sleep(0.1)


def own_groups() -> set[str]:
    """The placement groups of this job that Ray has reserved, or tries to reserve."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {
        name for name, found in placement_group_table().items() if name.endswith(job) and found["state"] != "REMOVED"
    }


@pytest.fixture(scope="module")
def whole(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuning on one worker, undisturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    tuned(run_dir, recipe())
    return run_dir


@pytest.mark.slow
def test_fine_tuning_leaves_a_model_a_curve_and_a_log(whole: Path) -> None:
    records = curve(whole / "sft")
    assert [record["updates"] for record in records] == [8, 16, 24, 32, 40, 48]
    assert [record["epoch"] for record in records] == [1, 1, 2, 2, 3, 3]
    assert ["perplexity" in record for record in records] == [False, True] * 3
    assert records[1]["perplexity"] > records[3]["perplexity"] > records[5]["perplexity"]
    assert (whole / "log" / "sft-0.log").is_file()
    assert len(list((whole / "sft" / "checkpoints").glob("updates-*"))) == 2, "older checkpoints are removed"


@pytest.mark.slow
def test_the_perplexity_is_that_of_the_saved_model(whole: Path) -> None:
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole / "finetuned")
    losses = []
    for row in pq.read_table(min((whole.parent / "cache").glob("*.parquet"), key=rows_of)).to_pylist():
        tokens = torch.tensor([row["tokens"]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits[0, :-1], -1).gather(-1, tokens[0, 1:, None])[:, 0]
        losses += (-logprobs[torch.tensor(row["action_mask"][1:])]).tolist()
    assert curve(whole / "sft")[-1]["perplexity"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)


@pytest.mark.slow
def test_a_killed_worker_and_an_interrupted_driver_change_no_bit(whole: Path, tmp_path: Path) -> None:
    """Killed after the first part, asked to stop after the third, called again: the same curve and the same weights."""
    config, folder = recipe(), tmp_path / "sft"
    with (
        StopRequest() as stop,
        when(folder, 1, lambda: kill("sft[0]")),
        when(folder, 3, interrupt),
        once_asked(go_on),
        pytest.raises(StopNow) as left,
    ):
        tuned(tmp_path, config)
    assert stop.number == signal.SIGINT
    assert str(left.value) == f"after update {curve(folder)[-1]['updates']} of 48 of 'fine-tune', which is checkpointed"
    assert 3 <= len(curve(folder)) < 6
    with opened(tmp_path, config) as (session, progress, said):
        found = fine_tuned(config, session, tmp_path, progress)
    assert "fine-tune 6/6" in said.getvalue()
    assert learned(folder) == learned(whole / "sft")
    assert checksum(tmp_path / "finetuned") == checksum(whole / "finetuned")
    assert found.perplexity == curve(folder)[-1]["perplexity"] < found.perplexity_before


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_learn_the_same(whole: Path, tmp_path: Path) -> None:
    """ZeRO 2 on two ranks against one process: losses and norms within the accuracy of float32 sums."""
    folder = tmp_path / "sft"
    with when(folder, 2, lambda: kill("sft[1]")):
        tuned(tmp_path, recipe(learner=TrainingConfig(learning_rate=3e-3, micro_batch_size=20, ranks=2, zero_stage=2)))
    for one, two in zip(curve(whole / "sft"), curve(folder), strict=True):
        for name in one.keys() - {"seconds", "text"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert noted(folder).keys() == noted(whole / "sft").keys(), "the rows of both ranks prove what is saved"


def noted(folder: Path) -> dict[str, list[float]]:
    """What the learner made of the probes, by the last checkpoint."""
    found = TrainingCheckpoints(folder, "sft").latest(print)
    assert found is not None
    return found.state.probe_values


class Preferring(RandomWalks):
    """Walks in pairs: the one that arrives sooner is better."""

    def comparisons(self, split: Split) -> list[Comparison]:
        found, walks = [], sorted(self.demonstrations(split), key=lambda walk: walk.prompt)
        for one, other in pairwise(walks):
            a, b = (optimality([walk.prompt], [walk.response], [{}])[0] for walk in (one, other))
            if one.prompt == other.prompt and a != b:
                better, worse = (one, other) if a > b else (other, one)
                found.append(Comparison(prompt=one.prompt, replies=(better.response, worse.response)))
        return found


def preferring(whole: Path, **training: Any) -> RunConfig:
    """A reward model from the fine-tuned walker, five parts an epoch."""
    learner = training.pop("learner", TrainingConfig(learning_rate=3e-3, micro_batch_size=32))
    config = recipe().model_copy(
        update={"task": f"{__name__}:Preferring", "model": ModelConfig(path=str(whole / "finetuned"))}
    )
    chosen = RewardModelConfig(**{"epochs": 2, "batch_size": 24, "checkpoint_every": 4, "learner": learner} | training)
    return config.model_copy(update={"finetune": FinetuneConfig(epochs=0), "reward_model": chosen})


def judged(run_dir: Path, config: RunConfig) -> tuple[RewardModelResult, str]:
    with opened(run_dir, config) as (session, progress, said):
        return train_reward_model(config, config.seed, site(config, session, run_dir, progress)), said.getvalue()


@pytest.fixture(scope="module")
def judge(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RewardModelResult, str]:
    """A reward model on one worker, undisturbed: its run folder, what is known of it, what was said."""
    run_dir = tmp_path_factory.mktemp("runs") / "judge"
    return run_dir, *judged(run_dir, preferring(whole))


@pytest.mark.slow
def test_a_reward_model_is_judged_as_reinforcement_learning_will_read_it(
    judge: tuple[Path, RewardModelResult, str],
) -> None:
    run_dir, found, said = judge
    judgement = found.judgement
    assert judgement.accuracy.low > 0.6, "a sum of walks says which is shorter"
    assert judgement.accuracy.value == pytest.approx(
        max(record.get("accuracy", 0) for record in curve(run_dir / "reward")), abs=0.02
    )
    assert judgement.prefers_longer < 0.4, "a sooner walk is a shorter one, and that shows"
    assert judgement.std == pytest.approx(1, abs=0.2)
    assert abs(judgement.mean) < 0.2
    assert found.loss < found.loss_before
    assert RewardModelResult.from_text((run_dir / RECORD).read_text(), run_dir / "reward-model") == found
    assert "reward model: right on" in said
    texts = pq.read_table(run_dir / "heldout-comparisons.parquet").to_pylist()
    reward = ClassifierReward(str(run_dir / "reward-model"))
    better, worse = (
        reward([row["prompt"] for row in texts], [row["replies"][i] for row in texts], [{}] * len(texts))
        for i in (0, 1)
    )
    assert float((np.sign(np.subtract(better, worse)) + 1).mean() / 2) == pytest.approx(
        judgement.accuracy.value, abs=1e-9
    )


@pytest.mark.slow
def test_a_reward_models_killed_worker_changes_no_bit(
    judge: tuple[Path, RewardModelResult, str], whole: Path, tmp_path: Path
) -> None:
    with when(tmp_path / "reward", 2, lambda: kill("reward-model[0]")):
        found, said = judged(tmp_path, preferring(whole))
    assert said.count("a worker was lost; the training goes on from its last checkpoint") == 1
    assert learned(tmp_path / "reward") == learned(judge[0] / "reward")
    assert checksum(tmp_path / "reward-model") == checksum(judge[0] / "reward-model")
    assert found.judgement == judge[1].judgement


@pytest.mark.slow
def test_a_reward_model_learns_the_same_on_two_workers(
    judge: tuple[Path, RewardModelResult, str], whole: Path, tmp_path: Path
) -> None:
    judged(
        tmp_path,
        preferring(whole, learner=TrainingConfig(learning_rate=3e-3, micro_batch_size=7, ranks=2, zero_stage=2)),
    )
    for one, two in zip(curve(judge[0] / "reward"), curve(tmp_path / "reward"), strict=True):
        for name in one.keys() - {"seconds", "text"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    assert noted(tmp_path / "reward").keys() == noted(judge[0] / "reward").keys()


@dataclass(frozen=True)
class Refusing:
    """A measure that counts how often it was asked, and raises; or sleeps."""

    asked: str
    sleeps: bool = False

    def __call__(self, learner: Any, heldout: pa.Table) -> HeldoutLoss:
        with Path(self.asked).open("a") as file:
            file.write("asked\n")
        if self.sleeps:
            time.sleep(600)
        raise KeyError("no such word")


def job(tmp_path: Path, **changes: Any) -> TrainingJob:
    """10 rows, 4 of an update: 3 updates an epoch, at most 2 of a record."""
    made = TrainingJob(
        name="sft",
        title="fine-tune",
        section="finetune",
        trainee=PolicyTrainee(objective=Imitation()),
        model="",
        train=tmp_path / "train",
        heldout=tmp_path / "heldout",
        rows=10,
        best=tmp_path / "best",
        learner=TrainingConfig(),
        measure=Perplexity(),
        epochs=3,
        early_stop=True,
        batch=4,
        checkpoint_every=2,
        seed=0,
    )
    return replace(made, **changes)


def failing(whole: Path, tmp_path: Path, cluster: ClusterConfig, **measuring: Any) -> str:
    """What is told of a training whose measure goes wrong."""
    import ray

    train, heldout = sorted((whole.parent / "cache").glob("*.parquet"), key=rows_of, reverse=True)
    measure = Refusing(str(tmp_path / "asked"), **measuring)
    asked = job(
        tmp_path, model=str(whole / "finetuned"), train=train, heldout=heldout, rows=rows_of(train), measure=measure
    )
    cpus = ray.available_resources()["CPU"]
    with opened(tmp_path, recipe()) as (session, progress, _), pytest.raises(RunError) as caught:
        fit(asked, cluster, session, tmp_path / "sft", progress)
    assert (tmp_path / "asked").read_text() == "asked\n", "it is not tried again"
    await_end(cpus, "sft[0]")
    return str(caught.value)


@pytest.mark.slow
def test_an_error_in_the_loop_is_told_once_and_at_once(whole: Path, tmp_path: Path) -> None:
    told = failing(whole, tmp_path, recipe().cluster)
    assert told.startswith("sft[0] failed during 'measure': the called code raised:\nKeyError: 'no such word'")
    assert "Traceback" in (tmp_path / "log" / "sft-0.log").read_text()


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_run_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    import ray

    config = recipe().model_copy(
        update={
            "cluster": ClusterConfig(cpus_per_bundle=1, max_rebuilds=0),
            "model": ModelConfig(path=str(whole / "finetuned")),
        }
    )
    told = (
        r"sft\[0\] failed during 'handshake': on its node, .*another/machine: No such file.* Put --run-dir on a "
        r"filesystem that all nodes share"
    )
    with opened(tmp_path, config) as (session, progress, _):
        cpus = ray.available_resources()["CPU"]
        assert session.mark is not None
        session.mark = replace(session.mark, file="/on/another/machine", patience_s=0)
        with pytest.raises(RunError, match=told):
            fine_tuned(config, session, tmp_path, progress)
        await_end(cpus)
    assert not (tmp_path / "finetuned").exists()


@pytest.mark.slow
def test_a_training_that_gives_no_sign_is_stopped(whole: Path, tmp_path: Path) -> None:
    told = failing(whole, tmp_path, ClusterConfig(cpus_per_bundle=1, call_timeout_s=2), sleeps=True)
    assert told.startswith(
        "sft failed during 'measure': no sign of progress for 2 s. If it only takes long, raise cluster.call_timeout_s"
    )


@pytest.mark.slow
def test_a_worker_that_is_lost_too_often_ends_the_training(ray_session: Session, tmp_path: Path) -> None:
    """And meanwhile no process has run that the training has no use for."""
    seen = []

    def end() -> None:
        kill("sft[0]", signal.SIGSTOP)
        seen.append(running())
        kill("sft[0]")

    before = running()  # Ray Data's own, of an earlier test on this Ray, stay for ever
    config = recipe().model_copy(update={"cluster": ClusterConfig(cpus_per_bundle=1, max_rebuilds=0)})
    with when(tmp_path / "sft", 1, end), pytest.raises(RunError) as caught:
        tuned(tmp_path, config)
    assert re.match(r"sft\[0\] failed during '.+': the process or its node is gone:\n", str(caught.value))
    for name in ("Supervisor", "RayTrainWorker"):
        assert name in seen[0]
    for name in (
        "TrainController",
        "DatasetManager",
        "PlacementGroupCleaner",
        "AutoscalingCoordinator",
        "PreemptionWatcher",
    ):
        assert name in before or name not in seen[0], "see small_trainer.py"


@pytest.mark.slow
def test_a_second_signal_ends_a_training_at_once(ray_session: Session, tmp_path: Path) -> None:
    import ray

    cpus = ray.available_resources()["CPU"]

    def ask() -> None:
        kill("sft[0]", signal.SIGSTOP)  # so that it cannot checkpoint first
        signal.raise_signal(signal.SIGTERM)

    def insist() -> None:
        signal.raise_signal(signal.SIGTERM)

    with StopRequest(), when(tmp_path / "sft", 1, ask), once_asked(insist), pytest.raises(StopNow) as left:
        tuned(tmp_path, recipe())
    assert str(left.value) == ""
    await_end(cpus, "sft[0]")


@pytest.mark.slow
def test_a_training_that_ends_while_it_waits_for_room_asks_for_none_later(ray_session: Session, tmp_path: Path) -> None:
    """Ray keeps what a killed process has asked for, until the job ends; no worker could tell the driver of it yet."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    before = own_groups()
    everything = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    assert everything.wait(300)

    def stop() -> None:
        while len(own_groups() - before) < 2:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    try:
        thread.start()
        with StopRequest(), pytest.raises(StopNow):
            tuned(tmp_path, recipe())
        assert own_groups() - before == {everything.id.hex()}
    finally:
        remove_placement_group(everything)


@pytest.mark.slow
def test_what_a_dying_process_reserves_is_released_and_later_it_reserves_nothing(ray_session: Session) -> None:
    """It makes a group after the driver has begun to wait for its end; groups from before stay."""
    from ray.util.placement_group import placement_group, remove_placement_group

    earlier = placement_group([{"CPU": 1}])
    before, reservations = own_groups(), Reservations()
    held, lock = hold(reservations.lock), reservations.lock

    def die() -> None:
        time.sleep(0.5)
        placement_group([{"CPU": 1}])
        held.close()

    thread = threading.Thread(target=die)
    thread.start()
    reservations.release()
    thread.join()
    assert own_groups() == before
    with pytest.raises(FileNotFoundError):
        hold(lock)
    remove_placement_group(earlier)


@pytest.mark.slow
def test_a_training_that_finds_no_room_says_so(whole: Path, tmp_path: Path) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    everything = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    assert everything.wait(300)
    config = ClusterConfig(cpus_per_bundle=1, place_timeout_s=1, max_rebuilds=0)
    told = r"cluster failed during 'placement': no room for 1 worker\(s\) of the sft training\. Other jobs hold"
    try:
        with opened(tmp_path, recipe()) as (session, progress, _), pytest.raises(RunError, match=told):
            fit(job(tmp_path, model=str(whole / "finetuned")), config, session, tmp_path / "sft", progress)
    finally:
        remove_placement_group(everything)


# ---- without ----


def test_prompts_that_do_not_fit_a_new_model_are_told_before_it_is_trained(tmp_path: Path) -> None:
    """Its tokenizer did not exist before, so nobody could look earlier."""
    config = recipe().model_copy(update={"task": "smalltalk", "batch": BatchConfig(max_prompt_tokens=1)})
    nobody: Any = None
    where = site(config, nobody, tmp_path / "run", Progress(Console(file=io.StringIO())))
    check = partial(check_new_model, config, load_task(config.task))
    with pytest.raises(ValueError, match=r"^batch\.max_prompt_tokens: prompt \d+ must have at most 1 tokens"):
        finetune(config, config.seed, where, check)


@dataclass
class Number:
    """A learner whose weights are one number, and whose held-out loss is scripted by it: what a training loop asks of a
    learner, and no more.
    """

    losses: list[float]  # by epochs done
    rank: int = 0
    weights: int = 0
    exported: list[int] = field(default_factory=list)
    made: list[tuple[int, int, int]] = field(default_factory=list)  # epoch, first, count
    training: float = 1.0
    calls: list[str] = field(default_factory=list)

    def await_peers(self) -> None:
        self.calls.append("await")

    def update(self, table: pa.Table, plan: Any) -> Any:
        self.made.append((plan.step, plan.first, plan.count))
        self.calls.append("update")
        self.weights += plan.count

        @dataclass
        class Report:
            loss: float = self.training
            grad_norm: float = 1.0
            skipped: int = 0
            learning_rate: float = 0.1
            seconds: float = 0.0

        return Report()

    def save(self, folder: str) -> Any:
        def write(path: Path) -> None:
            path.write_text(str(self.weights))

        return SimpleNamespace(file=Folder(folder).write_file("rank-0.safetensors", write))

    def restore(self, folder: str, files: list[str]) -> None:
        assert files == ["rank-0.safetensors"]
        self.calls.append("restore")
        self.weights = int((Path(folder) / files[0]).read_text())

    def export(self, folder: str) -> float:
        self.exported.append(self.weights)
        self.calls.append("export")
        return 1.0


@dataclass(frozen=True)
class Scripted:
    """The loss that a Number has after so many epochs of three updates."""

    def __call__(self, learner: Any, heldout: pa.Table) -> HeldoutLoss:
        learner.calls.append("measure")
        loss = learner.losses[learner.weights // 3]
        return HeldoutLoss(loss=loss, values={"held": loss}, text=f"held {loss:g}")


@dataclass
class Alone:
    """The only rank; its driver is a real one, in this process. asked: whether it is asked to stop, by calls."""

    driver: Follower
    asked: Callable[[], bool]

    def tell(self, event: Event) -> bool:
        self.driver.take(event)
        return False

    def is_stopping(self) -> bool:
        return self.asked()

    def gather(self, value: Any) -> list[Any]:
        return [value]


def trained(tmp_path: Path, learner: Number, **changes: Any) -> TrainingState:
    state = trained_until(tmp_path, learner, lambda: False, **changes)
    assert state is not None
    return state


def trained_until(
    tmp_path: Path,
    learner: Number,
    asked: Callable[[], bool],
    said: io.StringIO | None = None,
    keep: int = 99,
    **changes: Any,
) -> TrainingState | None:
    """A training in `tmp_path/sft`, or what is left of it; said: what its user is told."""
    (tmp_path / "sft").mkdir(parents=True, exist_ok=True)
    made: Any = learner
    asking = job(tmp_path, measure=Scripted(), **changes)
    with closing(follower(tmp_path / "sft", asking, said or io.StringIO(), PostponedStop())) as driver:
        return TrainingLoop(
            job=asking,
            learner=made,
            train=pa.table({}),
            heldout=pa.table({}),
            checkpoints=TrainingCheckpoints(tmp_path / "sft", "sft", keep),
            peers=Alone(driver, asked),
        ).run()


def follower(
    folder: Path, asked: TrainingJob, said: io.StringIO, signals: PostponedStop, supervisor: Any = None
) -> Follower:
    setup = TrainingSetup(
        job=asked,
        folder=folder,
        log_dir=folder,
        cluster=ClusterConfig(),
        bundle=Bundle(cpus=1, gpus=0),
        threads=1,
        fingerprint=fingerprint(()),
        packages=(),
        mark=None,
        is_alone=True,
    )
    return Follower(setup, supervisor, Progress(Console(file=said, width=200)), signals)


def checkpoints(tmp_path: Path) -> list[Path]:
    """Oldest first."""
    return sorted((tmp_path / "sft" / "checkpoints").iterdir())


def test_an_early_stop_keeps_the_best(tmp_path: Path) -> None:
    learner = Number(losses=[5, 3, 4, 1])
    state = trained(tmp_path, learner)
    assert (state.epoch, state.over, state.best.loss, state.before.loss) == (2, True, 3, 5)
    assert learner.exported == [0, 3], "the weights of the first epoch are what is left"
    assert learner.made == [(0, 0, 2), (0, 2, 1), (1, 0, 2), (1, 2, 1)], "records do not cross an epoch's end"
    assert [record["text"] for record in curve(tmp_path / "sft")] == [
        "loss 1.000",
        "loss 1.000  held 3",
        "loss 1.000",
        "loss 1.000  held 4",
    ]


def test_ranks_wait_for_each_other_before_whatever_they_do_together(tmp_path: Path) -> None:
    """Rank 0 writes the model, and a rank may read a checkpoint from a slower disk: the others must not wait for it in
    a collective.
    """
    learner = Number(losses=[5, 3])
    trained(tmp_path, learner, epochs=1)
    for name in ("measure", "update"):
        assert all(before == "await" for before, now in pairwise(learner.calls) if now == name)
    assert all(now == "await" for before, now in pairwise(learner.calls) if before == "export"), (
        "and after rank 0 has written"
    )
    assert learner.calls.count("update") == learner.calls.count("measure") == 2
    again = Number(losses=[5, 3])
    shutil.rmtree(checkpoints(tmp_path)[-1])
    trained(tmp_path, again, epochs=1)
    assert again.calls[:5] == ["await", "await", "restore", "await", "update"]


def test_what_changes_no_weight_makes_no_other_training(tmp_path: Path) -> None:
    """Its checkpoints count, in a folder that was moved, too; of another training they are thrown away,
    which is said.
    """

    def begun(**changes: Any) -> bool:
        """Whether a training found checkpoints of another one."""
        found = claim(tmp_path / "sft", job(tmp_path / str(changes.pop("where", "here")), **changes))
        (tmp_path / "sft" / "checkpoints" / "updates-00000002").mkdir(parents=True, exist_ok=True)
        return found

    assert not begun()
    assert not begun(checkpoint_every=5)
    assert not begun(where="there")
    assert not begun(learner=TrainingConfig(ranks=2, zero_stage=3, micro_batch_size=1, pack_tokens=64))
    for other in (
        {"learner": TrainingConfig(learning_rate=0.5)},
        {"batch": 5},
        {"seed": 1},
        {"epochs": 4},
        {"early_stop": False},
    ):
        assert begun(**other), other


def test_the_rank_nearest_to_the_root_cause_is_named(tmp_path: Path) -> None:
    """Of two workers one died, and the other, a lower rank, only lost its peer."""
    from ray.exceptions import RayActorError

    lost, peer = RayActorError(), RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    told = explain_loss("sft", "measure", {0: peer, 1: lost}, {})
    assert (told.who, told.phase, told.fault) == ("sft[1]", "measure", Fault.WORKER_LOST)
    unhealthy = Exception("A worker health check failed.\nThe actor died")  # of Ray Train's own
    assert explain_loss("sft", "measure", {0: peer, 1: unhealthy}, {}).fault is Fault.WORKER_LOST
    (tmp_path / "sft-0.log").write_text("")
    logs = {0: RankLog.now(str(tmp_path / "sft-0.log"))}
    assert explain_loss("sft", "measure", {0: lost, 1: lost}, logs).who == "sft[0]"
    (tmp_path / "sft-0.log").write_text("[E] Watchdog caught collective operation timeout: WorkNCCL(...)\n")
    assert explain_loss("sft", "measure", {0: lost, 1: lost}, logs).who == "sft[1]", "rank 0 only waited for it"
    alone = explain_loss("sft", "measure", {0: lost}, logs)
    assert alone.fault is Fault.PEER_LOST and "WorkNCCL" in str(alone)


def test_a_model_that_was_moved_is_no_other_training(tmp_path: Path) -> None:
    asked = job(tmp_path, model="gpt2")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here, there = (replace(asked, model=str(tmp_path / name)).digest for name in ("here", "there"))
    assert here == there
    assert replace(asked, model="another/hub-name").digest not in (here, asked.digest)


def test_a_training_that_only_gets_worse_keeps_the_model_it_began_with(tmp_path: Path) -> None:
    learner = Number(losses=[5, 6, 1, 1])
    assert trained(tmp_path, learner).best.loss == 5
    assert learner.exported == [0]


def test_without_an_early_stop_the_last_weights_are_kept(tmp_path: Path) -> None:
    learner = Number(losses=[5, 3, 4, 4.5])
    assert trained(tmp_path, learner, early_stop=False).best.loss == 4.5
    assert learner.exported == [0, 9]
    assert job(tmp_path).records == len(curve(tmp_path / "sft")) == 6


def test_a_training_goes_on_from_every_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    whole = trained(tmp_path, Number(losses=[5, 3, 2, 2.5]))
    kept, lines = checkpoints(tmp_path), (tmp_path / "sft" / "metrics.jsonl").read_text()
    assert [folder.name for folder in kept] == [
        "updates-00000002",
        "updates-00000005",
        "updates-00000008",
        "updates-00000009",
    ]
    for last in range(len(kept)):
        for folder in kept[last:]:
            shutil.rmtree(folder)
        again = Number(losses=[5, 3, 2, 2.5])
        assert trained(tmp_path, again) == whole
        assert again.weights == 9
        assert (tmp_path / "sft" / "metrics.jsonl").read_text() == lines
        assert all(folder.is_dir() for folder in kept)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other_bits(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("commit.json", Path.unlink, "commit.json is not whole (["),
        ("commit.json", cut, "commit.json is not whole (Expecting"),
        ("rank-0.safetensors", Path.unlink, "rank-0.safetensors is missing"),
        ("rank-0.safetensors", other_bits, "rank-0.safetensors has other bytes than were written (checksum"),
    ],
)
def test_a_torn_checkpoint_is_noticed_and_the_one_before_it_leads_to_the_same_end(
    file: str, damage: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    whole = trained(tmp_path, Number(losses=[5, 3, 2, 2.5]))
    for names in (["updates-00000009"], [folder.name for folder in checkpoints(tmp_path)]):
        for name in names:
            damage(tmp_path / "sft" / "checkpoints" / name / file)
        said, again = io.StringIO(), Number(losses=[5, 3, 2, 2.5])
        assert trained_until(tmp_path, again, lambda: False, said) == whole
        assert again.weights == 9
        assert again.made[0] == ((2, 2, 1) if len(names) == 1 else (0, 0, 2)), "after update 8, or from the beginning"
        lines = said.getvalue().splitlines()
        assert len(lines) == len(names)
        assert lines[0].startswith(f"sft: checkpoint updates-00000009 is damaged: {told}")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, Number(losses=[5, 3, 2, 2.5]), keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["updates-00000008", "updates-00000009"]


def test_a_training_that_is_asked_to_stop_checkpoints_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """After any of its records, also one after which no checkpoint was due; and before the first, when there is nothing
    to keep.
    """
    whole = trained(tmp_path / "whole", Number(losses=[5, 3, 2, 2.5]))
    for records in range(1, len(whole.history)):
        folder, answers = tmp_path / f"after {records}", iter([False] * (records + 1) + [True])
        left = trained_until(folder, learner := Number(losses=[5, 3, 2, 2.5]), lambda answers=answers: next(answers))
        assert left is not None
        assert (left.over, left.saved, learner.weights) == (
            False,
            whole.history[records - 1]["updates"],
            whole.history[records - 1]["updates"],
        )
        assert trained(folder, again := Number(losses=[5, 3, 2, 2.5])) == whole
        assert again.weights == 9
        assert curve(folder / "sft") == curve(tmp_path / "whole" / "sft")
    learner = Number(losses=[5])
    assert trained_until(tmp_path / "before", learner, lambda: True) is None
    assert (learner.exported, learner.made) == ([], [])
    answers = iter([False, True])
    assert trained_until(tmp_path / "measured", learner := Number(losses=[5]), lambda: next(answers)) is not None
    assert (learner.exported, learner.made) == ([0], []), "before the first update there is nothing to keep"


@pytest.mark.parametrize(
    ("learner", "told"),
    [
        (
            Number(losses=[float("nan")]),
            "sft failed during 'measure': its loss is nan, so its weights are not finite or have diverged. Check the "
            "weights",
        ),
        (
            Number(losses=[5, float("inf")]),
            "sft failed during 'measure after epoch 1': its loss is inf, so its weights are not finite or have "
            "diverged. Lower",
        ),
        (
            Number(losses=[5, 4], training=float("nan")),
            "sft failed during 'epoch 1, updates 1-2 of 3': its loss is nan",
        ),
    ],
)
def test_weights_that_nothing_good_can_come_of_end_the_training(learner: Number, told: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        trained(tmp_path, learner)
    assert str(caught.value).startswith(told)


def test_a_failure_speaks_as_its_error_did() -> None:
    told = RunError("sft[1]", "handshake", "it imports another copy", "Install it.")
    assert as_run_error(told, "sft[0]", "start") is told
    assert (
        str(as_run_error(ValueError("task: must be"), "sft[0]", "prepare"))
        == "sft[0] failed during 'prepare': task: must be."
    )
    assert str(as_run_error(OSError(28, "No space left on device"), "sft[0]", "export")).startswith(
        "sft[0] failed during 'export': the called code raised:\nOSError: [Errno 28] No space left on device"
    )


def test_a_signal_is_passed_on_to_workers_that_train_and_a_second_ends_them(tmp_path: Path) -> None:
    said, signals, asked = io.StringIO(), PostponedStop(), list[str]()
    supervisor = SimpleNamespace(ask_to_stop=SimpleNamespace(remote=lambda: asked.append("to stop")))
    driver = follower(tmp_path, job(tmp_path), said, signals, supervisor)
    driver.check_signals()
    with signals:
        signal.raise_signal(signal.SIGINT)
    for phase in (START, LOADING):
        driver.take(Phase(name=phase))
        with pytest.raises(StopNow):  # there is nothing that they could keep
            driver.check_signals()
    assert not asked
    driver.take(Phase(name="epoch 1, updates 1-2 of 3"))
    for _ in range(2):
        driver.check_signals()
        assert asked == ["to stop"]
    assert said.getvalue().splitlines() == [
        "SIGINT: the workers finish the updates they are doing and write a checkpoint; a second signal stops now and "
        "loses what came after the last checkpoint"
    ]
    with signals:
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopNow):
        driver.check_signals()
