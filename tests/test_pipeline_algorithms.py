"""Estimators, losses and the KL controller: golden numbers published elsewhere, and slow float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.objective import ActionTokens
from pipeline.algorithms.base import Trajectories
from pipeline.algorithms.estimators import discounted_returns, gae, token_rewards, whiten
from pipeline.algorithms.kl_controller import KLController
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce

NAN = math.nan


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def real(n: int) -> torch.Tensor:
    return torch.ones(1, n, dtype=torch.bool)


@pytest.mark.parametrize(
    ("gamma", "lam", "returns"),
    [(1.0, 1.0, [6, 5, 3]), (0.5, 1.0, [2.75, 3.5, 3]), (1.0, 0.5, [3.625, 4.25, 3])],
)
def test_gae_golden_returns(gamma: float, lam: float, returns: list[float]) -> None:
    assert gae(row(1, 2, 3), row(0.5, 1, 1.5), real(3), gamma=gamma, lam=lam)[1].tolist() == [returns]


def test_gae_with_lambda_0_is_the_one_step_advantage() -> None:
    assert gae(row(0, 0, 5), row(1, 2, 3), real(3), gamma=1, lam=0)[0].tolist() == [[1, 1, 2]]


def test_discounted_returns_golden() -> None:
    assert discounted_returns(row(1, 2, 3), real(3), gamma=0.5).tolist() == [[2.75, 3.5, 3]]


@pytest.mark.parametrize(("unbiased", "first", "last"), [(False, 0.0508, 3.1492), (True, 0.1394, 3.0606)])
def test_whitening_golden(unbiased: bool, first: float, last: float) -> None:
    values = torch.arange(12, 21).reshape(3, 3) / 10
    out = whiten(values, torch.ones(3, 3, dtype=torch.bool), shift_mean=False, unbiased=unbiased)
    assert out[0, 0].item() == pytest.approx(first, abs=1e-4)
    assert out[2, 2].item() == pytest.approx(last, abs=1e-4)


def test_whitening_shifts_to_mean_0_and_variance_1() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    out = whiten(torch.tensor([[1.0, 2.0, NAN], [5.0, -3.0, 0.5]]), mask)
    assert out[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert out[mask].var().item() == pytest.approx(1, abs=1e-5)
    assert out[0, 2] == 0


def test_whitening_one_or_no_value() -> None:
    assert whiten(row(7), real(1)).tolist() == [[0]]
    assert whiten(row(7), ~real(1)).tolist() == [[0]]


def test_kl_controller_golden() -> None:
    assert KLController(coef=0.2, target=0.1, horizon=100).update(0.2, 10).coef == pytest.approx(0.204, abs=1e-12)


def test_kl_controller_without_target_is_fixed() -> None:
    assert KLController(coef=0.2, target=0, horizon=100).update(50.0, 10).coef == 0.2


def test_token_rewards_put_the_score_on_the_last_action_token() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    kl = torch.tensor([[0.1, 0.2, NAN], [0.0, 0.0, 0.5], [NAN, NAN, NAN]])
    out = token_rewards(torch.tensor([1.0, 2.0, 9.0]), kl, mask, kl_coef=2.0)
    assert torch.allclose(out, torch.tensor([[-0.2, 0.6, 0], [0, 0, 1.0], [0, 0, 0]]))


def loop_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition, term by term, in float64."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


number = st.floats(-5, 5, width=32)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(number, number), max_size=8), min_size=1, max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_equals_the_loop_on_ragged_rows_with_nan_in_the_padding(rows: list[list[tuple[float, float]]], gamma: float, lam: float) -> None:
    width = max(len(r) for r in rows) + 1
    mask = torch.tensor([[t < len(r) for t in range(width)] for r in rows])
    rewards, values = (torch.tensor([[pair[i] for pair in r] + [NAN] * (width - len(r)) for r in rows], dtype=torch.float64) for i in (0, 1))
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, r in enumerate(rows):
        expected = loop_gae([a for a, _ in r], [v for _, v in r], gamma, lam)
        assert advantages[i, : len(r)].tolist() == pytest.approx(expected, abs=1e-9)
        assert returns[i, : len(r)].tolist() == pytest.approx([a + v for a, (_, v) in zip(expected, r, strict=True)], abs=1e-9)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def tokens(n: int, seed: int = 0) -> ActionTokens:
    g = torch.Generator().manual_seed(seed)
    columns = [torch.randn(n, generator=g, dtype=torch.float64) for _ in range(6)]
    names = ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns")
    return ActionTokens(row=torch.arange(n) % 2, rows=2, **dict(zip(names, columns, strict=True)))


def test_ppo_policy_loss_is_the_clipped_surrogate() -> None:
    batch = tokens(200)
    new = batch.proximal_logprobs + torch.linspace(-0.6, 0.6, 200, dtype=torch.float64)
    loss, statistics = PPO(clip_low=0.1, clip_high=0.3).policy_loss(new, new * 0, batch)
    clipped = 0
    for n, old, a, got in zip(new.tolist(), batch.proximal_logprobs.tolist(), batch.advantages.tolist(), loss.tolist(), strict=True):
        ratio = math.exp(n - old)
        bounded = min(max(ratio, 0.9), 1.3)
        assert got == pytest.approx(-min(ratio * a, bounded * a), abs=1e-12)
        clipped += bounded * a < ratio * a
    assert statistics["clip_fraction"].sum().item() == clipped > 0


def test_ppo_value_loss_is_clipped() -> None:
    batch = tokens(200, seed=1)
    new = batch.values + torch.linspace(-1, 1, 200, dtype=torch.float64)
    loss, _ = PPO(value_clip=0.2).value_loss(new, batch)
    for v, old, target, got in zip(new.tolist(), batch.values.tolist(), batch.returns.tolist(), loss.tolist(), strict=True):
        near = old + min(max(v - old, -0.2), 0.2)
        assert got == pytest.approx(0.5 * max((v - target) ** 2, (near - target) ** 2), abs=1e-12)
    plain, _ = PPO(value_clip=0).value_loss(new, batch)
    assert torch.allclose(plain, 0.5 * (new - batch.returns) ** 2)


@pytest.mark.parametrize("algorithm", [PPO(), Reinforce()], ids=lambda a: a.name)
def test_policy_gradients_match_finite_differences(algorithm: PPO | Reinforce) -> None:
    batch = tokens(12, seed=3)
    new = (batch.proximal_logprobs + 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).requires_grad_()
    torch.autograd.gradcheck(lambda x: algorithm.policy_loss(x, x.detach() * 0, batch)[0], (new,))


def test_value_gradients_match_finite_differences() -> None:
    batch = tokens(12, seed=5)
    new = (batch.values + 0.5).requires_grad_()
    torch.autograd.gradcheck(lambda v: PPO().value_loss(v, batch)[0], (new,))


def test_reinforce_is_ppos_first_gradient_without_values() -> None:
    """With V = 0, lambda = 1 and a ratio of 1, PPO's gradient is REINFORCE's."""
    batch = Trajectories(rewards=row(0, 0.5, 2), values=row(0, 0, 0), scores=torch.tensor([2.0]), groups=torch.tensor([0]), mask=real(3))
    ppo, reinforce = PPO(lam=1.0, gamma=0.9), Reinforce(gamma=0.9)
    a, b = ppo.advantages(batch).advantages, reinforce.advantages(batch).advantages
    assert torch.equal(a, b)
    actions = tokens(3)
    gradients = []
    for algorithm, advantages in ((ppo, a), (reinforce, b)):
        new = actions.proximal_logprobs.clone().requires_grad_()
        at = ActionTokens(row=actions.row, rows=2, logprobs=actions.logprobs, proximal_logprobs=actions.proximal_logprobs, reference_logprobs=actions.logprobs,
                          values=actions.values, advantages=advantages[0].double(), returns=actions.returns)  # fmt: skip
        algorithm.policy_loss(new, new * 0, at)[0].sum().backward()
        gradients.append(new.grad)
    assert torch.allclose(gradients[0], gradients[1])


def test_needs_are_declared() -> None:
    assert PPO().needs_critic
    assert not Reinforce().needs_critic
    assert not PPO(kl_coef=0).needs_reference
    assert Reinforce(kl_coef=0.1).needs_reference
