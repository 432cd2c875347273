"""What a step's updates did, added up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.deepspeed_engine import DeepSpeedEngine, StepReport
from actors.objective import ActionTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one step's updates did, the same on every rank.

    samples:          rollouts, or comparisons, trained on, over all ranks.
    updates, skipped: optimiser steps taken, and dropped because a gradient was not finite.
    loss:             mean over minibatches. statistics: the objective's, means over action_tokens, counted once an epoch; those called *_max are maxima.
    grad_norm, grad_norm_max: before clipping, over the steps taken.
    ratio_deviation:  max |exp(new - proximal) - 1| over the first minibatch before any update; 0 for all but the policy, which have no ratio.
    logprob_gap, logprob_gap_max: mean and max of |new - sampled| there; 0 for all but the policy.
    action_tokens:    of all epochs; of a reward model, comparisons.
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


class Tally:
    """Sums over micro-batches, kept in float64 on the device and brought together over ranks once, at the end."""

    def __init__(self, device: torch.device, *, epochs: int, tokens: int) -> None:
        """tokens: action tokens, or comparisons, of all ranks and epochs: what statistics are means over."""
        self._epochs = epochs
        self._tokens = tokens
        self._rows = 0
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._loss = self._zero
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._gap_sum, self._gap_tokens = self._zero, 0
        self._gap_max, self._deviation = self._zero, self._zero

    def add(self, rows: int, loss: Tensor, statistics: dict[str, Tensor]) -> None:
        self._rows += rows
        self._loss = self._loss + loss.double()
        for name, values in statistics.items():
            if name.endswith("_max"):
                greatest = self._maxima.get(name, self._zero - torch.inf)
                self._maxima[name] = torch.maximum(greatest, values.detach().max().double()) if len(values) else greatest
                continue
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
        names, peaks = sorted(self._sums), sorted(self._maxima)  # every rank ran the same objective, fillers included, so all have the same names
        greatest = [self._gap_max, self._deviation, *(self._maxima[n] for n in peaks)]
        counts = [self._zero + self._gap_tokens, self._zero + self._rows]
        ranks = engine.gather(torch.stack([*greatest, self._gap_sum, *counts, self._loss, *(self._sums[n] for n in names)]))
        gap_max, deviation, *maxima = ranks[:, : len(greatest)].amax(0).tolist()
        gap, gap_tokens, rows, loss, *sums = ranks[:, len(greatest) :].sum(0).tolist()
        means = {name: total / max(self._tokens, 1) for name, total in zip(names, sums, strict=True)}
        norms = [s.grad_norm for s in steps if not s.skipped]
        return UpdateReport(
            samples=round(rows / self._epochs),
            updates=len(norms),
            skipped=len(steps) - len(norms),
            loss=loss / len(steps),
            grad_norm=sum(norms) / max(len(norms), 1),
            grad_norm_max=max(norms, default=0.0),
            learning_rate=rate,
            statistics=means | dict(zip(peaks, maxima, strict=True)),
            ratio_deviation=deviation,
            logprob_gap=gap / max(gap_tokens, 1),
            logprob_gap_max=gap_max,
            action_tokens=self._tokens,
            seconds=seconds,
        )
