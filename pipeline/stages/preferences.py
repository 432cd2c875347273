"""Comparisons made by a rule: the fine-tuned model answers each prompt several times, and a rule puts the answers in order.

For a task that brings no comparisons of people's. What comes of it is machine-made and says so wherever it is shown: a reward model trained
on it can at best learn the rule. One process samples and judges, since both are short.

    prompts --RolloutWorker--> k replies each --RewardWorker--> scores --> Comparison: the distinct ones, best first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.config import RewardConfig, RolloutConfig, SamplingConfig
from cluster.storage import Folder
from pipeline.config import RunConfig
from pipeline.prompts import Asked
from pipeline.roles import Stage
from pipeline.stages.examiner import AsLoaded
from pipeline.tasks.task import SPLITS, Comparison, PromptStream, Split

if TYPE_CHECKING:
    from ray import ObjectRef

_BEYOND = 1 << 39  # groups that no run ever reaches, and no evaluation uses
SCHEMA = pa.schema([("split", pa.string()), ("prompt", pa.string()), ("replies", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """prompts: that were answered. comparisons: that came of it; the others had no two replies that the rule tells apart. failed: replies without a score."""

    prompts: int
    comparisons: int
    failed: int


class Comparer:
    """Answers prompts and ranks the answers. Raises ValueError as `RolloutWorker` and `RewardWorker` do."""

    def __init__(self, *, path: str, rollout: RolloutConfig, sampling: SamplingConfig, reward: RewardConfig, seed: int) -> None:
        """path: of the model that answers. reward: a function."""
        from actors.reward import RewardWorker
        from actors.rollout import RolloutWorker

        self._worker = RolloutWorker(path=path, config=rollout, sampling=sampling, seed=seed)
        self._judge = RewardWorker(config=reward, tokenizer_path=path)

    def compare(self, prompts: pa.Table, split: str, samples: int, chunk: int, attempt: int) -> tuple[Made, pa.Table]:
        """`samples` replies to each of these Prompts, ranked; a row of SCHEMA for each prompt where at least two scores differ."""
        _, rollouts = self._worker.generate(prompts, samples, chunk, attempt, AsLoaded())
        report, scores = self._judge.score(rollouts, chunk, attempt)
        texts, replies = self._judge.texts(rollouts)
        rewards = scores["reward"].to_pylist()
        rows = []
        for first in range(0, len(replies), samples):
            ranked = rank(replies[first : first + samples], rewards[first : first + samples])
            if len(ranked) > 1:
                rows.append({"split": split, "prompt": texts[first], "replies": [reply for reply, _ in ranked], "scores": [score for _, score in ranked]})
        return Made(prompts=prompts.num_rows, comparisons=len(rows), failed=report.failed), pa.Table.from_pylist(rows, schema=SCHEMA)


def rank(replies: Sequence[str], scores: Sequence[float]) -> list[tuple[str, float]]:
    """(reply, score), best first: of equal scores only the first reply stays, since neither is better; nor does one without a score (NaN) or without words."""
    of_score: dict[float, str] = {}
    for reply, score in zip(replies, scores, strict=True):
        if score == score and reply.strip():
            of_score.setdefault(score, reply)
    return [(of_score[score], score) for score in sorted(of_score, reverse=True)]


def make_comparisons(config: RunConfig, stage: Stage, model: str, asked: Asked, rule: str, path: Path) -> Made:
    """Comparisons of the replies of `model` to every training and held-out prompt, written to `path` as Parquet. rule: import path of the function."""
    samples, per_chunk = config.reward_model.samples, max(config.rollout.chunk_size // config.reward_model.samples, 1)
    arguments = {"rollout": config.rollout, "sampling": config.sampling, "reward": RewardConfig(function=rule, timeout_s=config.reward.timeout_s)}
    pool = stage.pool("comparer", config.rollout.workers, config, Comparer, path=model, seed=config.seed, **arguments)
    sends = [
        _sending(asked_of.draw(range(start, min(start + per_chunk, end))).table, split, samples, number)
        for split, asked_of in zip(SPLITS, (asked.train, asked.heldout), strict=True)
        for first, end in [_pass(asked_of)]
        for number, start in enumerate(range(first, end, per_chunk))
    ]
    pool.start()
    try:
        done = stage.map(pool, "comparisons", sends)
        tables = stage.fetch([data[0] for _, data in done], "comparisons")
    finally:
        pool.close()
    made = pa.concat_tables(tables)
    Folder(path.parent).write_file(path.name, lambda draft: pq.write_table(made, draft))
    reports = [report for report, _ in done]
    return Made(**{name: sum(getattr(report, name) for report in reports) for name in ("prompts", "comparisons", "failed")})


def read_comparisons(path: Path) -> dict[Split, list[Comparison]]:
    """What `make_comparisons` wrote."""
    rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    return {split: [Comparison(prompt=row["prompt"], replies=tuple(row["replies"])) for row in rows if row["split"] == split] for split in SPLITS}


def _pass(prompts: PromptStream) -> tuple[int, int]:
    """Groups of one whole pass over the prompts, far beyond a run's own."""
    first = -(-_BEYOND // len(prompts)) * len(prompts)
    return first, first + len(prompts)


def _sending(prompts: pa.Table, split: str, samples: int, number: int) -> Any:
    def send(worker: Any, attempt: int) -> tuple[ObjectRef, ...]:
        return tuple(worker.compare.options(num_returns=2).remote(prompts, split, samples, number, attempt))

    return send
