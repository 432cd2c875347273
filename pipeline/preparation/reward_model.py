"""The reward model: a sequence classifier that learns from comparisons which reply is better, on Ray Train.

    L = -log sigmoid(r_better - r_worse - margin)    (actors/models/reward_model.py)

Early stopping compares the held-out loss. After training, the saved classifier scores the held-out texts through
`actors.reward.worker.ClassifierReward`, as it will in reinforcement learning (reward_model_report.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from actors.models.text import TextCodec
from actors.reward.worker import ClassifierReward
from cluster.storage import Folder
from pipeline.config.preparation_config import PreparationConfig
from pipeline.config.sections import RewardModelConfig
from pipeline.data.registry import load_task
from pipeline.encoding.encode import encode_comparisons, encode_pairs
from pipeline.preparation.reward_model_report import Fifth, RewardModelReport, judge
from pipeline.preparation.saved_model_check import check_rewards, choose_probes, comparison_ids
from pipeline.preparation.site import TrainingSite
from pipeline.preparation.splits import EncodedSplits
from pipeline.tasks.task import SPLITS, Comparison, Split, comparisons_of
from pipeline.training.job import HeldoutLoss, TrainingJob, TrainingState
from pipeline.training.probes import RewardProbes

if TYPE_CHECKING:
    from actors.learner.learner import Learner

MODEL, RECORD = "reward-model", "reward-model.json"
TEXTS = "heldout-comparisons.parquet"
Texts = list[tuple[str, tuple[str, ...]]]  # (prompt, replies) of each row of the held-out table
_BATCH = 16  # comparisons that the classifier scores at once


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelResult:
    """The classifier's folder, its held-out loss before training and of the weights kept, and the report on it."""

    folder: Path
    source: str
    loss_before: float
    loss: float
    judgement: RewardModelReport

    def to_text(self) -> str:
        """The result as JSON, without the folder, since the text is stored beside it."""
        return json.dumps(
            {"source": self.source, "loss_before": self.loss_before, "loss": self.loss, **asdict(self.judgement)},
            indent=1,
        )

    @classmethod
    def from_text(cls, text: str, folder: Path) -> Self:
        """Read back what `to_text` returned."""
        fields = json.loads(text)
        source, before, loss = fields.pop("source"), fields.pop("loss_before"), fields.pop("loss")
        return cls(folder=folder, source=source, loss_before=before, loss=loss, judgement=RewardModelReport.of(fields))


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """The mean loss of held-out comparisons, and the accuracy: the share of them that is ranked right."""

    def __call__(self, learner: Learner, heldout: pa.Table) -> HeldoutLoss:
        found = learner.judge(heldout)
        accuracy = found.statistics["accuracy"]
        values = {"heldout_loss": found.loss, "accuracy": accuracy}
        return HeldoutLoss(
            loss=found.loss,
            values=values,
            text=f"held-out loss {found.loss:.3f}  accuracy {100 * accuracy:.1f} %",
        )


def train_reward_model(
    config: PreparationConfig,
    seed: int,
    site: TrainingSite,
    comparisons: Mapping[Split, Sequence[Comparison]] | None = None,
    source: str = "the task's own",
) -> RewardModelResult:
    """Train a reward model from the fine-tuned model, or from the recipe's model where nothing was fine-tuned.

    The classifier is written to `reward-model` in the run folder, the report on it to `reward-model.json`; checkpoints
    and metrics are in `reward`. Called again, it resumes from the last checkpoint.

    comparisons: both splits; None takes the task's comparisons. source: where the comparisons are from, for the report.

    Raises ValueError for unusable data, RunError when the training fails.
    """
    assert comparisons is not None or config.reward_model.pairs == "task", "sampled comparisons are given"
    site.progress.stage("tokenise comparisons", 1)
    model = str((site.run_dir / "finetuned").absolute()) if config.finetune.epochs else config.model.path
    splits, texts = _encoded(config, model, site, comparisons)
    job = _job(config.reward_model, seed, model, site.run_dir, splits, texts)
    trained = site.fit(job, "reward")
    result = RewardModelResult(
        folder=site.run_dir / MODEL,
        source=source,
        loss_before=trained.state.before.loss,
        loss=trained.state.best.loss,
        judgement=RewardModelReport.of(trained.outcome),
    )
    Folder(site.run_dir).write_text(RECORD, result.to_text())
    for line in described(result):
        site.progress.remark(line)
    return result


def _job(
    config: RewardModelConfig, seed: int, model: str, run_dir: Path, splits: EncodedSplits, texts: Texts
) -> TrainingJob:
    from actors.learner.trainees.reward_model import RewardModelTrainee
    from actors.models.reward_model import Preference
    from actors.models.tokenizer import load_tokenizer

    scale_texts = str(splits.train.path.absolute()) if config.standardise else ""
    ids = comparison_ids(TextCodec(load_tokenizer(model)))
    return splits.job(
        config,
        name="reward-model",
        title="train the reward model",
        section="reward_model",
        trainee=RewardModelTrainee(objective=Preference(), scale_texts=scale_texts),
        model=model,
        best=run_dir / MODEL,
        measure=PreferenceLoss(),
        seed=seed,
        new_head=True,
        probes=RewardProbes(choose_probes(splits.heldout.path, texts, ids)),
        finish=Judging((run_dir / TEXTS).absolute()),
    )


def described(judged: RewardModelResult) -> list[str]:
    """A few lines that tell the user how far the reward can be trusted."""
    found = judged.judgement
    first, last = found.by_length[0], found.by_length[-1]
    lengths = (
        f"better reply {_longer(first)}: {100 * first.accuracy.value:.0f} %, {_longer(last)}: "
        f"{100 * last.accuracy.value:.0f} %"
    )
    return [
        f"reward model: right on {found.accuracy} of those held out",
        f"  the longer reply is the better one in {100 * found.longer.value:.1f} %, and the more rewarded one in "
        f"{100 * found.prefers_longer:.1f} %; {lengths}",
        f"  loss {judged.loss_before:.3f} -> {judged.loss:.3f}; expected calibration error "
        f"{found.calibration_error:.3f}",
    ]


def _longer(fifth: Fifth) -> str:
    return f"{fifth.fewest:+d} to {fifth.most:+d} tokens longer"


def _encoded(
    config: PreparationConfig, model: str, site: TrainingSite, comparisons: Mapping[Split, Sequence[Comparison]] | None
) -> tuple[EncodedSplits, Texts]:
    """The comparisons in the model's tokens, and the texts of the held-out table, which are also saved.

    The user is told how many do not fit.
    """
    from actors.models.causal_lm import context_of

    task, context = load_task(config.task, config.data, config.model.path), context_of(model)
    if comparisons is None:
        tables = [encode_comparisons(task, split, model, context, site.cache) for split in SPLITS]
        heldout: Sequence[Comparison] = comparisons_of(task, "heldout")
    else:
        tables = [encode_pairs(comparisons[split], model, context, site.cache) for split in SPLITS]
        heldout = comparisons["heldout"]
    splits = EncodedSplits(*tables)
    if splits.excluded:
        site.progress.remark(
            f"{splits.excluded} of {splits.given} comparisons do not fit the model's context and are left out"
        )
    texts = [(kept.prompt, kept.replies) for kept in splits.heldout_of(heldout)]
    table = pa.table(
        {
            "prompt": [prompt for prompt, _ in texts],
            "replies": pa.array([list(replies) for _, replies in texts], pa.list_(pa.string())),
        }
    )
    Folder(site.run_dir).write_file(TEXTS, lambda draft: pq.write_table(table, draft, compression="zstd"))
    return splits, texts


@dataclass(frozen=True, slots=True)
class Judging:
    """Scores the held-out comparisons with the saved classifier, after checking it against the one in memory."""

    texts: Path

    def __call__(self, job: TrainingJob, state: TrainingState, say: Callable[[str], None]) -> dict[str, Any]:
        from actors.device import assigned_compute

        say("load the saved reward model")
        reward = ClassifierReward(str(job.best), device=assigned_compute(job.learner.gpus).device)
        check_rewards(job, state, reward)
        prompts, replies = (pq.read_table(self.texts)[name].to_pylist() for name in ("prompt", "replies"))
        rewards: list[list[float]] = []
        for start in range(0, len(prompts), _BATCH):
            say(f"judge, {start} of {len(prompts)}")
            batch = slice(start, start + _BATCH)
            asked = [prompt for prompt, own in zip(prompts[batch], replies[batch], strict=True) for _ in own]
            answers = iter(reward(asked, [reply for own in replies[batch] for reply in own], [{}] * len(asked)))
            rewards += [[next(answers) for _ in own] for own in replies[batch]]
        codec = TextCodec(reward.tokenizer)
        lengths = [[len(ids) for ids in codec.encode_replies(own)] for own in replies]
        return asdict(judge(rewards, lengths, scale=state.scale))
