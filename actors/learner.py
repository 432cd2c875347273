"""The learner: one rank of the gang that trains the policy, or the critic, on a step's experience.

consumes: Rollouts -> log-probs or values; Experience -> weight updates; publishes whole weights.
Every rank is given the whole table and every public method is called on all ranks together; the ranks divide the rows among themselves.

The loss of a minibatch is a sum over its action tokens, each weighted by 1 / (action tokens of the whole minibatch) (`token_mean`) or
1 / (rows * action tokens of its own row) (`sequence_mean`). Both are known from the table, so the gradient is the same for every
number of ranks, micro-batch size, ZeRO stage and padding.

What was left out: dropout (off in RLHF: Huang et al. 2023, detail 2) and gradient checkpointing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import Dtype, LearnerConfig
from actors.deepspeed_engine import DeepSpeedEngine, StepReport
from actors.device import assigned_compute, torch_dtype
from actors.experience import Experience, Rollouts, TokenLogprobs, TokenValues
from actors.micro_batches import Batch, Rows, deal, in_row_order, minibatches
from actors.model import PolicyModel, TokenInputs, ValueModel, load_causal_lm, load_tokenizer, save_causal_lm
from actors.objective import ActionTokens, PolicyObjective, ValueObjective
from actors.schedule import learning_rate
from actors.weights import Manifest, Weights, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReady:
    """parameters, trainable: numbers of weights of the whole model. context: longest rollout in tokens."""

    parameters: int
    trainable: int
    device: str
    dtype: Dtype
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InferReport:
    """Over the whole table, the same on every rank. mean: log-prob or value of an action token; perplexity is exp(-mean)."""

    rows: int
    action_tokens: int
    mean: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """How one step's experience is trained on. step: counted from 0, and every step of the run takes epochs * minibatches updates."""

    step: int
    epochs: int
    minibatches: int
    seed: int
    aggregation: Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one step's updates did, the same on every rank.

    samples:          rollouts trained on, over all ranks.
    updates, skipped: optimiser steps taken, and dropped because a gradient was not finite.
    loss:             mean over minibatches. statistics: the objective's, means over action_tokens, counted once an epoch.
    grad_norm, grad_norm_max: before clipping, over the steps taken.
    ratio_deviation:  max |exp(new - proximal) - 1| over the first minibatch before any update; 0 for the critic, which has no ratio.
    logprob_gap, logprob_gap_max: mean and max of |new - sampled| there; 0 for the critic.
    """

    samples: int
    updates: int
    skipped: int
    loss: float
    grad_norm: float
    grad_norm_max: float
    learning_rate: float
    statistics: dict[str, float]
    ratio_deviation: float
    logprob_gap: float
    logprob_gap_max: float
    action_tokens: int
    seconds: float


class Learner:
    """One rank. `connect` comes first; then `infer`, `update`, `publish` and `export` in any order, on all ranks alike."""

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

    def connect(self, address: str, port: int) -> LearnerReady:
        """Load the model and join the other ranks at address:port, where rank 0 listens."""
        torch.manual_seed(self._seed)
        compute = assigned_compute(self.config.gpus)
        heads_only = self.config.trainable == "heads"
        causal_lm = load_causal_lm(self._path, torch_dtype(self.config.dtype), untie_head=heads_only and self.role == "policy")
        self._model: PolicyModel | ValueModel = PolicyModel(causal_lm, self._temperature) if self.role == "policy" else ValueModel(causal_lm)
        if heads_only:
            self._model.requires_grad_(False)
            self._model.head.requires_grad_(True)
        self._model.to(compute.device)
        parameters = list(self._model.parameters())
        ready = LearnerReady(
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            device=str(compute.device),
            dtype=self.config.dtype,
            context=int(causal_lm.config.max_position_embeddings),
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
            for rows in micro:
                values = self._forward(batch.inputs(rows if len(rows) else _filler(batch)), entropy=False)[0]
                if len(rows):
                    parts.append(batch.aligned(rows, values))
        own, column = in_row_order([rows for rows in micro if len(rows)], parts)
        total = torch.tensor([sum(float(v.sum(dtype=np.float64)) for v, _ in parts)], dtype=torch.float64, device=self._device)
        tokens = int(batch.action_offsets[-1])
        mean = float(self._engine.gather(total).sum()) / max(tokens, 1)
        report = InferReport(rows=len(batch), action_tokens=tokens, mean=mean, seconds=time.perf_counter() - started)
        ids = batch.sample_ids[own]
        if self.role == "policy":
            return report, TokenLogprobs.of({"sample_id": ids, "logprobs": column}).table
        return report, TokenValues.of({"sample_id": ids, "values": column}).table

    def update(self, experience: pa.Table, plan: UpdatePlan) -> UpdateReport:
        """Train on a step's Experience: epochs * minibatches optimiser steps, each on a minibatch of the whole step."""
        started = time.perf_counter()
        batch = Batch(Experience(experience).table, self._device)
        tally = _Tally(self._device, epochs=plan.epochs, tokens=plan.epochs * int(batch.action_offsets[-1]))
        steps: list[StepReport] = []
        rate = 0.0
        for epoch, parts in enumerate(minibatches(len(batch), epochs=plan.epochs, minibatches=plan.minibatches, seed=plan.seed, step=plan.step)):
            for i, rows in enumerate(parts):
                index = (plan.step * plan.epochs + epoch) * plan.minibatches + i
                rate = learning_rate(
                    index,
                    self._total_updates,
                    peak=self.config.learning_rate,
                    schedule=self.config.schedule,
                    warmup_fraction=self.config.warmup_fraction,
                )
                self._accumulate(batch, rows, plan.aggregation, tally, untrained=epoch == i == 0)
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

    @property
    def _published(self) -> nn.Module:
        """What rollout workers know the parameters of: the causal LM itself, without this floor's wrapper."""
        return self._model.causal_lm if isinstance(self._model, PolicyModel) else self._model

    def _share(self, rows: Rows, batch: Batch) -> list[Rows]:
        return deal(rows, batch.lengths, ranks=self.ranks, micro_batch_size=self.config.micro_batch_size)[self.rank]

    def _forward(self, inputs: TokenInputs, *, entropy: bool) -> tuple[Tensor, Tensor]:
        """(log-probs or values (N,), entropy (N,)); the entropy is empty where nobody asked for it."""
        if self.role == "policy":
            return self._engine.forward(inputs, entropy=entropy)  # type: ignore[no-any-return]
        values = self._engine.forward(inputs)
        return values, values.new_empty(0)

    def _accumulate(self, batch: Batch, minibatch: Rows, aggregation: str, tally: _Tally, *, untrained: bool) -> None:
        """Forward and backward over this rank's share of a minibatch. untrained: before any update, so the ratio must still be 1."""
        counts = batch.action_counts(minibatch)
        whole = int(counts.sum()) if aggregation == "token_mean" else len(minibatch)
        micro = self._share(minibatch, batch)
        for i, rows in enumerate(micro):
            inputs, actions = batch.micro_batch(rows if len(rows) else _filler(batch))
            new, entropy = self._forward(inputs, entropy=True)
            loss, statistics = self._loss(new, entropy, actions)
            weights = torch.full_like(loss, 1 / max(whole, 1))
            if aggregation == "sequence_mean":
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


class _Tally:
    """Sums over micro-batches, kept in float64 on the device and brought together over ranks once, at the end."""

    def __init__(self, device: torch.device, *, epochs: int, tokens: int) -> None:
        """tokens: action tokens of all ranks and epochs."""
        self._epochs = epochs
        self._tokens = tokens
        self._rows = 0
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._loss = self._zero
        self._sums: dict[str, Tensor] = {}
        self._gap_sum, self._gap_tokens = self._zero, 0
        self._gap_max, self._deviation = self._zero, self._zero

    def add(self, rows: int, loss: Tensor, statistics: dict[str, Tensor]) -> None:
        self._rows += rows
        self._loss = self._loss + loss.double()
        for name, values in statistics.items():
            self._sums[name] = self._sums.get(name, self._zero) + values.detach().sum(dtype=torch.float64)

    def compare(self, new: Tensor, actions: ActionTokens) -> None:
        if not len(new):
            return
        gap = (new - actions.logprobs).abs().double()
        self._gap_sum, self._gap_tokens = self._gap_sum + gap.sum(), self._gap_tokens + len(new)
        self._gap_max = torch.maximum(self._gap_max, gap.max())
        deviation = (torch.exp((new - actions.proximal_logprobs).double()) - 1).abs()
        self._deviation = torch.maximum(self._deviation, deviation.max())

    def report(self, engine: DeepSpeedEngine, steps: list[StepReport], rate: float, *, seconds: float) -> UpdateReport:
        names = sorted(self._sums)  # every rank ran the same objective, fillers included, so all have the same names
        counts = [self._zero + self._gap_tokens, self._zero + self._rows]
        ranks = engine.gather(torch.stack([self._gap_max, self._deviation, self._gap_sum, *counts, self._loss, *(self._sums[n] for n in names)]))
        gap_max, deviation = ranks[:, :2].amax(0).tolist()
        gap, gap_tokens, rows, loss, *sums = ranks[:, 2:].sum(0).tolist()
        norms = [s.grad_norm for s in steps if not s.skipped]
        return UpdateReport(
            samples=round(rows / self._epochs),
            updates=len(norms),
            skipped=len(steps) - len(norms),
            loss=loss / len(steps),
            grad_norm=sum(norms) / max(len(norms), 1),
            grad_norm_max=max(norms, default=0.0),
            learning_rate=rate,
            statistics={name: total / max(self._tokens, 1) for name, total in zip(names, sums, strict=True)},
            ratio_deviation=deviation,
            logprob_gap=gap / max(gap_tokens, 1),
            logprob_gap_max=gap_max,
            action_tokens=self._tokens,
            seconds=seconds,
        )


def _filler(batch: Batch) -> Rows:
    """The shortest row, for a rank that has run out of rows while others have not."""
    return np.asarray([int(batch.lengths.argmin())])
