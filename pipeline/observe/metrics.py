"""The metrics of a step: one flat record, written to `metrics.jsonl` and to TensorBoard."""

from __future__ import annotations

import math
from dataclasses import dataclass

_LOGGED = ("reward/mean", "kl/per_rollout", "policy/loss", "policy/grad_norm", "critic/loss", "ledger/trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """The numbers of one step. Names are grouped by a slash: reward/mean, kl/coef, policy/loss, time/learn ..."""

    step: int
    version: int
    values: dict[str, float]

    def line(self) -> str:
        """The step in one line of a log: how it went, and how long each of its phases took."""
        shown = {name: self.values[name] for name in _LOGGED if math.isfinite(self.values.get(name, math.nan))}
        phases = {
            name.removeprefix("time/"): seconds
            for name, seconds in self.values.items()
            if name.startswith("time/") and name not in ("time/step", "time/tokens_per_second")
        }
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        times = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
        return f"step {self.step} is done: {numbers}; {self.values['time/step']:.2f} s ({times})"

    def record(self) -> dict[str, float | None]:
        """One line of metrics.jsonl. JSON has neither NaN nor infinity; both become null."""
        return {
            "step": self.step,
            "version": self.version,
            **{name: value if math.isfinite(value) else None for name, value in self.values.items()},
        }
