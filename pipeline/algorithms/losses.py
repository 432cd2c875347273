"""Per-token losses on action tokens laid flat, each with its source. Pure functions; torch only through the tensors given.

Shapes: N action tokens of a micro-batch, B its rollouts; `row` (N,) says which rollout a token belongs to. Nothing here averages:
the learner weighs each token by a normaliser over the whole minibatch. What is dropped is selected away with `where` before it
meets `exp`, for 0 * inf is NaN in the backward pass, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Loss = tuple["Tensor", dict[str, "Tensor"]]


def plain(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-log pi * A, (N,). Gradient -A grad log pi: the policy gradient theorem's. Williams 1992; Mnih et al. 2016 (A2C)."""
    return -logprobs * advantages


def clipped(log_ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual: float = 0.0) -> Loss:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(log_ratio), (N,). Schulman et al. 2017, eq. 7; apart bounds: Yu et al. 2025 (DAPO).

    dual > 1: where A < 0 the loss is at most -A dual, so that one token of a huge ratio cannot take the whole step (Ye et al. 2020, eq. 5).
    Statistics: shares of tokens whose gradient is cut off, at the lower bound (A < 0), the upper one (A > 0) and the dual one.
    """
    ratio = log_ratio.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    loss, cut = free.maximum(held), held > free
    statistics = {
        "clip_fraction": cut.float(),
        "clip_fraction_low": (cut & (advantages < 0)).float(),
        "clip_fraction_high": (cut & (advantages > 0)).float(),
    }
    if dual == 0:
        return loss, statistics
    bound = -advantages * dual
    above = (advantages < 0) & (loss > bound)
    return bound.where(above, loss), statistics | {"dual_clip_fraction": above.float()}


def rollout_mean(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean over each rollout's action tokens, (B,); 0 for a rollout without any."""
    counts = row.bincount(minlength=rows).clamp(min=1)
    return values.new_zeros(rows).index_add(0, row, values) / counts


def sequence_log_ratio(log_ratio: Tensor, row: Tensor, rows: int) -> Tensor:
    """log of (pi(y|x) / pi_old(y|x))^(1/|y|), the same at every token of a rollout, (N,). Zheng et al. 2025 (GSPO), eq. 7.

    Differentiated through all of the rollout's tokens: grad s = s / |y| sum_t grad log pi_t, as in its eq. 10. Without clipping a token
    then has weight s A / |y| under `sequence_mean`, and s A under `token_mean`. (GSPO-token gives the same where A is one number a rollout.)
    """
    return rollout_mean(log_ratio, row, rows)[row]


def squared_error(values: Tensor, returns: Tensor, old: Tensor, *, clip: float = 0.0) -> Loss:
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2), (N,); clip 0: 1/2 (V - R)^2. Schulman et al. 2017's code; Huang et al. 2023, detail 9."""
    loss, statistics = 0.5 * (values - returns) ** 2, {"value_error": (values - returns).detach().abs()}
    if clip == 0:
        return loss, statistics
    held = 0.5 * (old + (values - old).clamp(-clip, clip) - returns) ** 2
    return loss.maximum(held), statistics | {"value_clip_fraction": (held > loss).float()}


def kl_estimate(log_ratio: Tensor, kind: KLEstimator) -> Tensor:
    """KL(pi || ref) from one sample of pi, d = log pi - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. Schulman 2020, "Approximating KL Divergence".

    As numbers, k1 and k3 have the right mean, k2 a small bias; k2 and k3 are never negative. As a loss on samples of pi only the gradient counts:
    k1: grad log pi, zero in the mean, so it pulls nowhere; k2: d grad log pi, the gradient of KL(pi || ref);
    k3: (1 - exp(-d)) grad log pi, the gradient of KL(ref || pi), which is k2's near d = 0 and saturates where pi is far the likelier (Shao 2024).
    In the reward, where it is not differentiated, k1 gives the gradient of KL(pi || ref) (Ziegler et al. 2019).
    """
    if kind == "k1":
        return log_ratio
    return 0.5 * log_ratio**2 if kind == "k2" else (-log_ratio).exp() - 1 + log_ratio


def importance_weight(log_weight: Tensor, kept: Tensor, *, cap: float = 0.0) -> Tensor:
    """proximal / behaviour of each token, (N,), at most cap unless that is 0; 1 where not kept. Without gradient.

    Without a cap the decoupled objective's weight (Hilton et al. 2022; Fu et al. 2025, AReaL), with one truncated importance sampling
    (Ionides 2008; Yao et al. 2025).
    """
    weight = log_weight.detach().where(kept, log_weight.new_zeros(())).exp()
    return weight.clamp(max=cap) if cap else weight


def kept_rollouts(log_weight: Tensor, row: Tensor, rows: int, *, low: float, high: float) -> Tensor:
    """Whether a token's rollout has a ratio proximal / behaviour within [low, high], (N,) bool; a bound of 0 is none. A ratio of NaN is not within.

    The ratio is the geometric mean over the rollout's tokens, so that the bounds mean the same for every length; the product, which others
    take, leaves any bounds as rollouts grow longer.
    """
    if low == high == 0:
        return row >= 0
    ratio = rollout_mean(log_weight.detach(), row, rows).exp()[row]
    kept = ratio >= low
    return kept & (ratio <= high) if high else kept
