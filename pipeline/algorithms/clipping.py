"""The clipped surrogate as a base class, for every algorithm that takes several updates a step.

Papers are in losses.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.algorithms import losses
from pipeline.algorithms.base import Algorithm

if TYPE_CHECKING:
    from torch import Tensor

    from actors.objective import ActionTokens


class Clipped(Algorithm):
    """Loss max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = pi / pi_proximal.

    At r = 1 its gradient is the plain one.
    """

    objective: Literal["clipped", "cispo"] = "clipped"
    """The policy's objective: clipped or cispo.

    clipped: the surrogate above; a token beyond a bound has no gradient. cispo: -sg(min(r, 1 + clip_high)) A log pi, in
    which every token has one (MiniMax 2025); clip_low is not used.
    """

    ratio: Literal["token", "sequence"] = "token"
    """The ratio that is clipped: token or sequence.

    token: each token's own. sequence: the rollout's, length-normalised (GSPO, Zheng et al. 2025, with bounds near
    3e-4).
    """

    clip_low: float = Field(default=0.2, ge=0, le=1)
    """A ratio below 1 - clip_low gains nothing further."""

    clip_high: float = Field(default=0.2, ge=0)
    """A ratio above 1 + clip_high gains nothing further; DAPO uses more than clip_low (Yu et al. 2025)."""

    dual_clip: float = Field(default=0.0, ge=0)
    """Largest ratio that counts where the advantage is negative; 3 is usual (Ye et al. 2020). 0: no limit."""

    @property
    def corrects_staleness(self) -> bool:
        """Also without such weights, where the clipped ratio itself is to the weights that sampled."""
        return super().corrects_staleness or not self.needs_proximal

    def surrogate(self, logprobs: Tensor, batch: ActionTokens) -> losses.Loss:
        log_ratio = logprobs - batch.proximal_logprobs
        if self.objective == "cispo":
            return losses.clipped_weight(log_ratio, logprobs, batch.advantages, high=self.clip_high)
        if self.ratio == "sequence":
            log_ratio = losses.sequence_log_ratio(log_ratio, batch.row, batch.rows)
        return losses.clipped(log_ratio, batch.advantages, low=self.clip_low, high=self.clip_high, dual=self.dual_clip)

    def rules(self) -> None:
        super().rules()
        if self.objective == "cispo" and (self.ratio != "token" or self.dual_clip):
            field, value = ("ratio", self.ratio) if self.ratio != "token" else ("dual_clip", f"{self.dual_clip:g}")
            raise ValueError(
                f"algorithm.{field}: must be left out when algorithm.objective is cispo, got {value}; it belongs to "
                "the clipped surrogate"
            )
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"algorithm.dual_clip: must be above 1 + algorithm.clip_high = {1 + self.clip_high:g}, got "
                f"{self.dual_clip:g}; 3 is usual, 0 turns it off"
            )
