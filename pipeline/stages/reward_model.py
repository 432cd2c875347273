"""The reward model: a sequence classifier that learns from comparisons which reply is better, on Ray Train.

    L = -log sigmoid(r_better - r_worse - margin)    (actors/reward_model.py)

Early stopping goes by the held-out loss. What the saved classifier is worth is then measured as reinforcement learning will use it: by
`actors.reward.ClassifierReward`, on the held-out texts (judgement.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from actors.reward import ClassifierReward
from cluster.session import Session
from cluster.storage import Folder
from pipeline.config import RunConfig
from pipeline.data.encode import Encoded, encode_comparisons, encode_pairs
from pipeline.observe.progress import Progress
from pipeline.stages.finetune import CACHE
from pipeline.stages.judgement import Fifth, Judgement, judge
from pipeline.stages.loop import Job, Measured, Standing
from pipeline.stages.trainer import fit
from pipeline.tasks.task import SPLITS, Comparison, Split, comparisons_of, task_of

if TYPE_CHECKING:
    from actors.learner import Learner

MODEL, RECORD = "reward-model", "reward-model.json"
TEXTS = "heldout-comparisons.parquet"
_BATCH = 16  # comparisons that the classifier is asked about at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Where the classifier is, its loss on held-out comparisons before training and of the weights kept, and what it is worth there."""

    folder: Path
    source: str
    loss_before: float
    loss: float
    judgement: Judgement

    def to_text(self) -> str:
        """As JSON, for a run folder: without the folder, which is known there."""
        return json.dumps({"source": self.source, "loss_before": self.loss_before, "loss": self.loss, **asdict(self.judgement)}, indent=1)

    @classmethod
    def from_text(cls, text: str, folder: Path) -> Self:
        """What `to_text` gave."""
        fields = json.loads(text)
        source, before, loss = fields.pop("source"), fields.pop("loss_before"), fields.pop("loss")
        return cls(folder=folder, source=source, loss_before=before, loss=loss, judgement=Judgement.of(fields))


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """Of held-out comparisons, and the share of them that is ranked right."""

    def __call__(self, learner: Learner, heldout: pa.Table) -> Measured:
        found = learner.judge(heldout)
        values = {"heldout_loss": found.loss, "accuracy": found.accuracy}
        return Measured(loss=found.loss, values=values, text=f"held-out loss {found.loss:.3f}  accuracy {100 * found.accuracy:.1f} %")


def train_reward_model(
    config: RunConfig,
    session: Session,
    run_dir: Path,
    progress: Progress,
    comparisons: Mapping[Split, Sequence[Comparison]] | None = None,
    source: str = "the task's own",
) -> Judged:
    """Make the fine-tuned model, or the recipe's where there is none, a judge of replies. The classifier is `run_dir/reward-model`, its account
    `run_dir/reward-model.json`; what led there is in `run_dir/reward`.

    comparisons: both splits of them; None takes the task's. source: whose they are, for its account. Raises as `finetune` does, and goes on as it does.
    """
    from actors.reward_model import Preference

    assert comparisons is not None or config.reward_model.pairs == "task", "sampled comparisons are given"
    progress.stage("tokenise comparisons", 1)
    folder = run_dir / MODEL
    model = str((run_dir / "finetuned").absolute()) if config.finetune.epochs else config.model.path
    train, heldout = _tables(config, model, run_dir, comparisons)
    if excluded := len(train.excluded) + len(heldout.excluded):
        progress.remark(f"{excluded} of {train.rows + heldout.rows + excluded} comparisons do not fit the model's context and are left out")
    job = Job(
        name="reward-model",
        title="train the reward model",
        section="reward_model",
        role="reward",
        model=model,
        train=train.path.absolute(),
        heldout=heldout.path.absolute(),
        rows=train.rows,
        best=folder.absolute(),
        learner=config.reward_model.learner,
        objective=Preference(),
        measure=PreferenceLoss(),
        epochs=config.reward_model.epochs,
        early_stop=config.reward_model.early_stop,
        batch=config.reward_model.batch_size,
        checkpoint_every=config.reward_model.checkpoint_every,
        seed=config.seed,
        reference=str(train.path.absolute()) if config.reward_model.standardise else "",
        finish=Judging((run_dir / TEXTS).absolute()),
    )
    fitted = fit(job, config, session, run_dir / "reward", progress)
    before, best = fitted.standing.before.loss, fitted.standing.best.loss
    judged = Judged(folder=folder, source=source, loss_before=before, loss=best, judgement=Judgement.of(fitted.outcome))
    Folder(run_dir).write_text(RECORD, judged.to_text())
    for line in described(judged):
        progress.remark(line)
    return judged


def described(judged: Judged) -> list[str]:
    """For a person: how far the reward may be trusted, in a few lines."""
    found = judged.judgement
    first, last = found.by_length[0], found.by_length[-1]
    lengths = f"better reply {_longer(first)}: {100 * first.accuracy.value:.0f} %, {_longer(last)}: {100 * last.accuracy.value:.0f} %"
    return [
        f"reward model: right on {found.accuracy} of those held out",
        f"  the longer reply is the better one in {100 * found.longer.value:.1f} %, and the more rewarded one in {100 * found.prefers_longer:.1f} %; {lengths}",
        f"  loss {judged.loss_before:.3f} -> {judged.loss:.3f}; what it gives a probability of p is right in p of cases, but for {found.calibration_error:.3f}",
    ]


def _longer(fifth: Fifth) -> str:
    return f"{fifth.fewest:+d} to {fifth.most:+d} tokens longer"


def _tables(config: RunConfig, model: str, run_dir: Path, comparisons: Mapping[Split, Sequence[Comparison]] | None) -> tuple[Encoded, Encoded]:
    """Both splits in tokens, and the held-out ones that are in the table as text."""
    from actors.model import context_of

    task, context, cache = task_of(config), context_of(model), run_dir.parent / CACHE
    if comparisons is None:
        train, heldout = (encode_comparisons(task, split, model, context, cache) for split in SPLITS)
        texts: Sequence[Comparison] = comparisons_of(task, "heldout")
    else:
        train, heldout = (encode_pairs(comparisons[split], model, context, cache) for split in SPLITS)
        texts = comparisons["heldout"]
    left_out = set(heldout.excluded)
    kept = [comparison for number, comparison in enumerate(texts) if number not in left_out]
    table = pa.table({"prompt": [c.prompt for c in kept], "replies": pa.array([list(c.replies) for c in kept], pa.list_(pa.string()))})
    Folder(run_dir).write_file(TEXTS, lambda draft: pq.write_table(table, draft, compression="zstd"))
    return train, heldout


@dataclass(frozen=True, slots=True)
class Judging:
    """Asks the saved classifier about the held-out comparisons."""

    texts: Path

    def __call__(self, job: Job, standing: Standing, say: Callable[[str], None]) -> dict[str, Any]:
        from actors.device import assigned_compute

        say("load the saved reward model")
        reward = ClassifierReward(str(job.best), device=assigned_compute(job.learner.gpus).device)
        prompts, replies = (pq.read_table(self.texts)[name].to_pylist() for name in ("prompt", "replies"))
        rewards: list[list[float]] = []
        for start in range(0, len(prompts), _BATCH):
            say(f"judge, {start} of {len(prompts)}")
            batch = slice(start, start + _BATCH)
            asked = [prompt for prompt, own in zip(prompts[batch], replies[batch], strict=True) for _ in own]
            answers = iter(reward(asked, [reply for own in replies[batch] for reply in own], [{}] * len(asked)))
            rewards += [[next(answers) for _ in own] for own in replies[batch]]
        lengths = [[len(reward.tokenizer.encode(reply, add_special_tokens=False)) for reply in own] for own in replies]
        return asdict(judge(rewards, lengths, scale=standing.scale))
