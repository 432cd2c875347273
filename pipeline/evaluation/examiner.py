"""The examiner: one process that generates, computes log-probs and scores for an evaluation, one model at a time.

consumes: chunks of prompts, of replies, of demonstrations    yields: Rollouts, TokenLogprobs, Scores
state: the last model used, so that it need not be loaded again

An examiner calls the worker classes of reinforcement learning in one process. For a small model, starting a process
takes longer than its evaluation; and this way, a device holds one model at a time. The result of a chunk depends on the
chunk and the models alone, so any examiner may take any chunk.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.config import ManagerConfig
from actors.experience import Prompts
from actors.manager.option_head import load_head

if TYPE_CHECKING:
    from actors.config import EnvironmentConfig, ReferenceConfig, RewardConfig, RolloutConfig, SamplingConfig
    from actors.rollout.conversations import Environment
    from actors.weights import Weights

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """The source of weights for a worker that keeps the weights of its model folder.

    Version and checksum are those of a worker that has never fetched weights, so the worker fetches none.
    """

    version: int = 0
    checksum: str = ""
    manager: Mapping[str, npt.NDArray[np.float32]] | None = None

    def fetch(self) -> Weights:
        """Raises AssertionError: a worker that keeps its own weights never fetches others."""
        raise AssertionError("a worker with weights of its own asked for others")


class Examiner:
    """One worker of the examiners' pool.

    Each method returns (number of rows, table). The table is in the order of the input; what `without` names is left
    out.
    """

    def __init__(
        self,
        *,
        rollout: RolloutConfig,
        reference: ReferenceConfig,
        sampling: SamplingConfig,
        seed: int,
        talk: EnvironmentConfig | None = None,
        environment: Callable[[], Environment] | None = None,
        manager: ManagerConfig | None = None,
    ) -> None:
        """Load no model yet. rollout, reference: how models are run; their numbers of workers are ignored.

        environment: makes the other side, if a reply is a conversation; talk: its limits. manager: its options, if one
        chooses before each reply; its head lies beside the policy's weights, and a model that was not trained with one
        has options chosen at random.
        """
        self._rollout, self._reference, self._sampling, self._seed = rollout, reference, sampling, seed
        self._talk, self._environment, self._manager = talk, environment, manager or ManagerConfig()
        self._key: tuple[object, ...] = ()
        self._tool: object = None

    def reply(self, model: str, prompts: pa.Table, samples: int, without: Collection[int] = ()) -> tuple[int, pa.Table]:
        """Sample `samples` replies to every prompt; the table is Rollouts.

        model: folder or hub name of a causal LM. without: group ids of prompts to leave out; the replies to the other
        prompts do not depend on it.

        Raises ValueError when there is no such model, or when a prompt is empty or fills the model's context (the error
        names the sample); FloatingPointError when the model's logits are not finite.
        """
        from actors.rollout.worker import RolloutWorker

        worker = self._hold(
            ("rollout", model),
            RolloutWorker,
            lambda: RolloutWorker(
                path=model,
                config=self._rollout,
                sampling=self._sampling,
                seed=self._seed,
                talk=self._talk,
                environment=self._environment,
                manager=self._manager,
            ),
        )
        asked = Prompts(prompts).without(without, "group_id").table
        table = worker.sample(asked, samples, self._sampling, self._seed, self._weights(model))
        return table.num_rows, table

    def _weights(self, model: str) -> LoadedWeights:
        from actors.models.causal_lm import width_of

        options = len(self._manager.options)
        return LoadedWeights(manager=load_head(model, options, width_of(model)) if options else None)

    def logprobs(
        self, model: str, rollouts: pa.Table, temperature: float, without: Collection[int] = ()
    ) -> tuple[int, pa.Table]:
        """Compute the log-probs of Rollouts under a causal LM, at that temperature; the table is TokenLogprobs.

        model: folder or hub name. without: sample ids to leave out.
        """
        from actors.reference import ReferenceWorker

        worker = self._hold(
            ("reference", model, temperature),
            ReferenceWorker,
            lambda: ReferenceWorker(path=model, config=self._reference, temperature=temperature),
        )
        report, table = worker.logprobs(rollouts, 0, 0, without)
        return report.rows, table

    def score(
        self,
        judge: RewardConfig,
        tokenizer: str,
        rollouts: pa.Table,
        without: Collection[int] = (),
        within_s: float = math.inf,
    ) -> tuple[int, pa.Table]:
        """Score Rollouts by a reward function or a sequence classifier; the table is Scores.

        tokenizer: folder or hub name of the tokenizer that made the rollouts' tokens. without, within_s: as in
        `RewardWorker.score`; there, a sample that is left out has a row, but no reward.
        """
        from actors.reward.worker import RewardWorker

        worker = self._hold(
            ("reward", judge, tokenizer),
            RewardWorker,
            lambda: RewardWorker(config=judge, tokenizer_path=tokenizer, conversations=self._environment is not None),
        )
        report, table = worker.score(rollouts, 0, 0, without, within_s)
        return report.samples, table

    def _hold(self, key: tuple[object, ...], kind: type[T], make: Callable[[], T]) -> T:
        """The worker of this key: the current one, or a new one, made after the memory of the old one is freed."""
        if key != self._key:
            self._key, self._tool = (), None
            gc.collect()  # models of transformers contain reference cycles
            self._key, self._tool = key, make()
        assert isinstance(self._tool, kind)
        return self._tool
