"""Training on Ray Train: real workers, real DeepSpeed, two-layer models; and the course of a training with a learner that is a number."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from actors.config import SamplingConfig, TrainingConfig
from actors.reward import ClassifierReward
from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.session import Session
from pipeline.config import BatchConfig, FinetuneConfig, ModelConfig, RewardModelConfig, RunConfig
from pipeline.observe.progress import Progress
from pipeline.stages.finetune import Finetuned, Imitation, Perplexity, finetune
from pipeline.stages.loop import Course, Job, Measured, Standing
from pipeline.stages.reward_model import RECORD, Judged, train_reward_model
from pipeline.stages.signs import Failure, Signs
from pipeline.stages.trainer import _is_damaged, fit
from pipeline.tasks.task import Comparison, Split
from pipeline.tasks.walks import RandomWalks, optimality

PACKAGES = ("cluster", "actors", "pipeline")


# ---- with Ray ----


def recipe(**finetuning: Any) -> RunConfig:
    """A thousand walks, 16 updates an epoch, two parts an epoch."""
    learner = finetuning.pop("learner", TrainingConfig(learning_rate=3e-3, micro_batch_size=32))
    return RunConfig(
        task="walks",
        steps=1,
        model=ModelConfig(layers=2, width=16, heads=2, context=16),
        finetune=FinetuneConfig(**{"epochs": 3, "batch_size": 63, "checkpoint_every": 8, "learner": learner} | finetuning),
        batch=BatchConfig(max_prompt_tokens=1),
        sampling=SamplingConfig(max_new_tokens=9),
        cluster=ClusterConfig(cpus_per_bundle=1, peer_timeout_s=20, call_timeout_s=120),
    )


@contextmanager
def opened(run_dir: Path, config: RunConfig) -> Iterator[tuple[Session, Progress, io.StringIO]]:
    """As a run opens it, on the session's Ray."""
    (run_dir / "log").mkdir(parents=True, exist_ok=True)
    said = io.StringIO()
    with Progress(Console(file=said, width=200)) as progress, Session(config.cluster, run_dir / "log", packages=PACKAGES) as session:
        yield session, progress, said


def tuned(run_dir: Path, config: RunConfig) -> Finetuned:
    with opened(run_dir, config) as (session, progress, _):
        return finetune(config, session, run_dir, progress)


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learned(folder: Path) -> list[dict[str, Any]]:
    """The curve without what measures time."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in curve(folder)]


def rows_of(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def checksum(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@contextmanager
def when(folder: Path, done: int, act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` is called once so many parts are done."""

    def wait() -> None:
        while len(Signs(folder).read_metrics()) < done:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield
    thread.join(timeout=60)
    assert not thread.is_alive()


def kill(folder: Path, rank: int, number: int = signal.SIGKILL) -> None:
    os.kill(next(worker.pid for worker in Signs(folder).read_workers() if worker.rank == rank), number)


def interrupt(folder: Path) -> None:
    """Ctrl-C, with the worker stopped where it is, so that it cannot have done by the time the driver hears of it."""
    kill(folder, 0, signal.SIGSTOP)
    signal.raise_signal(signal.SIGINT)


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
    """Killed after the first part, interrupted after the third, called again: the same curve and the same weights."""
    config, folder = recipe(), tmp_path / "sft"
    with when(folder, 1, lambda: kill(folder, 0)), when(folder, 3, lambda: interrupt(folder)), pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, config)
    interrupted = len(curve(folder))
    assert interrupted < 6
    with opened(tmp_path, config) as (session, progress, said):
        found = finetune(config, session, tmp_path, progress)
    assert "fine-tune 6/6" in said.getvalue()
    assert learned(folder) == learned(whole / "sft")
    assert checksum(tmp_path / "finetuned") == checksum(whole / "finetuned")
    assert found.perplexity == curve(folder)[-1]["perplexity"] < found.perplexity_before


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_learn_the_same(whole: Path, tmp_path: Path) -> None:
    """ZeRO 2 on two ranks against one process: losses and norms within the accuracy of float32 sums."""
    folder = tmp_path / "sft"
    with when(folder, 2, lambda: kill(folder, 1)):
        tuned(tmp_path, recipe(learner=TrainingConfig(learning_rate=3e-3, micro_batch_size=20, ranks=2, zero_stage=2)))
    for one, two in zip(curve(whole / "sft"), curve(folder), strict=True):
        for name in one.keys() - {"seconds", "text"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3), name


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
    config = recipe().model_copy(update={"task": f"{__name__}:Preferring", "model": ModelConfig(path=str(whole / "finetuned"))})
    chosen = RewardModelConfig(**{"epochs": 2, "batch_size": 24, "checkpoint_every": 4, "learner": learner} | training)
    return config.model_copy(update={"finetune": FinetuneConfig(epochs=0), "reward_model": chosen})


def judged(run_dir: Path, config: RunConfig) -> tuple[Judged, str]:
    with opened(run_dir, config) as (session, progress, said):
        return train_reward_model(config, session, run_dir, progress), said.getvalue()


@pytest.fixture(scope="module")
def judge(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Judged, str]:
    """A reward model on one worker, undisturbed: its run folder, what is known of it, what was said."""
    run_dir = tmp_path_factory.mktemp("runs") / "judge"
    return run_dir, *judged(run_dir, preferring(whole))


@pytest.mark.slow
def test_a_reward_model_is_judged_as_reinforcement_learning_will_read_it(judge: tuple[Path, Judged, str]) -> None:
    run_dir, found, said = judge
    judgement = found.judgement
    assert judgement.accuracy.low > 0.6, "a sum of walks says which is shorter"
    assert judgement.accuracy.value == pytest.approx(max(record.get("accuracy", 0) for record in curve(run_dir / "reward")), abs=0.02)
    assert judgement.prefers_longer < 0.4, "a sooner walk is a shorter one, and that shows"
    assert judgement.std == pytest.approx(1, abs=0.2)
    assert abs(judgement.mean) < 0.2
    assert found.loss < found.loss_before
    assert Judged.from_text((run_dir / RECORD).read_text(), run_dir / "reward-model") == found
    assert "reward model: right on" in said
    texts = pq.read_table(run_dir / "heldout-comparisons.parquet").to_pylist()
    reward = ClassifierReward(str(run_dir / "reward-model"))
    better, worse = (reward([row["prompt"] for row in texts], [row["replies"][i] for row in texts], [{}] * len(texts)) for i in (0, 1))
    assert float((np.sign(np.subtract(better, worse)) + 1).mean() / 2) == pytest.approx(judgement.accuracy.value, abs=1e-9)


@pytest.mark.slow
def test_a_reward_models_killed_worker_changes_no_bit(judge: tuple[Path, Judged, str], whole: Path, tmp_path: Path) -> None:
    with when(tmp_path / "reward", 2, lambda: kill(tmp_path / "reward", 0)):
        found, _ = judged(tmp_path, preferring(whole))
    assert learned(tmp_path / "reward") == learned(judge[0] / "reward")
    assert checksum(tmp_path / "reward-model") == checksum(judge[0] / "reward-model")
    assert found.judgement == judge[1].judgement


@pytest.mark.slow
def test_a_reward_model_learns_the_same_on_two_workers(judge: tuple[Path, Judged, str], whole: Path, tmp_path: Path) -> None:
    judged(tmp_path, preferring(whole, learner=TrainingConfig(learning_rate=3e-3, micro_batch_size=7, ranks=2, zero_stage=2)))
    for one, two in zip(curve(judge[0] / "reward"), curve(tmp_path / "reward"), strict=True):
        for name in one.keys() - {"seconds", "text"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@dataclass(frozen=True)
class Refusing:
    """A measure that counts how often it was asked, and raises; or sleeps."""

    asked: str
    sleeps: bool = False

    def __call__(self, learner: Any, heldout: pa.Table) -> Measured:
        with Path(self.asked).open("a") as file:
            file.write("asked\n")
        if self.sleeps:
            time.sleep(600)
        raise KeyError("no such word")


def job(tmp_path: Path, **changes: Any) -> Job:
    """10 rows, 4 of an update: 3 updates an epoch, 2 of a part."""
    made = Job(
        name="sft", title="fine-tune", section="finetune", role="policy", model="", train=tmp_path / "train", heldout=tmp_path / "heldout", rows=10,
        best=tmp_path / "best", learner=TrainingConfig(), objective=Imitation(), measure=Perplexity(), epochs=3, early_stop=True, batch=4,
        checkpoint_every=2, seed=0,
    )  # fmt: skip
    return replace(made, **changes)


def failing(whole: Path, tmp_path: Path, config: RunConfig, **measuring: Any) -> RunError:
    """What is told of a training whose measure goes wrong."""
    train, heldout = sorted((whole.parent / "cache").glob("*.parquet"), key=rows_of, reverse=True)
    measure = Refusing(str(tmp_path / "asked"), **measuring)
    asked = job(tmp_path, model=str(whole / "finetuned"), train=train, heldout=heldout, rows=rows_of(train), measure=measure)
    with opened(tmp_path, config) as (session, progress, _), pytest.raises(RunError) as caught:
        fit(asked, config, session, tmp_path / "sft", progress)
    assert (tmp_path / "asked").read_text() == "asked\n", "it is not tried again"
    return caught.value


@pytest.mark.slow
def test_an_error_in_the_loop_is_told_once_and_at_once(whole: Path, tmp_path: Path) -> None:
    told = str(failing(whole, tmp_path, recipe()))
    assert told.startswith("sft[0] failed during 'measure': the called code raised:\nKeyError: 'no such word'")
    assert "Traceback" in (tmp_path / "log" / "sft-0.log").read_text()


@pytest.mark.slow
def test_a_training_that_gives_no_sign_is_stopped(whole: Path, tmp_path: Path) -> None:
    config = recipe().model_copy(update={"cluster": ClusterConfig(cpus_per_bundle=1, call_timeout_s=2)})
    told = str(failing(whole, tmp_path, config, sleeps=True))
    assert told.startswith("sft failed during 'measure': no sign of progress for 2 s. If it only takes long, raise cluster.call_timeout_s")
    [worker] = Signs(tmp_path / "sft").read_workers()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker.pid}").exists():
        assert time.monotonic() < deadline, "its worker runs on"
        time.sleep(0.1)


# ---- without ----


@dataclass
class Number:
    """A learner whose weights are one number, and whose held-out loss is scripted by it: what a Course asks of a learner, and no more."""

    losses: list[float]  # by epochs done
    rank: int = 0
    weights: int = 0
    exported: list[int] = field(default_factory=list)
    made: list[tuple[int, int, int]] = field(default_factory=list)  # epoch, first, count
    training: float = 1.0

    def update(self, table: pa.Table, plan: Any) -> Any:
        self.made.append((plan.step, plan.first, plan.count))
        self.weights += plan.count

        @dataclass
        class Report:
            loss: float = self.training
            grad_norm: float = 1.0
            skipped: int = 0
            learning_rate: float = 0.1
            seconds: float = 0.0

        return Report()

    def save(self, folder: str) -> None:
        (Path(folder) / "rank-0.safetensors").write_text(str(self.weights))

    def restore(self, folder: str, files: list[str]) -> None:
        assert files == ["rank-0.safetensors"]
        self.weights = int((Path(folder) / files[0]).read_text())

    def export(self, folder: str) -> float:
        self.exported.append(self.weights)
        return 1.0


@dataclass(frozen=True)
class Scripted:
    """The loss that a Number has after so many epochs of three updates."""

    def __call__(self, learner: Any, heldout: pa.Table) -> Measured:
        loss = learner.losses[learner.weights // 3]
        return Measured(loss=loss, values={"held": loss}, text=f"held {loss:g}")


class Shelf:
    """Keeps checkpoints in folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        kept = sorted(self.folder.glob("updates-*"))
        yield kept[-1] if kept else None

    def keep(self, name: str, write: Callable[[Path], None], metrics: Any) -> None:
        (self.folder / name).mkdir(parents=True)
        write(self.folder / name)


def course(tmp_path: Path, learner: Number, **changes: Any) -> Standing:
    (tmp_path / "sft").mkdir(exist_ok=True)
    made: Any = learner
    return Course(job(tmp_path, measure=Scripted(), **changes), made, pa.table({}), pa.table({}), Signs(tmp_path / "sft"), Shelf(tmp_path / "kept")).run()


def test_an_early_stop_keeps_the_best(tmp_path: Path) -> None:
    learner = Number(losses=[5, 3, 4, 1])
    standing = course(tmp_path, learner)
    assert (standing.epoch, standing.over, standing.best.loss, standing.before.loss) == (2, True, 3, 5)
    assert learner.exported == [0, 3], "the weights of the first epoch are what is left"
    assert learner.made == [(0, 0, 2), (0, 2, 1), (1, 0, 2), (1, 2, 1)], "parts do not cross an epoch's end"
    assert [record["text"] for record in curve(tmp_path / "sft")] == ["loss 1.000", "loss 1.000  held 3", "loss 1.000", "loss 1.000  held 4"]


def test_a_training_that_only_gets_worse_keeps_the_model_it_began_with(tmp_path: Path) -> None:
    learner = Number(losses=[5, 6, 1, 1])
    assert course(tmp_path, learner).best.loss == 5
    assert learner.exported == [0]


def test_without_an_early_stop_the_last_weights_are_kept(tmp_path: Path) -> None:
    learner = Number(losses=[5, 3, 4, 4.5])
    assert course(tmp_path, learner, early_stop=False).best.loss == 4.5
    assert learner.exported == [0, 9]
    assert job(tmp_path).parts == len(curve(tmp_path / "sft")) == 6


def test_a_training_goes_on_from_every_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    whole = course(tmp_path, Number(losses=[5, 3, 2, 2.5]))
    kept, lines = sorted((tmp_path / "kept").iterdir()), (tmp_path / "sft" / "metrics.jsonl").read_text()
    assert [folder.name for folder in kept] == ["updates-00000002", "updates-00000005", "updates-00000008", "updates-00000009"]
    for last in range(len(kept)):
        for folder in kept[last:]:
            shutil.rmtree(folder)
        again = Number(losses=[5, 3, 2, 2.5])
        assert course(tmp_path, again) == whole
        assert again.weights == 9
        assert (tmp_path / "sft" / "metrics.jsonl").read_text() == lines
        assert all(folder.is_dir() for folder in kept)


@pytest.mark.parametrize(
    ("learner", "told"),
    [
        (Number(losses=[float("nan")]), "sft failed during 'measure': its loss is nan, so its weights are not finite or have diverged. Check the weights"),
        (Number(losses=[5, float("inf")]), "sft failed during 'measure after epoch 1': its loss is inf, so its weights are not finite or have diverged. Lower"),
        (Number(losses=[5, 4], training=float("nan")), "sft failed during 'epoch 1, updates 1-2 of 3': its loss is nan"),
    ],
)
def test_weights_that_nothing_good_can_come_of_end_the_training(learner: Number, told: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        course(tmp_path, learner)
    assert str(caught.value).startswith(told)


def test_a_failure_speaks_as_its_error_did() -> None:
    told = RunError("sft[1]", "handshake", "it imports another copy", "Install it.")
    assert str(Failure.of(told, "sft[0]", "start").error()) == str(told)
    assert str(Failure.of(ValueError("task: must be"), "sft[0]", "prepare").error()) == "sft[0] failed during 'prepare': task: must be."
    assert str(Failure.of(OSError(28, "No space left on device"), "sft[0]", "export").error()).startswith(
        "sft[0] failed during 'export': the called code raised:\nOSError: [Errno 28] No space left on device"
    )


def test_a_list_of_checkpoints_that_was_half_written_is_noticed(tmp_path: Path) -> None:
    assert not _is_damaged(tmp_path)
    storage = tmp_path / "checkpoints"
    (storage / "updates-8").mkdir(parents=True)
    snapshot = storage / "checkpoint_manager_snapshot.json"
    snapshot.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "updates-8"}]}))
    assert not _is_damaged(tmp_path)
    snapshot.write_text(snapshot.read_text()[:-9])
    assert _is_damaged(tmp_path)
    snapshot.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "updates-9"}]}))
    assert _is_damaged(tmp_path)


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert Signs(tmp_path).read_metrics() == [{"a": 1}, {"a": 2}]
