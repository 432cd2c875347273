"""The KL coefficient over the run. Its state is one number, which is part of every commit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.algorithms.base import Algorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class KLController:
    """coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon); fixed when target is 0.

    Ziegler et al. 2019, section 2.2. It is never below 0, which n > 5 * horizon would give. Nothing leads back from 0,
    so a configuration with that many rollouts a step is refused.
    """

    coef: float
    target: float
    horizon: int

    @classmethod
    def of(cls, algorithm: Algorithm, coef: float | None = None) -> KLController:
        """coef: the present value of a run; None: the start value."""
        return cls(
            coef=algorithm.kl_coef if coef is None else coef, target=algorithm.kl_target, horizon=algorithm.kl_horizon
        )

    def update(self, kl: float, rollouts: int) -> KLController:
        """kl: mean KL per rollout of the step, in nats; rollouts: how many there were."""
        if self.target == 0:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * max(1 + error * rollouts / self.horizon, 0.0))
