"""The frozen reference policy: log-probs of rollouts under the starting model.

consumes: chunks of Rollouts    yields: TokenLogprobs
state: none besides the weights, so any worker may take any chunk
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from actors.config import ReferenceConfig
from actors.device import assigned_compute, torch_dtype
from actors.experience import Rollouts, TokenLogprobs
from actors.learner.micro_batches import Batch, deal, in_row_order
from actors.models.causal_lm import PolicyModel, load_causal_lm


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceReport:
    """The driver's view of a chunk.

    chunk, attempt: as given, to tell a late answer from the expected one. mean: log-prob of an action token.
    """

    chunk: int
    attempt: int
    rows: int
    action_tokens: int
    mean: float
    seconds: float


class ReferenceWorker:
    """One worker of the reference pool."""

    def __init__(self, *, path: str, config: ReferenceConfig, temperature: float) -> None:
        self._config = config
        self._device = assigned_compute(config.gpus).device
        self._model = PolicyModel(load_causal_lm(path, torch_dtype(config.dtype)), temperature).to(self._device)

    def logprobs(
        self, rollouts: pa.Table, chunk: int, attempt: int, without: Collection[int] = ()
    ) -> tuple[ReferenceReport, pa.Table]:
        """TokenLogprobs of a Rollouts table, in its order: aligned with tokens, zero where `action_mask` is false.

        without: ids of samples that are left out; they have no row.
        """
        started = time.perf_counter()
        batch = Batch(Rollouts(rollouts).without(without).table, self._device)
        [micro] = deal(np.arange(len(batch)), batch.lengths, ranks=1, micro_batch_size=self._config.batch_size)
        with torch.inference_mode():
            parts = [batch.aligned(rows, self._model(batch.inputs(rows))[0]) for rows in micro]
        rows, logprobs = in_row_order(micro, parts)
        tokens = int(batch.target_offsets[-1])
        total = float(sum(values.sum(dtype=np.float64) for values, _ in parts))
        report = ReferenceReport(
            chunk=chunk,
            attempt=attempt,
            rows=len(batch),
            action_tokens=tokens,
            mean=total / max(tokens, 1),
            seconds=time.perf_counter() - started,
        )
        return report, TokenLogprobs.of({"sample_id": batch.sample_ids[rows], "logprobs": logprobs}).table
