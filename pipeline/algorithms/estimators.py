"""Advantage estimation and reward shaping on padded tensors. Pure functions; torch only through the tensors given.

Shapes: B rollouts, A action tokens (right-padded), `mask` (B, A) true where real. Padded places may hold
anything, NaN included: every function selects with `where`, never multiplies by the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; returns (advantages, advantages + values), (B, A) each, 0 where not real.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),    A_t = sum_k (gamma lam)^k delta_{t+k}

    t counts action tokens alone: tokens of an environment in between are neither discounted nor a boundary, so returns
    cross turns. The episode ends after the last real token (V = 0 beyond). Schulman et al. 2016, "High-Dimensional
    Continuous Control Using GAE", eq. 16.
    """
    zero = rewards.new_zeros(())
    rewards, values = rewards.where(mask, zero), values.where(mask, zero)
    following = values.new_zeros(values.shape)
    following[:, :-1] = values[:, 1:]
    deltas = (rewards + gamma * following - values).where(mask, zero)
    advantages = _running(deltas, mask, gamma * lam)
    return advantages, (advantages + values).where(mask, zero)


def _running(deltas: Tensor, mask: Tensor, decay: float) -> Tensor:
    """S_t = delta_t + decay S_{t+1}, (B, A); 0 where not real.

    It is computed time-major, four times as fast, because a column of a row-major table is strided.
    """
    steps, gaps = deltas.t().contiguous(), (~mask).t().contiguous()  # (A, B)
    sums = steps.new_zeros(steps.shape)
    running = steps.new_zeros(steps.shape[1])
    for t in range(len(steps) - 1, -1, -1):
        running = (decay * running).add_(steps[t]).masked_fill_(gaps[t], 0)
        sums[t] = running
    return sums.t().contiguous()


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Reward to go over action tokens, G_t = sum_{k >= t} gamma^(k - t) r_k, (B, A); 0 where not real.

    It is GAE with V = 0 and lam = 1.
    """
    return gae(rewards, rewards.new_zeros(rewards.shape), mask, gamma=gamma, lam=1.0)[0]


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True) -> Tensor:
    """Scale the real entries to variance 1 (and mean 0, or their own mean when shift_mean is false); 0 where not real.

    One entry, or none, has no variance and is only shifted. The moments are float64: in float32 the mean of 1,000
    times 1000.1 is not 1000.1, and the remaining difference would be scaled up. Huang et al. 2023, details 7 and
    "whiten".
    """
    exact = values.double()
    real = exact[mask]
    if real.numel() == 0:
        return values.new_zeros(values.shape)
    mean = real.mean()
    variance = real.var(unbiased=unbiased) if real.numel() > 1 else real.new_zeros(())
    whitened = (exact - mean) * (variance + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean).to(values.dtype).where(mask, values.new_zeros(()))


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score at each rollout's last action token; (B, A), 0 where not real.

    scores: (B,). kl: (B, A), an estimate such as k1, log pi - log pi_ref. Ziegler et al. 2019, eq. 2.
    """
    rewards = (-kl_coef * kl).where(mask, kl.new_zeros(()))
    last = mask.sum(dim=1) - 1  # (B,), -1 for a rollout without action tokens, which earns nothing
    rows = (last >= 0).nonzero().squeeze(-1)
    rewards[rows, last[rows]] += scores[rows]
    return rewards


def n_step(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, steps: int) -> tuple[Tensor, Tensor]:
    """n-step advantages; returns (advantages, advantages + values), (B, A) each, 0 where not real.

        A_t = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V(s_{t+n}) - V(s_t)

    V and r are 0 beyond the last real token. One step is GAE with lam = 0; as many steps as tokens give the reward to
    go minus V. Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", section 4.
    """
    if steps == 1:
        return gae(rewards, values, mask, gamma=gamma, lam=0.0)
    zero = rewards.new_zeros(())
    # S_t, the sum of all gamma^k delta_{t+k}
    exact = gae(rewards.double(), values.double(), mask, gamma=gamma, lam=1.0)[0]
    advantages = exact.clone()
    # A_t = S_t - gamma^n S_{t+n} takes linear time for any n; in float64, because it is a small difference of sums
    if steps < exact.shape[1]:
        advantages[:, :-steps] -= gamma**steps * exact[:, steps:]
    advantages = advantages.to(rewards.dtype).where(mask, zero)
    return advantages, (advantages + values.where(mask, zero)).where(mask, zero)


def rollout_returns(rewards: Tensor, mask: Tensor) -> Tensor:
    """R = sum_t r_t, (B,) float64, which group methods compare; it includes a penalty in the rewards."""
    return rewards.where(mask, rewards.new_zeros(())).double().sum(dim=1)


def over_tokens(per_rollout: Tensor, mask: Tensor) -> Tensor:
    """(B,) float64 to (B, A) float32: the same number at every real token, 0 elsewhere."""
    return per_rollout[:, None].where(mask, per_rollout.new_zeros(())).float()


def leave_one_out(returns: Tensor, groups: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over the other counted rollouts of the same group, whether there are any), both (B,).

    Groups may have any size and order. counted: (B,) bool; rollouts that are not counted, such as those without an
    action token, are no samples of the policy and enter no mean. float64, so that equal returns differ from their mean
    by exactly 0. Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    total, count = _group_sum(returns, groups, counted), _group_sum(counted.double(), groups, counted)
    others = count - counted.double()
    rest = total - returns.double().where(counted, total.new_zeros(()))
    return rest / others.clamp(min=1), others > 0


def group_moments(returns: Tensor, groups: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each rollout's group, both (B,) float64; see `leave_one_out`.

    Unbiased deviation; 0 for a group of one.
    """
    returns = returns.double()
    count = _group_sum(counted.double(), groups, counted)
    mean = _group_sum(returns, groups, counted) / count.clamp(min=1)
    return mean, (_group_sum((returns - mean) ** 2, groups, counted) / (count - 1).clamp(min=1)).sqrt()


def deviation(returns: Tensor, counted: Tensor) -> Tensor:
    """Unbiased standard deviation of all counted returns, a scalar in float64; 0 for fewer than two."""
    real = returns.double()[counted]
    return real.std() if len(real) > 1 else real.new_zeros(())


def _group_sum(values: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
    """Sum of the counted entries of each rollout's own group, (B,) float64."""
    values = values.double()
    values = values.where(counted, values.new_zeros(()))
    size = int(groups.max()) + 1 if groups.numel() else 0
    return values.new_zeros(size).index_add(0, groups, values)[groups]
