"""Advantage estimation and reward shaping on padded tensors. Pure functions; torch only through the tensors given.

Shapes: B rollouts, A action tokens (right-padded), `mask` (B, A) true where real. Padded places may hold
anything, NaN included: every function selects with `where`, never multiplies by the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: delta_t = r_t + gamma V(s_{t+1}) - V(s_t), A_t = sum_k (gamma lam)^k delta_{t+k}.

    The episode ends after the last real token (V = 0 beyond). Returns (advantages, advantages + values), both (B, A)
    and 0 where not real. Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", eq. 16.
    """
    zero = rewards.new_zeros(())
    rewards, values = rewards.where(mask, zero), values.where(mask, zero)
    advantages = rewards.new_zeros(rewards.shape)
    running = following = rewards.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running).where(mask[:, t], zero)
        advantages[:, t] = running
        following = values[:, t]
    return advantages, (advantages + values).where(mask, zero)


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Reward to go, G_t = sum_{k >= t} gamma^(k - t) r_k, (B, A); 0 where not real. It is GAE with V = 0 and lam = 1."""
    return gae(rewards, rewards.new_zeros(rewards.shape), mask, gamma=gamma, lam=1.0)[0]


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True) -> Tensor:
    """Scale the real entries to variance 1 (and mean 0, or their own mean when shift_mean is false); 0 where not real.

    One entry, or none, has no variance and is only shifted. Huang et al. 2023, details 7 and "whiten".
    """
    real = values[mask]
    if real.numel() == 0:
        return values.new_zeros(values.shape)
    mean = real.mean()
    variance = real.var(unbiased=unbiased) if real.numel() > 1 else real.new_zeros(())
    whitened = (values - mean) * (variance + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean).where(mask, values.new_zeros(()))


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score at each rollout's last action token; (B, A), 0 where not real.

    scores: (B,). kl: (B, A), the k1 estimate log pi - log pi_ref. Ziegler et al. 2019, eq. 2.
    """
    rewards = (-kl_coef * kl).where(mask, kl.new_zeros(()))
    last = mask.sum(dim=1) - 1  # (B,), -1 for a rollout without action tokens, which earns nothing
    rows = (last >= 0).nonzero().squeeze(-1)
    rewards[rows, last[rows]] += scores[rows]
    return rewards
