"""The learner: one rank of the gang that trains a model.

Consumes: tables to infer from, which give log-probs, values or rewards; and tables to learn from, which give weight
updates. Publishes: whole weights. The `Trainee` (`trainees/`) knows what is trained and which tables it takes; nothing
here depends on it. Every rank gets the whole table, and every public method is called on all ranks together. The ranks
divide the rows among themselves.

The loss of a minibatch is the sum of the losses of its rows, each divided by a normaliser that is known from the table.
So the gradient is the same for every number of ranks, micro-batch size, ZeRO stage, padding and packing.

Left out: dropout (off in RLHF: Huang et al. 2023, detail 2) and gradient checkpointing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.config import Dtype, LearnerConfig, settled
from actors.device import assigned_compute
from actors.learner.deepspeed_engine import DeepSpeedEngine, StepReport
from actors.learner.micro_batches import Batch, MicroBatch, Rows, in_row_order, minibatches, share_out
from actors.learner.reports import InferReport as InferReport  # the reports are part of this file's interface
from actors.learner.reports import JudgeReport as JudgeReport
from actors.learner.reports import LearnerReady as LearnerReady
from actors.learner.reports import RestoreReport as RestoreReport
from actors.learner.reports import ShardReport as ShardReport
from actors.learner.reports import UpdatePlan as UpdatePlan
from actors.learner.reports import VersionReport as VersionReport
from actors.learner.schedule import learning_rate
from actors.learner.shards import open_shards, write_shard
from actors.learner.tally import Tally
from actors.learner.tally import UpdateReport as UpdateReport
from actors.learner.trainees.base import Passes, Trainee
from actors.models.causal_lm import Entropy
from actors.weights import Manifest, Weights, WeightsSource, pack, parameters_checksum
from actors.weights_file import read_weights, write_weights
from cluster.storage import Folder, StoredFile, files_in


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a learner trains, from which model and how; it is the same for all ranks.

    path: folder or hub name of the model to start from. total_updates: updates of the whole run, for the learning
    rate's schedule. seed: of the random initialisation of new weights.
    """

    trainee: Trainee[Any]
    path: str
    config: LearnerConfig
    total_updates: int
    seed: int


class Learner:
    """One rank of a learner; call `connect` first, then the other methods in any order, the same on all ranks."""

    def __init__(self, *, spec: LearnerSpec, rank: int, ranks: int, timeout_s: float) -> None:
        """timeout_s: deadline of every collective, in seconds."""
        self.trainee = spec.trainee
        self.config = spec.config
        self.rank = rank
        self.ranks = ranks
        self._spec = spec
        self._timeout_s = timeout_s

    @property
    def role(self) -> str:
        """The trainee's name in messages and shards."""
        return self.trainee.role

    def connect(self, address: str | None = None, port: int = 0) -> LearnerReady:
        """Load the model and join the other ranks at address:port, where rank 0 listens.

        Without an address, the process group that this process already has is used.
        """
        torch.manual_seed(self._spec.seed)
        compute = assigned_compute(self.config.gpus)
        self._model, self._context = self.trainee.load(self._spec.path, self.config, self._spec.seed)
        checksum = parameters_checksum(self._model)
        self._model.to(compute.device)
        self._scale = self.trainee.scale(compute.device)
        if self._scale is not None:  # while the model is whole on every rank
            alone = Passes(self._model, lambda batch: self._share(batch, ranks=1), lambda sums: sums)
            self._scale.apply(self._model, alone)
        parameters = list(self._model.parameters())
        ready = LearnerReady(
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            device=str(compute.device),
            dtype=settled(self.config.dtype),
            context=self._context,
            checksum=checksum,
        )
        self._engine = DeepSpeedEngine(
            self._model,
            self.config,
            rank=self.rank,
            ranks=self.ranks,
            address=address,
            port=port,
            timeout_s=self._timeout_s,
        )
        self._model.eval()  # for good: training without dropout
        self._device = compute.device
        return ready

    def infer(self, *tables: pa.Table) -> tuple[InferReport, pa.Table]:
        """Log-probs (policy), values (critic) or rewards for this rank's share of the rows of all these tables."""
        started = time.perf_counter()
        batch = self.trainee.inferring(tables, self._device)
        micro = self._share(batch)
        parts = []
        with torch.no_grad():
            for share in micro:
                values = self._forward(batch, batch.filled(share), "none")[0]
                if len(share.rows):
                    parts.append(batch.aligned(share.rows, values))
        own, column = in_row_order([share.rows for share in micro if len(share.rows)], parts)
        total = torch.tensor(
            [sum(float(v.sum(dtype=np.float64)) for v, _ in parts)], dtype=torch.float64, device=self._device
        )
        tokens = int(batch.target_offsets[-1])
        mean = float(self._engine.gather(total).sum()) / max(tokens, 1)
        report = InferReport(rows=len(batch), action_tokens=tokens, mean=mean, seconds=time.perf_counter() - started)
        return report, self.trainee.inferred(batch.sample_ids[own], column)

    def judge(self, table: pa.Table) -> JudgeReport:
        """The objective's loss and statistics on a table, without learning from it."""
        started = time.perf_counter()
        batch = self.trainee.learning(table, self._device)
        tally = Tally(self._device, self.trainee.count(batch, np.arange(len(batch))))
        with torch.no_grad():
            for share in self._share(batch):
                filled = batch.filled(share)
                terms = self.trainee.loss(self._forward(batch, filled, "value"), batch, filled.rows)
                tally.add(len(share.rows), terms.each.sum(dtype=torch.float64), terms.statistics)
        found = tally.totals(self._engine)
        return JudgeReport(
            rows=len(batch),
            loss=found.loss / max(tally.losses, 1),
            statistics=found.statistics,
            seconds=time.perf_counter() - started,
        )

    def update(self, table: pa.Table, plan: UpdatePlan) -> UpdateReport:
        """Train on a step's table: epochs * minibatches optimiser steps, or the ones among them that the plan picks."""
        started = time.perf_counter()
        batch = self.trainee.learning(table, self._device, plan.kl_coef)
        epochs = minibatches(
            len(batch), epochs=plan.epochs, minibatches=plan.minibatches, seed=plan.seed, step=plan.step
        )
        picked = list(enumerate(rows for epoch in epochs for rows in epoch))[
            plan.first : None if plan.count is None else plan.first + plan.count
        ]
        tally = Tally(self._device, sum(self.trainee.count(batch, rows) for _, rows in picked))
        steps: list[StepReport] = []
        rate = 0.0
        for i, rows in picked:
            rate = learning_rate(
                plan.step * plan.epochs * plan.minibatches + i,
                plan.total or self._spec.total_updates,
                peak=self.config.learning_rate,
                schedule=self.config.schedule,
                warmup_fraction=self.config.warmup_fraction,
            )
            self._accumulate(batch, rows, plan, tally, untrained=i == 0)
            steps.append(self._engine.step(rate))
        return tally.report(self._engine, steps, rate, epochs=plan.epochs, seconds=time.perf_counter() - started)

    def publish(self, version: int, dtype: Dtype) -> tuple[Manifest | None, Weights | None]:
        """The model's weights in `dtype`, on rank 0; (None, None) on the others."""
        with self._engine.full_parameters():
            if self.rank != 0:
                return None, None
            weights = pack(self.trainee.published(self._model), dtype, version)
        return weights.manifest, weights

    def keep_version(self, folder: str, source: WeightsSource) -> StoredFile | None:
        """Write a version that was published earlier into the folder, on rank 0; the others do nothing."""
        return write_weights(Folder(folder), source.fetch(), source.manager) if self.rank == 0 else None

    def read_version(self, folder: str, name: str, version: int) -> tuple[VersionReport | None, Weights | None]:
        """A version that `keep_version` wrote, to be published again, on rank 0; (None, None) on the others."""
        if self.rank != 0:
            return None, None
        weights, head = read_weights(Folder(folder), name, version)
        return VersionReport(version=version, checksum=weights.checksum, manager=head), weights

    def export(self, folder: str, checked: bool = False) -> float:
        """Write the model and its tokenizer on rank 0, as `from_pretrained` reads them; the other ranks only take part.

        checked: read the folder again and compare it with the model in memory, if the trainee has such a check. Returns
        the learner's rewards divided by the exported model's: the std that was scaled to 1, or 1 without a scale.
        """
        moments = None
        if self._scale is not None:  # the model is sharded, so measured by all ranks together
            together = Passes(self._engine.forward, self._share, lambda sums: self._engine.gather(sums).sum(0))
            moments = self._scale.moments(together)
        with self._engine.full_parameters():
            if self.rank == 0:
                self.trainee.save(self._model, Path(folder), self._spec.path, moments)
                if checked:
                    self.trainee.check(self._model, Path(folder), self._spec.path)
        return 1.0 if moments is None else moments.std

    def written(self, folder: str) -> tuple[StoredFile, ...]:
        """The files in a folder as this process sees them; the driver compares them with what it sees."""
        return files_in(Path(folder))

    def save(self, folder: str) -> ShardReport:
        """Write this rank's share of the training state into the folder: weights, moments and counters, in float32."""
        started = time.perf_counter()
        file = write_shard(
            Folder(folder), self._engine.own_fragments(), role=self.role, rank=self.rank, ranks=self.ranks
        )
        return ShardReport(file=file, seconds=time.perf_counter() - started)

    def await_peers(self) -> None:
        """Wait until all ranks are here, however long one of them writes or reads; see the engine."""
        self._engine.await_peers()

    def restore(self, folder: str, files: Sequence[str]) -> RestoreReport:
        """Load the training state in these files of one commit, written by any number of ranks at any ZeRO stage.

        It undoes all updates since `connect`. Raises ValueError, and changes nothing, when the files are not the whole
        state of this role and model.
        """
        started = time.perf_counter()
        sizes = self._engine.sizes
        with open_shards(Folder(folder), files) as shards:
            shards.check(self.role, sizes)
            self._engine.drop_gradients()
            shards.fill(self._engine.fragments())
            shards.fill_working(self._engine.working())
            return RestoreReport(
                steps=max(map(shards.step, sizes)), ranks=shards.ranks, seconds=time.perf_counter() - started
            )

    def _share(self, batch: Batch, rows: Rows | None = None, *, ranks: int = 0) -> list[MicroBatch]:
        """This rank's micro-batches of these rows, or of all rows.

        ranks: 0 shares the rows among all ranks; 1 gives all rows to this rank.
        """
        chosen = np.arange(len(batch)) if rows is None else rows
        size, capacity = self.config.micro_batch_size, min(self.config.pack_tokens, self._context)
        shares = share_out(
            chosen, batch.lengths, ranks=ranks or self.ranks, micro_batch_size=size, pack_tokens=capacity
        )
        return shares[self.rank if ranks == 0 else 0]

    def _forward(self, batch: Batch, micro: MicroBatch, entropy: Entropy) -> tuple[Tensor, ...]:
        return self.trainee.forward(self._engine.forward, batch.inputs(*micro), entropy)

    def _accumulate(self, batch: Batch, minibatch: Rows, plan: UpdatePlan, tally: Tally, *, untrained: bool) -> None:
        """Forward and backward over this rank's share of a minibatch. untrained: before any update; the ratio is 1."""
        entropy: Entropy = "gradient" if plan.entropy_gradient else "value"
        normaliser = self.trainee.normaliser(batch, minibatch, plan)
        micro = self._share(batch, minibatch)
        for i, share in enumerate(micro):
            filled = batch.filled(share, minibatch)
            real = len(share.rows)
            outputs = self._forward(batch, filled, entropy)
            terms = self.trainee.loss(outputs, batch, filled.rows)
            loss = normaliser.share(terms) if real else _nothing(*outputs)
            self._engine.backward(loss, last=i == len(micro) - 1)
            tally.add(real, loss, terms.statistics)
            if untrained and real and terms.logprobs is not None:
                tally.compare(terms.logprobs)


def _nothing(*outputs: Tensor) -> Tensor:
    """A loss of 0 for a filler row, with a gradient of 0 for all its outputs.

    The row's own loss times 0 would be NaN if the loss or its slope is not finite. The update would then be dropped,
    but only with those numbers of ranks that need a filler. All outputs take part, because at ZeRO-3 every rank must
    run the backward pass through the same modules.
    """
    return torch.stack(
        [output.where(torch.zeros_like(output, dtype=torch.bool), output.new_zeros(())).sum() for output in outputs]
    ).sum()
