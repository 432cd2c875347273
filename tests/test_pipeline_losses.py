"""Losses and corrections: against slow float64 loops, against finite differences, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.objective import ActionTokens
from pipeline.algorithms import losses
from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.reinforce_baseline import ReinforceBaseline
from pipeline.algorithms.reinforce_pp import ReinforcePP
from pipeline.algorithms.rloo import RLOO
from random_inputs import random_inputs

NAN = math.nan
seeds = st.integers(0, 2**32 - 1)
NAMES = ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns")


def batch_of(seed: int, *, lengths: list[int] | None = None, kl_coef: float = 0.3) -> ActionTokens:
    """Rollouts of 0 to 6 tokens in float64; proximal and sampled log-probs differ, and more for some rollouts than for
    others.
    """
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 7, int(random.integers(1, 6))) if lengths is None else np.asarray(lengths)
    row = np.repeat(np.arange(len(sizes)), sizes)
    columns = {name: torch.from_numpy(random.normal(size=row.size)) for name in NAMES}
    apart = torch.from_numpy(random.normal(size=len(sizes)))[torch.from_numpy(row)]
    columns["proximal_logprobs"] = columns["logprobs"] + 0.5 * columns["proximal_logprobs"] + 0.5 * apart
    return ActionTokens(row=torch.from_numpy(row), rows=len(sizes), kl_coef=kl_coef, **columns)


def moved(batch: ActionTokens, seed: int, by: float = 0.4) -> Tensor:
    return batch.proximal_logprobs + by * torch.from_numpy(np.random.default_rng(seed).normal(size=len(batch.row)))


def random_algorithm(seed: int) -> Algorithm:
    """Any algorithm with any options."""
    random = np.random.default_rng(seed)

    def either(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    kind = either(PPO, GRPO, RLOO, ReinforcePP, Reinforce, ReinforceBaseline, A2C)
    options = {
        "kl_coef": either(0.0, 0.3),
        "kl_in": either("reward", "loss"),
        "kl_estimator": either("k1", "k2", "k3"),
        "entropy_coef": either(0.0, 0.1),
        "decoupled": either(False, True),
        "mask_low": either(0.0, 0.7),
        "mask_high": either(0.0, 1.4),
    }
    if options["decoupled"]:
        options |= {"importance_cap": either(0.0, 1.5), "importance_ratio": either("token", "sequence")}
    if issubclass(kind, PPO | GRPO | RLOO | ReinforcePP):
        options |= {
            "ratio": either("token", "sequence"),
            "clip_low": 0.1,
            "clip_high": 0.3,
            "dual_clip": either(0.0, 1.6),
        }
    algorithm: Algorithm = kind(**options)
    algorithm.rules()
    return algorithm


def slow_loss(algorithm: Any, new: list[float], entropy: list[float], batch: ActionTokens) -> list[float]:
    """Token by token, by the definitions."""
    row, n = batch.row.tolist(), len(batch.row)
    old, sampled, reference, advantages = (
        getattr(batch, name).tolist() for name in ("proximal_logprobs", "logprobs", "reference_logprobs", "advantages")
    )
    out = []
    for t in range(n):
        mine = [u for u in range(n) if row[u] == row[t]]
        drift = math.exp(sum(old[u] - sampled[u] for u in mine) / len(mine))
        if (algorithm.mask_low and drift < algorithm.mask_low) or (algorithm.mask_high and drift > algorithm.mask_high):
            out.append(0.0)
            continue
        a = advantages[t]
        if hasattr(algorithm, "ratio"):
            change = (
                sum(new[u] - old[u] for u in mine) / len(mine) if algorithm.ratio == "sequence" else new[t] - old[t]
            )
            r = math.exp(change)
            loss = -min(r * a, min(max(r, 1 - algorithm.clip_low), 1 + algorithm.clip_high) * a)
            if algorithm.dual_clip and a < 0:
                loss = min(loss, -algorithm.dual_clip * a)
        else:
            loss = -new[t] * a
        if algorithm.decoupled:
            weight = math.exp(
                sum(old[u] - sampled[u] for u in (mine if algorithm.importance_ratio == "sequence" else [t]))
            )
            loss *= min(weight, algorithm.importance_cap) if algorithm.importance_cap else weight
        if algorithm.kl_coef and algorithm.kl_in == "loss":
            d = new[t] - reference[t]
            loss += (
                batch.kl_coef * {"k1": d, "k2": d * d / 2, "k3": min(math.exp(-d) - 1 + d, 10)}[algorithm.kl_estimator]
            )
        out.append(loss - algorithm.entropy_coef * entropy[t])
    return out


@random_inputs(1500)
@given(seeds)
def test_every_loss_with_every_option_equals_the_loop(seed: int) -> None:
    algorithm, batch = random_algorithm(seed), batch_of(seed)
    new, entropy = moved(batch, seed), batch.values.abs()
    loss, statistics = algorithm.policy_loss(new, entropy, batch)
    assert loss.tolist() == pytest.approx(slow_loss(algorithm, new.tolist(), entropy.tolist(), batch), abs=1e-10)
    assert {len(values) for values in statistics.values()} == {len(batch.row)}
    assert not any(values.requires_grad for values in statistics.values())


@random_inputs(150)
@given(seeds)
def test_gradients_match_finite_differences(seed: int) -> None:
    """But for the sequence ratio, whose gradient is by design not that of its value."""
    algorithm, batch = random_algorithm(seed), batch_of(seed, lengths=[3, 0, 1, 2])
    if getattr(algorithm, "ratio", "token") == "sequence":
        algorithm = algorithm.model_copy(update={"ratio": "token"})
    new, entropy = moved(batch, seed).requires_grad_(), batch.values.abs().requires_grad_()
    torch.autograd.gradcheck(lambda x, h: algorithm.policy_loss(x, h, batch)[0], (new, entropy))


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_value_gradients_match_finite_differences(clip: float) -> None:
    batch = batch_of(5, lengths=[6, 6])
    values = (batch.values + torch.linspace(-0.5, 0.5, 12, dtype=torch.float64)).requires_grad_()
    torch.autograd.gradcheck(lambda v: losses.squared_error(v, batch.returns, batch.values, clip=clip)[0], (values,))


@random_inputs(300)
@given(seeds, st.sampled_from([0.0, 0.2]))
def test_the_value_loss_equals_the_loop(seed: int, clip: float) -> None:
    batch = batch_of(seed)
    new = batch.values + batch.advantages
    loss, statistics = losses.squared_error(new, batch.returns, batch.values, clip=clip)
    clipped = 0
    for v, old, target, got in zip(
        new.tolist(), batch.values.tolist(), batch.returns.tolist(), loss.tolist(), strict=True
    ):
        near = old + min(max(v - old, -clip), clip) if clip else v
        assert got == pytest.approx(0.5 * max((v - target) ** 2, (near - target) ** 2), abs=1e-12)
        clipped += (near - target) ** 2 > (v - target) ** 2
    assert statistics.get("value_clip_fraction", loss.new_zeros(1)).sum() == clipped


# What the statistics say.


def test_the_bounds_are_counted_apart() -> None:
    """Tokens of ratio .5, .5, 2, 2, 9 with A = 1, -1, 1, -1, -1: only .5 with A < 0 and 2 with A > 0 are cut off, and 9
    by the dual bound.
    """
    log_ratio = torch.tensor([0.5, 0.5, 2, 2, 9]).log()
    advantages = torch.tensor([1.0, -1, 1, -1, -1])
    loss, statistics = losses.clipped(log_ratio, advantages, low=0.2, high=0.3, dual=3.0)
    assert loss.tolist() == pytest.approx([-0.5, 0.8, -1.3, 2.0, 3.0])
    assert {name: values.tolist() for name, values in statistics.items()} == {
        "clip_fraction": [0, 1, 1, 0, 0],
        "clip_fraction_low": [0, 1, 0, 0, 0],
        "clip_fraction_high": [0, 0, 1, 0, 0],
        "ratio_bounded_fraction": [0, 0, 0, 0, 0],
        "dual_clip_fraction": [0, 0, 0, 0, 1],
    }


def test_cispo_cuts_the_weight_off_and_never_the_gradient() -> None:
    """Tokens of ratio .5, 2, 2, 9 with A = 1, 1, -1, -1, weights at most 1.3: the gradient of log pi is -weight A at
    every token, also where the clipped surrogate has none, and the loss is that times log pi.
    """
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64, requires_grad=True)
    log_ratio = torch.tensor([0.5, 2, 2, 9], dtype=torch.float64).log()
    advantages = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64)
    row = torch.tensor([0, 0, 1, 1])
    others = {name: torch.zeros(4, dtype=torch.float64) for name in NAMES}
    columns = others | {"proximal_logprobs": logprobs.detach() - log_ratio, "advantages": advantages}
    batch = ActionTokens(row=row, rows=2, kl_coef=0.0, **columns)
    algorithm = GRPO(objective="cispo", clip_high=0.3)
    loss, statistics = algorithm.policy_loss(logprobs, others["values"], batch)
    assert loss.tolist() == pytest.approx([0.5, 2.6, -3.9, -5.2])
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5, -1.3, 1.3, 1.3])
    assert statistics["clip_fraction"].tolist() == [0, 1, 1, 1]
    assert statistics["clip_fraction_high"].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("log_ratio", [100.0, -100.0])
def test_cispos_gradient_is_finite_however_far_the_policy_has_moved(log_ratio: float) -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    loss, statistics = losses.clipped_weight(torch.tensor([log_ratio]), logprobs, torch.tensor([-1.0]), high=0.3)
    [gradient] = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.item() == pytest.approx(1.3 if log_ratio > 0 else math.exp(-20))
    assert statistics["ratio_bounded_fraction"].tolist() == [1]


@given(seeds)
def test_at_a_ratio_of_one_cispos_gradient_is_the_clipped_one(seed: int) -> None:
    batch = batch_of(seed)
    found = []
    for objective in ("clipped", "cispo"):
        logprobs = batch.proximal_logprobs.clone().requires_grad_()
        loss, _ = PPO(objective=objective).surrogate(logprobs, batch)
        found.append(torch.autograd.grad(loss.sum(), logprobs)[0])
    assert torch.allclose(*found)


def test_importance_weights_by_token_and_by_sequence() -> None:
    """Of a rollout of two tokens and one of one: each token's own ratio, or the product over its rollout; the cap holds
    for either.
    """
    batch = batch_of(0, lengths=[2, 1])
    batch = replace(batch, proximal_logprobs=batch.logprobs + torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64).log())
    for options, expected in (
        ({}, [2, 3, 0.5]),
        ({"importance_ratio": "sequence"}, [6, 6, 0.5]),
        ({"importance_ratio": "sequence", "importance_cap": 4}, [4, 4, 0.5]),
    ):
        _, found = Reinforce(decoupled=True, **options).policy_loss(batch.proximal_logprobs, batch.values, batch)
        assert found["importance_weight"].tolist() == pytest.approx(expected)


def test_weights_and_dropped_rollouts_are_counted() -> None:
    """Rollouts of 2 and 1 tokens; the second is a hundred times likelier to the learner than to the sampler."""
    batch = batch_of(0, lengths=[2, 1])
    drift = torch.tensor([math.log(2), -math.log(2), math.log(100)], dtype=torch.float64)
    batch = replace(batch, proximal_logprobs=batch.logprobs + drift)
    _, statistics = Reinforce(decoupled=True, importance_cap=1.5, mask_high=10).policy_loss(
        batch.proximal_logprobs, batch.values, batch
    )
    assert statistics["importance_weight"].tolist() == pytest.approx([1.5, 0.5, 1.0])
    assert statistics["masked_fraction"].tolist() == [0, 0, 1]
    assert statistics["importance_weight_max"] is statistics["importance_weight"]


def test_the_kl_estimators() -> None:
    d = torch.tensor([0.5, -0.5])
    assert losses.kl_estimate(d, "k1").tolist() == [0.5, -0.5]
    assert losses.kl_estimate(d, "k2").tolist() == [0.125, 0.125]
    assert losses.kl_estimate(d, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5], rel=1e-5)


def test_the_gradients_that_the_estimators_document() -> None:
    """Exact expectations over a distribution of four tokens: k1 pulls nowhere, k2 is the gradient of KL(pi || ref), k3
    of KL(ref || pi).
    """
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5, 0.4], dtype=torch.float64), 0)

    def gradient(value: Callable[[Tensor], Tensor]) -> list[float]:
        logits.grad = None
        value(torch.log_softmax(logits, 0)).backward()
        assert logits.grad is not None
        return logits.grad.tolist()

    def sampled(kind: losses.KLEstimator) -> list[float]:
        return gradient(lambda pi: (pi.detach().exp() * losses.kl_estimate(pi - reference, kind)).sum())

    assert sampled("k1") == pytest.approx([0] * 4, abs=1e-12)
    assert sampled("k2") == pytest.approx(gradient(lambda pi: (pi.exp() * (pi - reference)).sum()))
    assert sampled("k3") == pytest.approx(gradient(lambda pi: (reference.exp() * (reference - pi)).sum()))


# Bounds: the values below were seen to take a whole update, or to make it NaN.


def test_k3_of_a_token_that_the_reference_finds_far_likelier_is_bounded() -> None:
    """log pi = -12 and log ref = -0.5 gave 9.9e4, and a gradient as large; at -100 it was infinite.

    At k3's bound there is no gradient.
    """
    new = torch.tensor([-12.0, -100.0, -1.0], requires_grad=True)
    kl = losses.kl_estimate(new - torch.tensor([-0.5, -0.5, -0.5]), "k3")
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([10, 10, math.exp(0.5) - 1.5], rel=1e-6)
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0, 0, 1 - math.exp(0.5)], rel=1e-6)


@pytest.mark.parametrize(("kind", "bound"), [("k1", 20.0), ("k2", 200.0), ("k3", 20 - 1 + math.exp(-20))])
def test_every_estimates_log_ratio_is_bounded(kind: losses.KLEstimator, bound: float) -> None:
    expected = min(bound, 10.0) if kind == "k3" else bound
    assert losses.kl_estimate(torch.tensor([90.0, 21.0]), kind).tolist() == pytest.approx([expected] * 2)
    assert losses.kl_out_of_bounds(torch.tensor([90.0, 19.0, 0.5, -2.0]), kind).tolist() == [
        True,
        kind == "k3",
        False,
        False,
    ]
    assert losses.kl_estimate(torch.tensor([NAN]), kind).isnan().all(), "a NaN must be noticed"


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_would_overflow_has_a_finite_gradient(ratio: str, advantage: float) -> None:
    """exp(100) is infinite in float32: the clipped loss was finite and its gradient 0 * inf."""
    batch = ActionTokens(row=torch.tensor([0]), rows=1, **dict.fromkeys(NAMES, torch.tensor([-100.0])))
    batch = replace(batch, advantages=torch.tensor([advantage]))
    new = torch.tensor([-0.0], requires_grad=True)
    loss, statistics = PPO(ratio=ratio).policy_loss(new, batch.values, batch)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert new.grad is not None
    assert new.grad.tolist() == [0]
    assert statistics["ratio_bounded_fraction"].tolist() == [1]
    assert all(torch.isfinite(values).all() for values in statistics.values())


def test_an_importance_weight_that_would_overflow_is_bounded() -> None:
    batch = ActionTokens(row=torch.tensor([0]), rows=1, **dict.fromkeys(NAMES, torch.tensor([-100.0])))
    new = torch.tensor([-0.5], requires_grad=True)
    loss, statistics = Reinforce(decoupled=True).policy_loss(
        new, batch.values, replace(batch, proximal_logprobs=torch.tensor([-0.5]))
    )
    loss.sum().backward()
    assert statistics["importance_weight"].tolist() == pytest.approx([math.exp(20)])
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()


def test_a_penalty_that_is_cut_off_is_counted() -> None:
    batch = ActionTokens(
        row=torch.tensor([0, 0]), rows=1, kl_coef=0.1, **dict.fromkeys(NAMES, torch.tensor([-1.0, -0.5]))
    )
    _, statistics = GRPO(kl_coef=0.1).policy_loss(torch.tensor([-1.0, -12.0]), batch.values, batch)
    assert statistics["kl_bounded_fraction"].tolist() == [0, 1]
    assert statistics["kl_loss"].tolist() == [0, 10]


# Identities.


@random_inputs(100)
@given(seeds)
def test_at_a_ratio_of_one_the_clipped_gradient_is_the_plain_one(seed: int) -> None:
    batch = batch_of(seed)
    gradients = []
    for algorithm in (PPO(), PPO(dual_clip=3), Reinforce()):
        new = batch.proximal_logprobs.clone().requires_grad_()
        algorithm.policy_loss(new, new.detach(), batch)[0].sum().backward()
        gradients.append(new.grad)
    assert torch.allclose(gradients[0], gradients[2])
    assert torch.allclose(gradients[1], gradients[2])


@random_inputs(100)
@given(seeds)
def test_a_sequence_of_one_token_has_the_tokens_ratio(seed: int) -> None:
    batch = batch_of(seed, lengths=[1] * 7)
    new = moved(batch, seed)
    token, sequence = (GRPO(ratio=ratio).policy_loss(new, new, batch)[0] for ratio in ("token", "sequence"))
    assert torch.equal(token, sequence)


def test_the_sequence_ratios_gradient_is_the_papers() -> None:
    """Zheng et al.

    2025, eq. 10: sum_i s_i A_i / |y_i| sum_t grad log pi_t, over the number of rollouts, where nothing is clipped.
    """
    batch = batch_of(3, lengths=[4, 1, 2])
    batch = replace(batch, advantages=torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)[batch.row])
    new = moved(batch, 3, by=0.05).requires_grad_()
    weights = 1 / (3 * batch.row.bincount()[batch.row])  # sequence_mean
    (weights * GRPO(ratio="sequence").policy_loss(new, new.detach(), batch)[0]).sum().backward()
    change = (new - batch.proximal_logprobs).detach()
    for i, a in enumerate([1.5, -0.5, 2.0]):
        mine = batch.row == i
        s = change[mine].mean().exp()
        assert new.grad is not None
        assert new.grad[mine].tolist() == pytest.approx([float(-s * a / (3 * mine.sum()))] * int(mine.sum()))


def test_a_sequence_ratio_pushes_each_token_by_its_own_advantage() -> None:
    """GSPO-token at a ratio of 1: advantages +1 and -1 in one rollout have gradients -1/2 and +1/2, not
    their mean, 0.
    """
    old = torch.tensor([-1.0, -2.0])
    batch = ActionTokens(row=torch.tensor([0, 0]), rows=1, **dict.fromkeys(NAMES, old))
    batch = replace(batch, advantages=torch.tensor([1.0, -1.0]))
    new = old.clone().requires_grad_()
    loss, _ = PPO(ratio="sequence").policy_loss(new, old, batch)
    loss.mean().backward()
    assert new.grad is not None
    assert new.grad.tolist() == [-0.5, 0.5]


@random_inputs(100)
@given(seeds)
def test_the_sequence_ratios_gradient_is_the_ratio_times_the_tokens_advantage(seed: int) -> None:
    """Wherever the bounds do not hold it: the rollout's ratio s, the token's own advantage and log-prob."""
    batch = batch_of(seed, lengths=[3, 1, 4])
    new = moved(batch, seed, by=0.05).requires_grad_()
    PPO(ratio="sequence", clip_low=1, clip_high=9).policy_loss(new, new.detach(), batch)[0].sum().backward()
    change = (new - batch.proximal_logprobs).detach()
    s = torch.stack([change[batch.row == i].mean().exp() for i in batch.row])
    assert new.grad is not None
    assert torch.allclose(new.grad, -s * batch.advantages)


@random_inputs(100)
@given(seeds)
def test_decoupled_is_coupled_where_the_learner_agrees_with_the_sampler(seed: int) -> None:
    batch = batch_of(seed)
    batch = replace(batch, logprobs=batch.proximal_logprobs)
    new = moved(batch, seed)
    coupled, decoupled, capped, masked = (
        PPO(**options).policy_loss(new, new, batch)[0]
        for options in (
            {},
            {"decoupled": True},
            {"decoupled": True, "importance_cap": 2.0},
            {"mask_low": 0.9, "mask_high": 1.1},
        )
    )
    assert torch.equal(coupled, decoupled)
    assert torch.equal(coupled, capped)
    assert torch.equal(coupled, masked)


@random_inputs(200)
@given(seeds, st.sampled_from([NAN, 1e6]))
def test_a_dropped_rollout_leaves_no_trace(seed: int, wild: float) -> None:
    """Whatever stands in it, infinite ratios and NaN included: no loss, no gradient, and the others are as they would
    be without it.
    """
    good, new_good = batch_of(seed, lengths=[2, 3]), moved(batch_of(seed, lengths=[2, 3]), seed)
    good = replace(good, proximal_logprobs=good.logprobs)
    columns = {
        name: torch.cat(
            [getattr(good, name), torch.full((2,), wild if name != "logprobs" else -1.0, dtype=torch.float64)]
        )
        for name in NAMES
    }
    both = ActionTokens(row=torch.cat([good.row, torch.tensor([2, 2])]), rows=3, kl_coef=0.3, **columns)
    for kind in (GRPO, RLOO, A2C):
        options: dict[str, Any] = {"ratio": "sequence"} if kind is RLOO else {}
        algorithm = kind(
            mask_low=0.5,
            mask_high=2,
            decoupled=True,
            kl_coef=0.3,
            kl_in="loss",
            kl_estimator="k3",
            entropy_coef=0.1,
            **options,
        )
        new = torch.cat([new_good, torch.tensor([-1e4, 1e4])]).requires_grad_()
        entropy = torch.cat([good.values, torch.ones(2)]).detach().requires_grad_()
        loss, statistics = algorithm.policy_loss(new, entropy, both)
        loss.sum().backward()
        expected, _ = algorithm.policy_loss(new_good, good.values, good)
        assert torch.equal(loss[:5], expected)
        assert loss[5:].tolist() == [0, 0]
        assert new.grad is not None and entropy.grad is not None
        assert new.grad[5:].tolist() == entropy.grad[5:].tolist() == [0, 0]
        assert torch.isfinite(new.grad).all()
        assert all(torch.isfinite(values).all() for values in statistics.values())
        assert statistics["masked_fraction"].tolist() == [0] * 5 + [1, 1]


def test_nobody_is_dropped_unseen() -> None:
    """A NaN log-prob must reach the gradient, where it is noticed, unless masking was asked for."""
    batch = batch_of(1, lengths=[2])
    assert (
        PPO()
        .policy_loss(
            batch.proximal_logprobs * NAN, batch.values, replace(batch, proximal_logprobs=batch.proximal_logprobs * NAN)
        )[0]
        .isnan()
        .all()
    )


@random_inputs(100)
@given(seeds)
def test_a_loss_does_not_depend_on_the_order_of_rollouts(seed: int) -> None:
    algorithm, batch = random_algorithm(seed), batch_of(seed)
    new, entropy = moved(batch, seed), batch.values.abs()
    order = torch.cat([(batch.row == i).nonzero()[:, 0] for i in reversed(range(batch.rows))])
    turned = replace(
        batch, row=batch.rows - 1 - batch.row[order], **{name: getattr(batch, name)[order] for name in NAMES}
    )
    straight = algorithm.policy_loss(new, entropy, batch)[0]
    assert torch.allclose(algorithm.policy_loss(new[order], entropy[order], turned)[0], straight[order], atol=1e-12)


# What does not go together.


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            PPO(kl_target=6.0),
            r"^algorithm\.kl_coef: must be > 0 when algorithm\.kl_target is 6, got 0; .*remove kl_target$",
        ),
        (
            A2C(importance_cap=2.0),
            r"^algorithm\.decoupled: must be true when algorithm\.importance_cap is 2, got false; .*remove "
            r"importance_cap$",
        ),
        (
            GRPO(mask_low=1.0, mask_high=0.5),
            r"^algorithm\.mask_high: must be above algorithm\.mask_low = 1, got 0\.5; no rollout would be left$",
        ),
        (
            GRPO(importance_ratio="sequence"),
            r"^algorithm\.decoupled: must be true when algorithm\.importance_ratio is 'sequence', got false; .*",
        ),
        (
            GRPO(dual_clip=1.1),
            r"^algorithm\.dual_clip: must be above 1 \+ algorithm\.clip_high = 1\.2, got 1\.1; 3 is usual, 0 turns it "
            r"off$",
        ),
        (
            GRPO(objective="cispo", dual_clip=3.0),
            r"^algorithm\.dual_clip: must be left out when algorithm\.objective is cispo, got 3; it belongs to .*$",
        ),
        (
            PPO(objective="cispo", ratio="sequence"),
            r"^algorithm\.ratio: must be left out when algorithm\.objective is cispo, got sequence; it belongs to .*$",
        ),
        (
            GRPO(std=False, std_over="batch"),
            r"^algorithm\.std: must be true when algorithm\.std_over is batch, got false; .*remove std_over$",
        ),
    ],
)
def test_options_that_do_not_go_together(algorithm: Algorithm, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm.rules()


def test_who_needs_the_learners_own_log_probs() -> None:
    assert not PPO().needs_proximal
    assert all(
        PPO(**options).needs_proximal for options in ({"decoupled": True}, {"mask_low": 0.5}, {"mask_high": 2.0})
    )
