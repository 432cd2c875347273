"""The shaping of rewards before the algorithm: bounds and penalties on scores, whitening of token rewards.

Torch-free, like an algorithm.

    score --clip--> --missing end--> --overlong--> shaped score --with KL--> token rewards --whiten--> algorithm

The order matters: penalties are in the score's own units and are never clipped. The original score stays in the
experience. Whitening with a shift gives every token a share of the step's mean, so that a rollout's return depends on
its length; therefore the original code scales without a shift. Left out: normalisation by running statistics, which
makes a step's rewards depend on all earlier steps; whitening serves the same purpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster.config import Config
from pipeline.algorithms.estimators import whiten

if TYPE_CHECKING:
    from torch import Tensor


class ShapingConfig(Config):
    """The shaping of scores and token rewards, before advantages are estimated."""

    clip: float = Field(default=0.0, ge=0)
    """Clip scores at plus and minus this. 0: no limit."""

    missing_eos: Literal["keep", "replace", "add"] = "keep"
    """The score of a rollout that did not end by itself: keep, replace, or add.

    keep: unchanged. replace: by eos_penalty (Ziegler et al. 2019). add: eos_penalty is added (TRL).
    """

    eos_penalty: float = -1.0
    """The score of a rollout that did not end by itself, or the number added to it; see missing_eos."""

    overlong_tokens: int = Field(default=0, ge=0)
    """Length of the range below sampling.max_new_tokens in which the overlong penalty rises; 0: no penalty.

    DAPO, Yu et al. 2025, eq. 13.
    """

    overlong_penalty: float = Field(default=1.0, ge=0)
    """Penalty of a rollout of full length."""

    whiten: Literal["no", "scale", "shift"] = "no"
    """Whitening of the step's token rewards, KL penalty included: no, scale, or shift.

    scale: to variance 1, with their mean kept (Huang et al. 2023). shift: to mean 0 as well.
    """


def shape_scores(
    shaping: ShapingConfig, scores: Tensor, stopped: Tensor, lengths: Tensor, max_new_tokens: int
) -> Tensor:
    """Clip and penalise scores, (B,). stopped: (B,) bool, ended by itself. lengths: (B,) action tokens.

    Overlong penalty: 0 up to max_new_tokens - overlong_tokens, then linear, overlong_penalty at max_new_tokens and
    beyond.
    """
    if shaping.clip:
        scores = scores.clamp(-shaping.clip, shaping.clip)
    if shaping.missing_eos != "keep":
        penalised = (
            scores.new_full(scores.shape, shaping.eos_penalty)
            if shaping.missing_eos == "replace"
            else scores + shaping.eos_penalty
        )
        scores = scores.where(stopped, penalised)
    if shaping.overlong_tokens:
        over = (lengths - (max_new_tokens - shaping.overlong_tokens)) / shaping.overlong_tokens
        scores = scores - shaping.overlong_penalty * over.clamp(0, 1)
    return scores


def shape_token_rewards(shaping: ShapingConfig, rewards: Tensor, mask: Tensor) -> Tensor:
    """Token rewards (B, A), whitened over the step if configured; 0 where not real."""
    return rewards if shaping.whiten == "no" else whiten(rewards, mask, shift_mean=shaping.whiten == "shift")
