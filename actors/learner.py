"""The learner: one rank of the gang that trains the policy, or the critic, on a step's experience.

consumes: Rollouts -> log-probs or values; Experience -> weight updates; publishes whole weights.
Every rank is given the whole table and every public method is called on all ranks together; the ranks divide the rows among themselves.

The loss of a minibatch is a sum over its action tokens, each weighted by 1 / (action tokens of the whole minibatch) (`token_mean`),
1 / (rows * action tokens of its own row) (`sequence_mean`) or 1 / (rows * a constant) (`constant`). All are known from the table, so the
gradient is the same for every number of ranks, micro-batch size, ZeRO stage and padding.

What was left out: dropout (off in RLHF: Huang et al. 2023, detail 2) and gradient checkpointing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import Dtype, LearnerConfig
from actors.deepspeed_engine import DeepSpeedEngine, StepReport
from actors.device import assigned_compute, torch_dtype
from actors.experience import Experience, Rollouts, TokenLogprobs, TokenValues
from actors.micro_batches import Batch, Rows, Share, in_row_order, minibatches, share_out
from actors.model import Entropy, PolicyModel, TokenInputs, ValueModel, load_causal_lm, load_tokenizer, save_causal_lm
from actors.objective import ActionTokens, PolicyObjective, ValueObjective
from actors.packing import check_packing
from actors.schedule import learning_rate
from actors.shards import open_shards, write_shard
from actors.tally import Tally
from actors.tally import UpdateReport as UpdateReport  # part of this file's interface
from actors.weights import Manifest, Weights, fingerprint, pack
from cluster.storage import Folder, StoredFile


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReady:
    """parameters, trainable: numbers of weights of the whole model. context: longest rollout in tokens.

    checksum: of the whole model before any training; a commit can only be restored into the model the run began with.
    """

    parameters: int
    trainable: int
    device: str
    dtype: Dtype
    context: int
    checksum: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferReport:
    """Over the whole table, the same on every rank. mean: log-prob or value of an action token; perplexity is exp(-mean)."""

    rows: int
    action_tokens: int
    mean: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """How one step's experience is trained on. step: counted from 0, and every step of the run takes epochs * minibatches updates.

    constant: tokens that a row counts for under the aggregation `constant`. kl_coef: of a KL penalty in the loss, in this step.
    entropy_gradient: whether the objective differentiates the entropy.
    first, count: which of the epochs * minibatches updates to make, in their order; count None is all from `first` on.
    """

    step: int
    epochs: int
    minibatches: int
    seed: int
    aggregation: Literal["token_mean", "sequence_mean", "constant"]
    constant: int = 1
    kl_coef: float = 0.0
    entropy_gradient: bool = False
    first: int = 0
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """file: what this rank wrote, relative to the folder; equal states have equal checksums."""

    file: StoredFile
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """steps: optimiser steps behind the state. ranks: that wrote it."""

    steps: int
    ranks: int
    seconds: float


class Learner:
    """One rank. `connect` comes first; then the other methods in any order, on all ranks alike."""

    def __init__(
        self,
        *,
        role: Literal["policy", "critic"],
        rank: int,
        ranks: int,
        path: str,
        config: LearnerConfig,
        temperature: float,
        objective: PolicyObjective | ValueObjective,
        total_updates: int,
        seed: int,
        timeout_s: float,
    ) -> None:
        """path: of the causal LM to start from. temperature: of the rollouts. total_updates: of the run, for the learning rate.

        seed: of whatever randomness a model's initialisation may have, the same on all ranks. timeout_s: of every collective.
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

    def connect(self, address: str | None = None, port: int = 0) -> LearnerReady:
        """Load the model and join the other ranks at address:port, where rank 0 listens; without an address, those this process has already met."""
        torch.manual_seed(self._seed)
        compute = assigned_compute(self.config.gpus)
        heads_only = self.config.trainable == "heads"
        causal_lm = load_causal_lm(self._path, torch_dtype(self.config.dtype), untie_head=heads_only and self.role == "policy")
        self._model: PolicyModel | ValueModel = PolicyModel(causal_lm, self._temperature) if self.role == "policy" else ValueModel(causal_lm)
        if heads_only:
            self._model.requires_grad_(False)
            self._model.head.requires_grad_(True)
        if self.config.pack_tokens:
            check_packing(causal_lm, self._path)
        self._context = int(causal_lm.config.max_position_embeddings)
        checksum = fingerprint(self._model)
        self._model.to(compute.device)
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

    def infer(self, *rollouts: pa.Table) -> tuple[InferReport, pa.Table]:
        """TokenLogprobs (policy) or TokenValues (critic) of this rank's share of the given Rollouts tables, taken as one."""
        started = time.perf_counter()
        batch = Batch(Rollouts.concat([Rollouts(table) for table in rollouts]).table, self._device)
        micro = self._share(np.arange(len(batch)), batch)
        parts = []
        with torch.no_grad():
            for share in micro:
                values = self._forward(batch.inputs(*_filled(share, batch)), "none")[0]
                if len(share.rows):
                    parts.append(batch.aligned(share.rows, values))
        own, column = in_row_order([share.rows for share in micro if len(share.rows)], parts)
        total = torch.tensor([sum(float(v.sum(dtype=np.float64)) for v, _ in parts)], dtype=torch.float64, device=self._device)
        tokens = int(batch.action_offsets[-1])
        mean = float(self._engine.gather(total).sum()) / max(tokens, 1)
        report = InferReport(rows=len(batch), action_tokens=tokens, mean=mean, seconds=time.perf_counter() - started)
        ids = batch.sample_ids[own]
        if self.role == "policy":
            return report, TokenLogprobs.of({"sample_id": ids, "logprobs": column}).table
        return report, TokenValues.of({"sample_id": ids, "values": column}).table

    def update(self, experience: pa.Table, plan: UpdatePlan) -> UpdateReport:
        """Train on a step's Experience: epochs * minibatches optimiser steps, each on a minibatch of the whole step; or on those the plan picks."""
        started = time.perf_counter()
        batch = Batch(Experience(experience).table, self._device, plan.kl_coef)
        epochs = minibatches(len(batch), epochs=plan.epochs, minibatches=plan.minibatches, seed=plan.seed, step=plan.step)
        picked = list(enumerate(rows for epoch in epochs for rows in epoch))[plan.first : None if plan.count is None else plan.first + plan.count]
        tally = Tally(self._device, epochs=plan.epochs, tokens=sum(int(batch.action_counts(rows).sum()) for _, rows in picked))
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
            weights = pack(self._published.named_parameters(), dtype, version)
        return weights.manifest, weights

    def export(self, folder: str) -> None:
        """Rank 0 writes the policy and its tokenizer as `from_pretrained` reads them; the other ranks only take part."""
        assert isinstance(self._model, PolicyModel), "only the policy is exported"
        with self._engine.full_parameters():
            if self.rank == 0:
                save_causal_lm(self._model.causal_lm, load_tokenizer(self._path), Path(folder))

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

    @property
    def _published(self) -> nn.Module:
        """What rollout workers know the parameters of: the causal LM itself, without this floor's wrapper."""
        return self._model.causal_lm if isinstance(self._model, PolicyModel) else self._model

    def _share(self, rows: Rows, batch: Batch) -> list[Share]:
        size, capacity = self.config.micro_batch_size, min(self.config.pack_tokens, self._context)
        return share_out(rows, batch.lengths, ranks=self.ranks, micro_batch_size=size, pack_tokens=capacity)[self.rank]

    def _forward(self, inputs: TokenInputs, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """(log-probs or values (N,), entropy (N,)); the entropy is empty where nobody asked for it."""
        if self.role == "policy":
            return self._engine.forward(inputs, entropy=entropy)  # type: ignore[no-any-return]
        values = self._engine.forward(inputs)
        return values, values.new_empty(0)

    def _accumulate(self, batch: Batch, minibatch: Rows, plan: UpdatePlan, tally: Tally, *, untrained: bool) -> None:
        """Forward and backward over this rank's share of a minibatch. untrained: before any update, so the ratio must still be 1."""
        entropy_wanted: Entropy = "gradient" if plan.entropy_gradient else "value"
        whole = _whole(plan, batch.action_counts(minibatch))
        micro = self._share(minibatch, batch)
        for i, share in enumerate(micro):
            rows, filled = share.rows, _filled(share, batch)
            actions = batch.actions(filled.rows)
            new, entropy = self._forward(batch.inputs(*filled), entropy_wanted)
            loss, statistics = self._loss(new, entropy, actions)
            weights = torch.full_like(loss, 1 / max(whole, 1))
            if plan.aggregation == "sequence_mean":
                weights = weights / torch.bincount(actions.row, minlength=actions.rows)[actions.row]
            if not len(rows):
                weights = torch.zeros_like(loss)
            weighted = (weights * loss).sum()
            self._engine.backward(weighted, last=i == len(micro) - 1)
            tally.add(len(rows), weighted.detach(), statistics if len(rows) else {name: value[:0] for name, value in statistics.items()})
            if untrained and len(rows) and self.role == "policy":
                tally.compare(new.detach(), actions)

    def _loss(self, new: Tensor, entropy: Tensor, actions: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        if self.role == "policy":
            return self._objective.policy_loss(new, entropy, actions)  # type: ignore[union-attr]
        return self._objective.value_loss(new, actions)  # type: ignore[union-attr]


def _whole(plan: UpdatePlan, counts: npt.NDArray[np.int64]) -> int:
    """What the losses of a minibatch are divided by, from the action tokens of each of its rows."""
    return {"token_mean": int(counts.sum()), "sequence_mean": len(counts), "constant": len(counts) * plan.constant}[plan.aggregation]


def _filled(share: Share, batch: Batch) -> Share:
    """The micro-batch itself, or the shortest row for a rank that has run out of rows while others have not."""
    return share if len(share.rows) else Share(np.asarray([int(batch.lengths.argmin())]))
