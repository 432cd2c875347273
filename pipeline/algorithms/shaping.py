"""Rewards between the reward function and the algorithm: bounds and penalties on scores, whitening of token rewards. Torch-free, like an algorithm.

    score --clip--> --missing end--> --overlong--> shaped score --with KL--> token rewards --whiten--> algorithm

The order matters: penalties are said in the score's own units and are never clipped. The score as it was given stays in the experience.
Whitening with a shift gives every token a share of the step's mean, so that a rollout's return then depends on its length; hence the original's without.
Left out: normalisation by running statistics; it makes a step's rewards depend on all steps before, and whitening does what it is wanted for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster.config import Config
from pipeline.algorithms.estimators import whiten

if TYPE_CHECKING:
    from torch import Tensor


class ShapingConfig(Config):
    """What becomes of the scores before advantages are made of them."""

    clip: float = Field(default=0.0, ge=0)
    """Scores are cut off at plus and minus this. 0: no limit."""

    missing_eos: Literal["keep", "replace", "add"] = "keep"
    """What befalls the score of a rollout that did not end by itself: nothing, it is replaced by eos_penalty (Ziegler et al. 2019), or that is added (TRL)."""

    eos_penalty: float = -1.0
    """The score of a rollout that did not end by itself, or what is added to it."""

    overlong_tokens: int = Field(default=0, ge=0)
    """Over the last so many of sampling.max_new_tokens, a penalty rises from nothing to overlong_penalty (DAPO, Yu et al. 2025, eq. 13). 0: none."""

    overlong_penalty: float = Field(default=1.0, ge=0)
    """What a rollout of full length loses."""

    whiten: Literal["no", "scale", "shift"] = "no"
    """Token rewards of the step, KL penalty included: as they are, of variance 1 with their mean kept (Huang et al. 2023), or of mean 0, too."""


def shape_scores(shaping: ShapingConfig, scores: Tensor, stopped: Tensor, lengths: Tensor, max_new_tokens: int) -> Tensor:
    """(B,) scores, clipped and penalised. stopped: (B,) bool, ended by itself. lengths: (B,) action tokens.

    Overlong penalty: 0 up to max_new_tokens - overlong_tokens, then linear, overlong_penalty at max_new_tokens and beyond.
    """
    if shaping.clip:
        scores = scores.clamp(-shaping.clip, shaping.clip)
    if shaping.missing_eos != "keep":
        penalised = scores.new_full(scores.shape, shaping.eos_penalty) if shaping.missing_eos == "replace" else scores + shaping.eos_penalty
        scores = scores.where(stopped, penalised)
    if shaping.overlong_tokens:
        over = (lengths - (max_new_tokens - shaping.overlong_tokens)) / shaping.overlong_tokens
        scores = scores - shaping.overlong_penalty * over.clamp(0, 1)
    return scores


def shape_token_rewards(shaping: ShapingConfig, rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, A) token rewards, whitened over the step if that is asked for; 0 where not real."""
    return rewards if shaping.whiten == "no" else whiten(rewards, mask, shift_mean=shaping.whiten == "shift")
