"""Adds up losses and statistics over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.learner.deepspeed_engine import DeepSpeedEngine, StepReport
from actors.learner.trainees.base import Logprobs

FAR = 0.2  # a ratio that differs from 1 by more is far; the usual width of a clip
MAX_LOG_RATIO = 20.0  # nats, so that a square stays finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Staleness:
    """How far the policy has moved from the weights that sampled, over the first minibatch, before any update.

    w = pi / pi_behaviour of a token, not truncated.

    effective_sample_size: (sum w)^2 / (n sum w^2), in (0, 1]. kl: KL(pi_behaviour || pi) a token, in nats (k3).
    far: share of the tokens with w outside 0.8 to 1.2, which a clipped ratio of the usual width would cut off.
    """

    effective_sample_size: float = 1.0
    kl: float = 0.0
    far: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The report on the updates of one step, the same on every rank.

    samples:          number of rollouts, or comparisons, trained on, over all ranks.
    updates, skipped: optimiser steps taken, and steps dropped because a gradient was not finite.
    loss:             mean over minibatches.
    statistics:       the objective's statistics: means over the losses of all epochs; those called *_max are maxima.
    grad_norm, grad_norm_max: mean and max of the gradient norm before clipping, over the steps taken.
    ratio_deviation:  max |exp(new - proximal) - 1| over the first minibatch, before any update. Policy only, else 0.
    logprob_gap, logprob_gap_max: mean and max of |new - sampled| over the same tokens. Policy only, else 0.
    action_tokens:    number of losses of all epochs: one for each action token, or one for each comparison.
    staleness:        of the same tokens as the gap. Policy only.
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
    staleness: Staleness = Staleness()


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The totals over all ranks.

    rows: number of rows, counted once in each epoch. loss: the sum of the losses added. The others: as in an
    `UpdateReport`.
    """

    rows: int
    loss: float
    statistics: dict[str, float]
    ratio_deviation: float
    logprob_gap: float
    logprob_gap_max: float
    staleness: Staleness


class Tally:
    """Sums over micro-batches, kept in float64 on the device and added up over ranks once, at the end."""

    def __init__(self, device: torch.device, losses: int) -> None:
        """losses: number of losses of all ranks and epochs; statistics are means over them."""
        self.losses = losses
        self._rows = 0
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._loss = self._zero
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._gap_sum, self._gap_tokens = self._zero, 0
        self._gap_max, self._deviation = self._zero, self._zero
        self._weights = torch.zeros(4, dtype=torch.float64, device=device)  # sums of w, w^2, KL, far

    def add(self, rows: int, loss: Tensor, statistics: dict[str, Tensor]) -> None:
        """Add a micro-batch. rows: 0 for a filler, which only registers the names of its statistics."""
        self._rows += rows
        self._loss = self._loss + (loss.detach().double() if rows else 0)
        for name, values in statistics.items():
            counted = values.detach() if rows else values[:0]
            if name.endswith("_max"):
                greatest = self._maxima.get(name, self._zero - torch.inf)
                self._maxima[name] = torch.maximum(greatest, counted.max().double()) if len(counted) else greatest
                continue
            self._sums[name] = self._sums.get(name, self._zero) + counted.sum(dtype=torch.float64)

    def compare(self, logprobs: Logprobs) -> None:
        """Add a micro-batch's log-probs to ratio deviation, log-prob gap and staleness; only before any update."""
        new, sampled, proximal = logprobs
        if not len(new):
            return
        gap = (new - sampled).abs().double()
        self._gap_sum, self._gap_tokens = self._gap_sum + gap.sum(), self._gap_tokens + len(new)
        self._gap_max = torch.maximum(self._gap_max, gap.max())
        deviation = (torch.exp((new - proximal).double()) - 1).abs()
        self._deviation = torch.maximum(self._deviation, deviation.max())
        moved = (new - sampled).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        weight = moved.exp()
        each = torch.stack([weight, weight**2, weight - 1 - moved, ((weight - 1).abs() > FAR).double()])
        self._weights = self._weights + each.sum(dim=1)

    def totals(self, engine: DeepSpeedEngine) -> Totals:
        """Add up over all ranks; called on all ranks together."""
        # Every rank ran the same objective, if only on fillers, so all have the same names.
        names, peaks = (
            sorted(self._sums),
            sorted(self._maxima),
        )
        greatest = [self._gap_max, self._deviation, *(self._maxima[n] for n in peaks)]
        counts = [self._zero + self._gap_tokens, self._zero + self._rows]
        ranks = engine.gather(
            torch.stack(
                [*greatest, self._gap_sum, *counts, self._loss, *self._weights, *(self._sums[n] for n in names)]
            )
        )
        gap_max, deviation, *maxima = ranks[:, : len(greatest)].amax(0).tolist()
        gap, gap_tokens, rows, loss, weight, squared, kl, far, *sums = ranks[:, len(greatest) :].sum(0).tolist()
        means = {name: total / max(self.losses, 1) for name, total in zip(names, sums, strict=True)}
        return Totals(
            rows=round(rows),
            loss=loss,
            statistics=means | dict(zip(peaks, maxima, strict=True)),
            ratio_deviation=deviation,
            logprob_gap=gap / max(gap_tokens, 1),
            logprob_gap_max=gap_max,
            staleness=Staleness(
                effective_sample_size=weight**2 / (gap_tokens * squared), kl=kl / gap_tokens, far=far / gap_tokens
            )
            if gap_tokens and squared
            else Staleness(),
        )

    def report(
        self, engine: DeepSpeedEngine, steps: list[StepReport], rate: float, *, epochs: int, seconds: float
    ) -> UpdateReport:
        """The report on a step's updates; called on all ranks together. rate: learning rate of the last update."""
        found, norms = self.totals(engine), [s.grad_norm for s in steps if not s.skipped]
        return UpdateReport(
            samples=round(found.rows / epochs),
            updates=len(norms),
            skipped=len(steps) - len(norms),
            loss=found.loss / len(steps),
            grad_norm=sum(norms) / max(len(norms), 1),
            grad_norm_max=max(norms, default=0.0),
            learning_rate=rate,
            statistics=found.statistics,
            ratio_deviation=found.ratio_deviation,
            logprob_gap=found.logprob_gap,
            logprob_gap_max=found.logprob_gap_max,
            action_tokens=self.losses,
            seconds=seconds,
            staleness=found.staleness,
        )
