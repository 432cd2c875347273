"""The learner: one rank of the gang that trains the policy, the critic or a reward model.

consumes: Rollouts -> log-probs or values; Experience or Comparisons -> weight updates; publishes whole weights.
Every rank is given the whole table and every public method is called on all ranks together; the ranks divide the rows among themselves.

The loss of a minibatch is a sum over its action tokens, each weighted by 1 / (action tokens of the whole minibatch) (`token_mean`),
1 / (rows * action tokens of its own row) (`sequence_mean`) or 1 / (rows * a constant) (`constant`); or over its comparisons, each weighted by
1 / (comparisons of the whole minibatch). All are known from the table, so the gradient is the same for every number of ranks,
micro-batch size, ZeRO stage, padding and packing.

What was left out: dropout (off in RLHF: Huang et al. 2023, detail 2) and gradient checkpointing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from actors.config import Dtype, LearnerConfig
from actors.deepspeed_engine import DeepSpeedEngine, StepReport
from actors.device import assigned_compute
from actors.experience import Comparisons, Experience
from actors.micro_batches import Batch, Rows, Share, in_row_order, minibatches, share_out
from actors.model import Entropy, TokenInputs
from actors.objective import ActionTokens, Compared, PolicyObjective, RewardObjective, ValueObjective
from actors.reports import InferReport as InferReport  # the reports are part of this file's interface
from actors.reports import JudgeReport as JudgeReport
from actors.reports import LearnerReady as LearnerReady
from actors.reports import RestoreReport as RestoreReport
from actors.reports import ShardReport as ShardReport
from actors.reports import UpdatePlan as UpdatePlan
from actors.reward_model import RewardModel
from actors.schedule import learning_rate
from actors.shards import open_shards, write_shard
from actors.tally import Tally
from actors.tally import UpdateReport as UpdateReport
from actors.trainee import Role, inferred, make_trainee, published, save_trainee, sequences_of
from actors.weights import Manifest, Weights, fingerprint, pack
from actors.yardstick import Yardstick
from cluster.storage import Folder


class Learner:
    """One rank. `connect` comes first; then the other methods in any order, on all ranks alike."""

    def __init__(
        self,
        *,
        role: Role,
        rank: int,
        ranks: int,
        path: str,
        config: LearnerConfig,
        temperature: float,
        objective: PolicyObjective | ValueObjective | RewardObjective,
        total_updates: int,
        seed: int,
        timeout_s: float,
        reference: str = "",
    ) -> None:
        """path: of the model to start from, see `trainee.py`. temperature: of the rollouts. total_updates: of the run, for the learning rate.

        seed: of whatever randomness a model's initialisation may have, the same on all ranks. timeout_s: of every collective.
        reference: Parquet file of Comparisons on whose texts a reward model is brought to mean 0 and std 1 by `connect` and `export`; "": it is not.
        """
        self.role = role
        self.rank = rank
        self.ranks = ranks
        self.config = config
        self._path = path
        self._temperature = temperature
        self._objective = objective
        self._total_updates = total_updates
        self._seed = seed
        self._timeout_s = timeout_s
        self._reference = reference
        assert role == "reward" or not reference, "only a reward model has a scale to set"

    def connect(self, address: str | None = None, port: int = 0) -> LearnerReady:
        """Load the model and join the other ranks at address:port, where rank 0 listens; without an address, those this process has already met."""
        torch.manual_seed(self._seed)
        compute = assigned_compute(self.config.gpus)
        self._model, self._context = make_trainee(self.role, self._path, self.config, temperature=self._temperature, seed=self._seed)
        checksum = fingerprint(self._model)
        self._model.to(compute.device)
        self._yardstick = Yardstick(self._reference, compute.device) if self._reference else None
        if self._yardstick is not None and isinstance(self._model, RewardModel):  # while it is whole on every rank
            self._model.standardise(*self._yardstick.moments(self._yardstick.sums(self._model, self._share(self._yardstick.batch, ranks=1))))
        parameters = list(self._model.parameters())
        ready = LearnerReady(
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            device=str(compute.device),
            dtype=self.config.dtype,
            context=self._context,
            checksum=checksum,
        )
        self._engine = DeepSpeedEngine(self._model, self.config, rank=self.rank, ranks=self.ranks, address=address, port=port, timeout_s=self._timeout_s)
        self._model.eval()  # for good: training without dropout
        self._device = compute.device
        return ready

    def infer(self, *tables: pa.Table) -> tuple[InferReport, pa.Table]:
        """TokenLogprobs (policy) or TokenValues (critic; of Comparisons, reward) of this rank's share of the given Rollouts tables, taken as one."""
        started = time.perf_counter()
        batch = sequences_of(self.role, tables, self._device)
        micro = self._share(batch)
        parts = []
        with torch.no_grad():
            for share in micro:
                values = self._forward(batch.inputs(*batch.filled(share)), "none")[0]
                if len(share.rows):
                    parts.append(batch.aligned(share.rows, values))
        own, column = in_row_order([share.rows for share in micro if len(share.rows)], parts)
        total = torch.tensor([sum(float(v.sum(dtype=np.float64)) for v, _ in parts)], dtype=torch.float64, device=self._device)
        tokens = int(batch.action_offsets[-1])
        mean = float(self._engine.gather(total).sum()) / max(tokens, 1)
        report = InferReport(rows=len(batch), action_tokens=tokens, mean=mean, seconds=time.perf_counter() - started)
        return report, inferred(self.role, batch.sample_ids[own], column)

    def judge(self, comparisons: pa.Table) -> JudgeReport:
        """What a reward model's objective says of Comparisons that it is not to learn from."""
        started = time.perf_counter()
        batch = Batch(Comparisons(comparisons).table, self._device)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for share in self._share(batch):
                rows, line = batch.filled(share)
                loss, statistics = self._loss(*self._forward(batch.inputs(rows, line), "none"), batch.compared(rows))
                if len(share.rows):
                    sums += torch.stack([loss.sum(dtype=torch.float64), statistics["accuracy"].sum(dtype=torch.float64)])
        loss_sum, right = self._engine.gather(sums).sum(0).tolist()
        whole = max(len(batch), 1)
        return JudgeReport(rows=len(batch), loss=loss_sum / whole, accuracy=right / whole, seconds=time.perf_counter() - started)

    def update(self, table: pa.Table, plan: UpdatePlan) -> UpdateReport:
        """Train on a step's Experience (reward: Comparisons): epochs * minibatches optimiser steps, each on a minibatch of the whole step; or on those
        that the plan picks."""
        started = time.perf_counter()
        kind = Comparisons if self.role == "reward" else Experience
        batch = Batch(kind(table).table, self._device, plan.kl_coef)
        epochs = minibatches(len(batch), epochs=plan.epochs, minibatches=plan.minibatches, seed=plan.seed, step=plan.step)
        picked = list(enumerate(rows for epoch in epochs for rows in epoch))[plan.first : None if plan.count is None else plan.first + plan.count]
        counted = sum(len(rows) if self.role == "reward" else int(batch.action_counts(rows).sum()) for _, rows in picked)
        tally = Tally(self._device, epochs=plan.epochs, tokens=counted)
        steps: list[StepReport] = []
        rate = 0.0
        for i, rows in picked:
            rate = learning_rate(
                plan.step * plan.epochs * plan.minibatches + i,
                self._total_updates,
                peak=self.config.learning_rate,
                schedule=self.config.schedule,
                warmup_fraction=self.config.warmup_fraction,
            )
            self._accumulate(batch, rows, plan, tally, untrained=i == 0)
            steps.append(self._engine.step(rate))
        return tally.report(self._engine, steps, rate, seconds=time.perf_counter() - started)

    def publish(self, version: int, dtype: Dtype) -> tuple[Manifest | None, Weights | None]:
        """The model's weights in `dtype`, on rank 0; (None, None) on the others."""
        with self._engine.full_parameters():
            if self.rank != 0:
                return None, None
            weights = pack(published(self._model).named_parameters(), dtype, version)
        return weights.manifest, weights

    def export(self, folder: str) -> float:
        """Rank 0 writes the policy, or the reward model, and its tokenizer as `from_pretrained` reads them; the other ranks only take part.

        Returns how much of the learner's own reward one of the exported model's is: the std that was brought to 1, else 1.
        """
        standard = None
        if self._yardstick is not None:  # sharded, so measured by all ranks together
            own = self._yardstick.sums(self._engine.forward, self._share(self._yardstick.batch))
            standard = self._yardstick.moments(self._engine.gather(own).sum(0))
        with self._engine.full_parameters():
            if self.rank == 0:
                save_trainee(self._model, self._path, Path(folder), standard)
        return 1.0 if standard is None else standard[1]

    def save(self, folder: str) -> ShardReport:
        """Write this rank's share of the training state into the folder: weights, moments and counters of what is trained, in float32."""
        started = time.perf_counter()
        file = write_shard(Folder(folder), self._engine.own_fragments(), role=self.role, rank=self.rank, ranks=self.ranks)
        return ShardReport(file=file, seconds=time.perf_counter() - started)

    def restore(self, folder: str, files: Sequence[str]) -> RestoreReport:
        """Be as the learner was that saved these files, all of one commit, with whatever number of ranks and at whatever ZeRO stage.

        Whatever this one has done since `connect` is forgotten. Raises ValueError, having changed nothing, when the files are not
        the whole state of this role and model.
        """
        started = time.perf_counter()
        sizes = self._engine.sizes
        with open_shards(Folder(folder), files) as shards:
            shards.check(self.role, sizes)
            self._engine.drop_gradients()
            shards.fill(self._engine.fragments())
            shards.fill_working(self._engine.working())
            return RestoreReport(steps=max(map(shards.step, sizes)), ranks=shards.ranks, seconds=time.perf_counter() - started)

    def _share(self, batch: Batch, rows: Rows | None = None, *, ranks: int = 0) -> list[Share]:
        """This rank's micro-batches of these rows, or of all; of what `ranks` share, or all ranks."""
        chosen = np.arange(len(batch)) if rows is None else rows
        size, capacity = self.config.micro_batch_size, min(self.config.pack_tokens, self._context)
        shares = share_out(chosen, batch.lengths, ranks=ranks or self.ranks, micro_batch_size=size, pack_tokens=capacity)
        return shares[self.rank if ranks == 0 else 0]

    def _forward(self, inputs: TokenInputs, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """(log-probs, values or rewards (N,), entropy (N,)); the entropy is empty where nobody asked for it."""
        if self.role == "policy":
            return self._engine.forward(inputs, entropy=entropy)  # type: ignore[no-any-return]
        values = self._engine.forward(inputs)
        return values, values.new_empty(0)

    def _accumulate(self, batch: Batch, minibatch: Rows, plan: UpdatePlan, tally: Tally, *, untrained: bool) -> None:
        """Forward and backward over this rank's share of a minibatch. untrained: before any update, so the ratio must still be 1."""
        entropy_wanted: Entropy = "gradient" if plan.entropy_gradient else "value"
        whole = len(minibatch) if self.role == "reward" else _whole(plan, batch.action_counts(minibatch))
        micro = self._share(batch, minibatch)
        for i, share in enumerate(micro):
            rows, line = batch.filled(share)
            real = len(share.rows)
            asked = batch.compared(rows) if self.role == "reward" else batch.actions(rows)
            new, entropy = self._forward(batch.inputs(rows, line), entropy_wanted)
            loss, statistics = self._loss(new, entropy, asked)
            weights = torch.full_like(loss, 1 / max(whole, 1)) if real else torch.zeros_like(loss)
            if plan.aggregation == "sequence_mean" and isinstance(asked, ActionTokens):
                weights = weights / torch.bincount(asked.row, minlength=asked.rows)[asked.row]
            weighted = (weights * loss).sum()
            self._engine.backward(weighted, last=i == len(micro) - 1)
            tally.add(real, weighted.detach(), statistics if real else {name: value[:0] for name, value in statistics.items()})
            if untrained and real and self.role == "policy" and isinstance(asked, ActionTokens):
                tally.compare(new.detach(), asked)

    def _loss(self, new: Tensor, entropy: Tensor, asked: ActionTokens | Compared) -> tuple[Tensor, dict[str, Tensor]]:
        if self.role == "policy":
            return self._objective.policy_loss(new, entropy, asked)  # type: ignore[union-attr, arg-type]
        if self.role == "reward":
            return self._objective.reward_loss(new, asked)  # type: ignore[union-attr, arg-type]
        return self._objective.value_loss(new, asked)  # type: ignore[union-attr, arg-type]


def _whole(plan: UpdatePlan, counts: npt.NDArray[np.int64]) -> int:
    """What the losses of a minibatch are divided by, from the action tokens of each of its rows."""
    return {"token_mean": int(counts.sum()), "sequence_mean": len(counts), "constant": len(counts) * plan.constant}[plan.aggregation]
