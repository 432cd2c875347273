"""The examiner: one process that can do all that an evaluation asks of models, one model at a time.

consumes: chunks of prompts, of replies, of demonstrations    yields: Rollouts, TokenLogprobs, Scores    state: the model last used, to save loading it again

It is the workers of reinforcement learning, called one after the other, because a process costs more to start than an evaluation of a small model to
run, and because one device then holds one model. What a chunk yields depends on the chunk and the models alone, so any examiner may take any chunk.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

if TYPE_CHECKING:
    from actors.config import ReferenceConfig, RewardConfig, RolloutConfig, SamplingConfig
    from actors.weights import Weights

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AsLoaded:
    """A source for workers that keep the weights of the folder they were made from: its checksum is that of one that has fetched none."""

    version: int = 0
    checksum: str = ""

    def fetch(self) -> Weights:
        """Never called."""
        raise AssertionError("a worker with weights of its own asked for others")


class Examiner:
    """One worker of the examiners' pool. Each method returns (rows, table), and the table is in the order of its input."""

    def __init__(self, *, rollout: RolloutConfig, reference: ReferenceConfig, sampling: SamplingConfig, seed: int) -> None:
        """Loads nothing yet. rollout, reference: how models are run here; their numbers of workers say nothing."""
        self._rollout, self._reference, self._sampling, self._seed = rollout, reference, sampling, seed
        self._key: tuple[object, ...] = ()
        self._tool: object = None

    def reply(self, model: str, prompts: pa.Table, samples: int) -> tuple[int, pa.Table]:
        """`samples` Rollouts of every prompt by the causal LM in a folder or of that hub name.

        Raises ValueError when there is none, or naming the sample whose prompt is empty or fills the model's context; FloatingPointError when its logits
        are not finite.
        """
        from actors.rollout import RolloutWorker

        worker = self._hold(
            ("rollout", model), RolloutWorker, lambda: RolloutWorker(path=model, config=self._rollout, sampling=self._sampling, seed=self._seed)
        )
        table = worker.sample(prompts, samples, self._sampling, self._seed, AsLoaded())
        return table.num_rows, table

    def logprobs(self, model: str, rollouts: pa.Table, temperature: float) -> tuple[int, pa.Table]:
        """TokenLogprobs of Rollouts under the causal LM, at that temperature."""
        from actors.reference import ReferenceWorker

        worker = self._hold(
            ("reference", model, temperature), ReferenceWorker, lambda: ReferenceWorker(path=model, config=self._reference, temperature=temperature)
        )
        report, table = worker.logprobs(rollouts, 0, 0)
        return report.rows, table

    def score(self, judge: RewardConfig, tokenizer: str, rollouts: pa.Table) -> tuple[int, pa.Table]:
        """Scores of Rollouts by a reward function or a sequence classifier. tokenizer: folder of the one that the rollouts' tokens are of."""
        from actors.reward import RewardWorker

        worker = self._hold(("reward", judge, tokenizer), RewardWorker, lambda: RewardWorker(config=judge, tokenizer_path=tokenizer))
        report, table = worker.score(rollouts, 0, 0)
        return report.samples, table

    def _hold(self, key: tuple[object, ...], kind: type[T], make: Callable[[], T]) -> T:
        """The worker of this key: the one at hand, or a new one in its place, the old one's memory given back first."""
        if key != self._key:
            self._key, self._tool = (), None
            gc.collect()  # transformers' models refer to themselves
            self._key, self._tool = key, make()
        assert isinstance(self._tool, kind)
        return self._tool
