"""Per-token losses on action tokens laid flat, each with its source.

Pure functions; torch only through the tensors given.

Shapes: N action tokens of a micro-batch, B its rollouts; `row` (N,) is the rollout of each token.

Nothing here averages: the learner weighs each token by a normaliser over the whole minibatch. Dropped tokens are
removed by `where` before `exp`, because 0 * inf is NaN, in the backward pass, too. For the same reason every log-ratio
is bounded before `exp`: a ratio that overflows gives a finite clipped loss with a NaN gradient. A token beyond a bound
has no gradient through it, and is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Loss = tuple["Tensor", dict[str, "Tensor"]]

MAX_LOG_RATIO = 20.0  # nats, in both directions; exp(20) is 5e8
MAX_K3 = 10.0  # nats; reached where the reference finds a token 13 times likelier than the policy does


def bounded(log_ratio: Tensor) -> Tensor:
    """A log-ratio clamped to plus and minus MAX_LOG_RATIO; NaN stays NaN, so that it is noticed."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def out_of_bounds(log_ratio: Tensor) -> Tensor:
    """Whether `bounded` changes a token, (N,) bool."""
    return log_ratio.detach().abs() > MAX_LOG_RATIO


def plain(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-log pi * A, (N,), whose gradient is that of the policy gradient theorem.

    Williams 1992; Mnih et al. 2016 (A2C).
    """
    return -logprobs * advantages


def clipped(log_ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual: float = 0.0) -> Loss:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(log_ratio), (N,).

    Schulman et al. 2017, eq. 7; separate bounds: Yu et al. 2025 (DAPO). dual > 1: where A < 0 the loss is at most
    -A dual, so that one token with a huge ratio cannot dominate the step (Ye et al. 2020, eq. 5). Statistics: shares of
    tokens whose gradient is cut off, at the lower bound (A < 0), the upper one (A > 0) and the dual one, and of tokens
    whose log-ratio is out of bounds.
    """
    ratio = bounded(log_ratio).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    loss, cut = free.maximum(held), held > free
    statistics = {
        "clip_fraction": cut.float(),
        "clip_fraction_low": (cut & (advantages < 0)).float(),
        "clip_fraction_high": (cut & (advantages > 0)).float(),
        "ratio_bounded_fraction": out_of_bounds(log_ratio).float(),
    }
    if dual == 0:
        return loss, statistics
    bound = -advantages * dual
    above = (advantages < 0) & (loss > bound)
    return bound.where(above, loss), statistics | {"dual_clip_fraction": above.float()}


def clipped_weight(log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, high: float) -> Loss:
    """-sg(min(r, 1 + high)) A log pi, r = exp(log_ratio), (N,); sg: without gradient.

    MiniMax 2025 (MiniMax-M1), eq. 4, CISPO, without its lower bound, which they leave open. The ratio is a weight: it
    is cut off, and no token loses its gradient. Statistics: shares of tokens whose weight is cut off, and of tokens
    whose log-ratio is out of bounds.
    """
    ratio = bounded(log_ratio.detach()).exp()
    weight = ratio.clamp(max=1 + high)
    cut = (ratio > 1 + high).float()
    statistics = {
        "clip_fraction": cut,
        "clip_fraction_high": cut,
        "ratio_bounded_fraction": out_of_bounds(log_ratio).float(),
    }
    return weight * plain(logprobs, advantages), statistics


def rollout_mean(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean over each rollout's action tokens, (B,); 0 for a rollout without any."""
    counts = row.bincount(minlength=rows).clamp(min=1)
    return values.new_zeros(rows).index_add(0, row, values) / counts


def sequence_log_ratio(log_ratio: Tensor, row: Tensor, rows: int) -> Tensor:
    """log of s = (pi(y|x) / pi_old(y|x))^(1/|y|), the same at every token of a rollout, (N,).

    Zheng et al. 2025 (GSPO), eq. 7. It is differentiated as GSPO-token, s_t = sg(s) pi_t / sg(pi_t) (eq. 14): it has
    the value of the rollout's ratio and the gradient of the token's own log-prob, so a token is moved by its own
    advantage. If a rollout has one advantage, this is the gradient of s itself (eq. 10): s A / |y| a token under
    `sequence_mean`, s A under `token_mean`.
    """
    rollout = rollout_mean(log_ratio.detach(), row, rows)[row]
    return rollout + (log_ratio - log_ratio.detach())


def squared_error(values: Tensor, returns: Tensor, old: Tensor, *, clip: float = 0.0) -> Loss:
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2), (N,); with clip 0: 1/2 (V - R)^2.

    The code of Schulman et al. 2017; Huang et al. 2023, detail 9.
    """
    loss, statistics = 0.5 * (values - returns) ** 2, {"value_error": (values - returns).detach().abs()}
    if clip == 0:
        return loss, statistics
    held = 0.5 * (old + (values - old).clamp(-clip, clip) - returns) ** 2
    return loss.maximum(held), statistics | {"value_clip_fraction": (held > loss).float()}


def kl_estimate(log_ratio: Tensor, kind: KLEstimator) -> Tensor:
    """KL(pi || ref) from one sample of pi, d = log pi - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    Schulman 2020, "Approximating KL Divergence". As numbers, k1 and k3 are unbiased and k2 has a small bias; k2 and k3
    are never negative. As a loss on samples of pi only the gradient counts:

        k1  grad log pi, which is zero in expectation
        k2  d grad log pi, the gradient of KL(pi || ref)
        k3  (1 - exp(-d)) grad log pi, the gradient of KL(ref || pi); it is k2's near d = 0, and saturates where pi is
            much likelier than ref (Shao 2024)

    In the reward, where it is not differentiated, k1 gives the gradient of KL(pi || ref) (Ziegler et al. 2019).

    d is bounded, and k3 is at most MAX_K3. Otherwise one token with log pi = -12 and log ref = -0.5 has a k3 of 9.9e4,
    and dominates the update.
    """
    d = bounded(log_ratio)
    if kind == "k1":
        return d
    return 0.5 * d**2 if kind == "k2" else ((-d).exp() - 1 + d).clamp(max=MAX_K3)


def kl_out_of_bounds(log_ratio: Tensor, kind: KLEstimator) -> Tensor:
    """Whether `kl_estimate` is cut off, by the bound of d or of k3; bool, without gradient."""
    cut = out_of_bounds(log_ratio)
    return cut | (kl_estimate(log_ratio.detach(), kind) >= MAX_K3) if kind == "k3" else cut


def importance_weight(
    log_weight: Tensor, kept: Tensor, row: Tensor, rows: int, *, per: Literal["token", "sequence"], cap: float = 0.0
) -> Tensor:
    """proximal / behaviour, (N,), at most `cap` unless that is 0; 1 where not kept. Without gradient.

    per "token": the ratio of each token. per "sequence": the product over its rollout, which has no bias, and a
    variance that grows with the length. Without a cap it is the weight of the decoupled objective (Hilton et al. 2022;
    Fu et al. 2025, AReaL), with a cap truncated importance sampling (Ionides 2008; Yao et al. 2025).
    """
    log_weight = log_weight.detach().where(kept, log_weight.new_zeros(()))
    if per == "sequence":
        log_weight = log_weight.new_zeros(rows).index_add(0, row, log_weight)[row]
    weight = bounded(log_weight).exp()
    return weight.clamp(max=cap) if cap else weight


def kept_rollouts(log_weight: Tensor, row: Tensor, rows: int, *, low: float, high: float) -> Tensor:
    """Whether a token's rollout has a ratio proximal / behaviour within [low, high], (N,) bool; a bound of 0 is none.

    The ratio is the geometric mean over the rollout's tokens, so that the bounds mean the same for every length; a
    product leaves any bounds as rollouts grow longer. A ratio of NaN is not within.
    """
    if low == high == 0:
        return row >= 0
    ratio = rollout_mean(log_weight.detach(), row, rows).exp()[row]
    kept = ratio >= low
    return kept & (ratio <= high) if high else kept
