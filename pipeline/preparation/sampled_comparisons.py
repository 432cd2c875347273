"""Comparisons made by a rule: the fine-tuned model answers each prompt several times, and a rule ranks the answers.

They are for a task without comparisons by people. Wherever they are shown, they are marked as machine-made: a reward
model that is trained on them can at best learn the rule. One process samples and scores, since both take little time.

    prompts --RolloutWorker--> k replies each --RewardWorker--> scores --> Comparison: the distinct ones, best first
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.config import RewardConfig, RolloutConfig, SamplingConfig
from cluster.runtime import Runtime
from cluster.storage import Folder
from pipeline.encoding.prompt_stream import PromptStream
from pipeline.encoding.prompts import RunPrompts
from pipeline.evaluation.examiner import LoadedWeights
from pipeline.tasks.task import SPLITS, Comparison, Split

if TYPE_CHECKING:
    from ray import ObjectRef

    from cluster.runtime import DivisibleSend

_SHARE = 0.5  # of a call's deadline is for scoring; the rest is for sampling
_BEYOND = 1 << 39  # groups from this number on are reached by no run, and used by no evaluation
SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("prompt", pa.string()),
        ("replies", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonCounts:
    """How many prompts were answered, and how many comparisons they gave.

    A prompt gives no comparison when the rule scores all its replies alike. failed: number of replies without a score.
    """

    prompts: int
    comparisons: int
    failed: int


class Comparer:
    """Answers prompts and ranks the answers; raises ValueError as `RolloutWorker` and `RewardWorker` do."""

    def __init__(
        self, *, path: str, rollout: RolloutConfig, sampling: SamplingConfig, reward: RewardConfig, seed: int
    ) -> None:
        """path: folder or hub name of the model that answers. reward: must name a function."""
        from actors.reward.worker import RewardWorker
        from actors.rollout.worker import RolloutWorker

        self._worker = RolloutWorker(path=path, config=rollout, sampling=sampling, seed=seed)
        self._judge = RewardWorker(config=reward, tokenizer_path=path)

    def compare(
        self,
        prompts: pa.Table,
        split: str,
        samples: int,
        chunk: int,
        attempt: int,
        without: Collection[int] = (),
        within_s: float = math.inf,
    ) -> tuple[ComparisonCounts, pa.Table]:
        """Sample `samples` replies to each prompt of this Prompts table, and rank them by their scores.

        Returns the counts and a table of SCHEMA, with a row for each prompt where at least two scores differ.

        without: groups to leave out; their replies count as failed. within_s: as in `RewardWorker.score`.
        """
        left_out = [group * samples + k for group in without for k in range(samples)]
        _, rollouts = self._worker.generate(prompts, samples, chunk, attempt, LoadedWeights(), left_out)
        report, scores = self._judge.score(rollouts, chunk, attempt, within_s=within_s)
        texts, replies = self._judge.texts(rollouts)
        rewards = scores["reward"].to_pylist()
        rows = []
        for first in range(0, len(replies), samples):
            ranked = rank(replies[first : first + samples], rewards[first : first + samples])
            if len(ranked) > 1:
                rows.append(
                    {
                        "split": split,
                        "prompt": texts[first],
                        "replies": [reply for reply, _ in ranked],
                        "scores": [score for _, score in ranked],
                    }
                )
        return ComparisonCounts(
            prompts=prompts.num_rows - len(without), comparisons=len(rows), failed=report.failed + len(left_out)
        ), pa.Table.from_pylist(rows, schema=SCHEMA)


def rank(replies: Sequence[str], scores: Sequence[float]) -> list[tuple[str, float]]:
    """The (reply, score) pairs of distinct scores, best first.

    Of replies with equal scores only the first stays, since neither is better. Replies without a score (NaN) and blank
    ones are dropped.
    """
    of_score: dict[float, str] = {}
    for reply, score in zip(replies, scores, strict=True):
        if score == score and reply.strip():
            of_score.setdefault(score, reply)
    return [(of_score[score], score) for score in sorted(of_score, reverse=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonSettings:
    """How comparisons are made.

    reward: must name a function, which is the rule. samples: replies to each prompt. seed: the run's.
    """

    rollout: RolloutConfig
    sampling: SamplingConfig
    reward: RewardConfig
    samples: int
    seed: int


def make_comparisons(
    settings: ComparisonSettings,
    runtime: Runtime,
    model: str,
    asked: RunPrompts,
    path: Path,
    say: Callable[[str], None],
) -> ComparisonCounts:
    """Compare the replies of `model` to every training and held-out prompt, and write the comparisons as Parquet.

    path: the file to write. say: is told of each prompt whose replies kill or hang a worker. Raises ValueError when a
    split has no comparison.
    """
    pool = runtime.pool(
        "comparer",
        settings.rollout.workers,
        Comparer,
        reads=[model],
        path=model,
        rollout=settings.rollout,
        sampling=settings.sampling,
        reward=settings.reward,
        seed=settings.seed,
    )
    calls = _calls(settings, asked, _SHARE * runtime.timeout_s)
    pool.start()
    try:
        done = runtime.map_divisible(pool, "comparisons", calls, say)
        tables = runtime.fetch([data[0] for _, data, _ in done], "comparisons")
    finally:
        pool.close()
    made = pa.concat_tables(tables)
    for split in SPLITS:
        if split not in made["split"].to_pylist():
            raise ValueError(
                f"reward_model.samples: must let {settings.reward.function} tell replies to a {split} prompt apart, "
                f"got {settings.samples} and no prompt with two replies of different scores; raise it, fine-tune for "
                "longer, or name another reward"
            )
    Folder(path.parent).write_file(path.name, lambda draft: pq.write_table(made, draft))
    reports = [report for report, _, _ in done]
    return ComparisonCounts(
        **{name: sum(getattr(report, name) for report in reports) for name in ("prompts", "comparisons", "failed")}
    )


def read_comparisons(path: Path) -> dict[Split, list[Comparison]]:
    """Read the comparisons that `make_comparisons` wrote, by split."""
    rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    return {
        split: [
            Comparison(prompt=row["prompt"], replies=tuple(row["replies"])) for row in rows if row["split"] == split
        ]
        for split in SPLITS
    }


def _calls(settings: ComparisonSettings, asked: RunPrompts, within_s: float) -> Sequence[tuple[range, DivisibleSend]]:
    """(groups, call) of every chunk of both splits. within_s: as in `RewardWorker.score`."""
    per_chunk = max(settings.rollout.chunk_size // settings.samples, 1)
    calls: list[tuple[range, DivisibleSend]] = []
    for split, prompts in zip(SPLITS, (asked.train, asked.heldout), strict=True):
        first, end = _pass(prompts)
        for number, start in enumerate(range(first, end, per_chunk)):
            groups = range(start, min(start + per_chunk, end))
            table = prompts.draw(groups).table
            calls.append((groups, partial(_compare, table, split, settings.samples, number, within_s)))
    return calls


def _compare(
    table: pa.Table,
    split: str,
    samples: int,
    number: int,
    within_s: float,
    worker: Any,
    attempt: int,
    without: frozenset[int],
) -> tuple[ObjectRef, ...]:
    compare = worker.compare.options(num_returns=2)
    return tuple(compare.remote(table, split, samples, number, attempt, without, within_s))


def _pass(prompts: PromptStream) -> tuple[int, int]:
    """(first, end) group of one whole pass over the prompts, far beyond the groups of any run."""
    first = -(-_BEYOND // len(prompts)) * len(prompts)
    return first, first + len(prompts)
