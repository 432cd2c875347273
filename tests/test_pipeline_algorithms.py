"""Estimators, advantages and the KL controller: golden numbers published elsewhere, and slow float64 loops.

Losses: test_pipeline_losses.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from actors.objective import ActionTokens
from pipeline.algorithms import registry
from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.base import Advantages, Algorithm, Trajectories
from pipeline.algorithms.estimators import discounted_returns, gae, n_step, token_rewards, whiten
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.kl_controller import KLController
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.probe import check_learns
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.reinforce_baseline import ReinforceBaseline
from pipeline.algorithms.reinforce_pp import ReinforcePP
from pipeline.algorithms.rloo import RLOO
from random_inputs import random_inputs
from readme_example import readme_example

NAN = math.nan
seeds = st.integers(0, 2**32 - 1)


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


def test_whitening_leaves_nothing_of_equal_values() -> None:
    """In float32 their mean differs from them by rounding, which became 0.773 each."""
    assert not whiten(torch.full((10, 100), 1000.1), torch.ones(10, 100, dtype=torch.bool)).any()
    assert whiten(torch.full((10, 100), 1000.1), torch.ones(10, 100, dtype=torch.bool)).dtype == torch.float32


def test_kl_controller_never_goes_below_zero() -> None:
    """It was -0.21, a reward for leaving the reference."""
    assert KLController(coef=0.2, target=6, horizon=100).update(0, 1024).coef == 0


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


@random_inputs(300)
@given(
    rows=st.lists(st.lists(st.tuples(number, number), max_size=8), min_size=1, max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_equals_the_loop_on_ragged_rows_with_nan_in_the_padding(
    rows: list[list[tuple[float, float]]], gamma: float, lam: float
) -> None:
    width = max(len(r) for r in rows) + 1
    mask = torch.tensor([[t < len(r) for t in range(width)] for r in rows])
    rewards, values = (
        torch.tensor([[pair[i] for pair in r] + [NAN] * (width - len(r)) for r in rows], dtype=torch.float64)
        for i in (0, 1)
    )
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, r in enumerate(rows):
        expected = loop_gae([a for a, _ in r], [v for _, v in r], gamma, lam)
        assert advantages[i, : len(r)].tolist() == pytest.approx(expected, abs=1e-9)
        assert returns[i, : len(r)].tolist() == pytest.approx(
            [a + v for a, (_, v) in zip(expected, r, strict=True)], abs=1e-9
        )
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@random_inputs(50)
@given(seeds, st.sampled_from([1.0, 0.99]), st.sampled_from([1.0, 0.95, 0.0]))
def test_gae_is_the_column_by_column_recursion_to_the_bit(seed: int, gamma: float, lam: float) -> None:
    """The layout in memory is for speed alone."""
    batch = step_of(seed).batch
    zero = batch.rewards.new_zeros(())
    rewards, values = batch.rewards.where(batch.mask, zero), batch.values.where(batch.mask, zero)
    expected = torch.zeros_like(rewards)
    running = following = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running).where(batch.mask[:, t], zero)
        expected[:, t], following = running, values[:, t]
    assert torch.equal(gae(batch.rewards, batch.values, batch.mask, gamma=gamma, lam=lam)[0], expected)


def test_n_step_of_a_long_rollout_keeps_what_is_small() -> None:
    """1 a token over 4,096 tokens, looked at 4 tokens at a time: 4, exactly, though the sums that it is a difference of
    reach 4,096.
    """
    rewards, real_tokens = torch.full((1, 4096), 1.0), real(4096)
    advantages, _ = n_step(rewards, torch.zeros(1, 4096), real_tokens, gamma=1.0, steps=4)
    assert advantages[0].tolist() == [4.0] * 4093 + [3, 2, 1]


def padded(rows: list[list[float]], width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Rows side by side, NaN in the padding."""
    return torch.tensor([r + [NAN] * (width - len(r)) for r in rows], dtype=dtype)


@dataclass(frozen=True)
class Step:
    """A ragged step in plain lists: what a slow loop takes. `batch`: the same as tensors."""

    rewards: list[list[float]]
    values: list[list[float]]
    groups: list[int]
    batch: Trajectories


def step_of(seed: int) -> Step:
    """1 to 9 rollouts of 0 to 7 tokens in groups of any size and order; NaN at every place that is not real."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 10))
    sizes = random.integers(0, 8, count) * (random.random(count) < 0.85)
    width = int(sizes.max()) + 1
    rewards, values = ([random.normal(size=n).astype(np.float32).tolist() for n in sizes] for _ in range(2))
    groups = random.integers(0, 4, count)
    batch = Trajectories(
        rewards=padded(rewards, width, torch.float32),
        values=padded(values, width, torch.float32),
        scores=torch.full((count,), NAN),
        groups=torch.from_numpy(np.unique(groups, return_inverse=True)[1]),
        mask=torch.tensor([[t < n for t in range(width)] for n in sizes]),
    )
    return Step(rewards, values, groups.tolist(), batch)


def loop_returns(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def loop_n_step(rewards: list[float], values: list[float], gamma: float, n: int) -> list[float]:
    size = len(rewards)
    out = []
    for t in range(size):
        total = sum(gamma**k * rewards[t + k] for k in range(n) if t + k < size)
        out.append(total + (gamma**n * values[t + n] if t + n < size else 0.0) - values[t])
    return out


def others(step: Step, i: int, returns: list[float]) -> list[float]:
    """Returns of the other rollouts of i's group that have an action."""
    return [returns[j] for j in range(len(returns)) if j != i and step.groups[j] == step.groups[i] and step.rewards[j]]


def loop_advantages(algorithm: Any, step: Step) -> list[list[float]]:
    """By the definitions, a rollout and a token at a time."""
    out = []
    gamma = getattr(algorithm, "gamma", 1.0)
    every = [loop_returns(r, gamma) for r in step.rewards]
    totals = [sum(r) for r in step.rewards]
    starts = [g[0] if g else NAN for g in every]
    for i, (r, v, g) in enumerate(zip(step.rewards, step.values, every, strict=True)):
        match algorithm:
            case PPO():
                row = loop_gae(r, v, gamma, algorithm.lam)
            case A2C():
                row = loop_n_step(r, v, gamma, algorithm.n_steps)
            case ReinforceBaseline(baseline="value"):
                row = [a - b for a, b in zip(g, v, strict=True)]
            case ReinforceBaseline(baseline="batch_mean"):
                row = [a - statistics.fmean(x for x in starts if x == x) for a in g]
            case ReinforceBaseline():
                rest = others(step, i, starts)
                row = [a - statistics.fmean(rest) if rest else 0.0 for a in g]
            case RLOO():
                rest = others(step, i, totals)
                row = [totals[i] - statistics.fmean(rest) if rest else 0.0] * len(r)
            case GRPO(std_over="batch"):
                counted = [total for total, rewards in zip(totals, step.rewards, strict=True) if rewards]
                spread = statistics.stdev(counted) if len(counted) > 1 else 0.0
                row = [(totals[i] - statistics.fmean([totals[i], *others(step, i, totals)])) / (spread + 1e-6)] * len(r)
            case GRPO():
                group = [totals[i], *others(step, i, totals)]
                spread = statistics.stdev(group) if len(group) > 1 else 0.0
                row = [(totals[i] - statistics.fmean(group)) / (spread + 1e-6 if algorithm.std else 1)] * len(r)
            case _:
                row = g
        out.append(row)
    return out


KINDS = [
    PPO(gamma=0.9, lam=0.8),
    Reinforce(gamma=0.9),
    ReinforcePP(),
    ReinforceBaseline(baseline="value", gamma=0.9),
    ReinforceBaseline(baseline="batch_mean", gamma=0.9),
    ReinforceBaseline(baseline="leave_one_out", gamma=0.9),
    *(A2C(n_steps=n, gamma=0.9) for n in (1, 2, 3, 50)),
    RLOO(),
    GRPO(),
    GRPO(std=False),
    GRPO(std_over="batch"),
]


@random_inputs(300)
@given(seeds)
def test_every_algorithms_advantages_equal_the_loop(seed: int) -> None:
    step = step_of(seed)
    for algorithm in KINDS:
        found = algorithm.advantages(step.batch)
        for i, expected in enumerate(loop_advantages(algorithm, step)):
            assert found.advantages[i, : len(expected)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5), (
                algorithm
            )
        for column in (found.advantages, found.returns):
            assert column.dtype == torch.float32
            assert not column[~step.batch.mask].any(), algorithm
            assert torch.isfinite(column).all(), algorithm


@random_inputs(150)
@given(seeds)
def test_advantages_do_not_depend_on_the_order_of_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    after = torch.from_numpy(rng.normal(size=len(step_of(seed).batch.groups)).astype(np.float32))
    step = dataclasses.replace(step_of(seed).batch, values_after=after)
    order = torch.from_numpy(rng.permutation(len(step.groups)))
    turned = Trajectories(**{name: getattr(step, name)[order] for name in Trajectories.__dataclass_fields__})
    for algorithm in KINDS:
        straight, again = algorithm.advantages(step).advantages, algorithm.advantages(turned).advantages
        assert torch.allclose(again, straight[order], rtol=1e-5, atol=1e-6), algorithm


@random_inputs(300)
@given(seeds, st.booleans(), st.booleans())
def test_whitening_equals_the_loop(seed: int, shift_mean: bool, unbiased: bool) -> None:
    step = step_of(seed)
    every = [r for row in step.rewards for r in row]
    out = whiten(step.batch.rewards.double(), step.batch.mask, shift_mean=shift_mean, unbiased=unbiased)
    mean = statistics.fmean(every) if every else 0.0
    spread = (statistics.variance(every) if unbiased else statistics.pvariance(every)) if len(every) > 1 else 0.0
    expected = [(r - mean) / math.sqrt(spread + 1e-8) + (0 if shift_mean else mean) for r in every]
    assert out[step.batch.mask].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert not out[~step.batch.mask].any()


@random_inputs(300)
@given(seeds)
def test_token_rewards_equal_the_loop(seed: int) -> None:
    step = step_of(seed)
    scores = torch.arange(1.0, len(step.rewards) + 1)
    out = token_rewards(scores, step.batch.rewards, step.batch.mask, kl_coef=0.5)
    for i, kl in enumerate(step.rewards):
        expected = [-0.5 * k + (i + 1 if t == len(kl) - 1 else 0) for t, k in enumerate(kl)]
        assert out[i].tolist() == pytest.approx([*expected, *[0] * (out.shape[1] - len(kl))], abs=1e-6)


def grouped(rewards: dict[int, list[float]]) -> Trajectories:
    """One-token rollouts; group -> rewards."""
    flat = [(g, r) for g, of_group in rewards.items() for r in of_group]
    return Trajectories(
        rewards=torch.tensor([[r] for _, r in flat]),
        values=torch.zeros(len(flat), 1),
        scores=torch.tensor([r for _, r in flat]),
        groups=torch.tensor([g for g, _ in flat]),
        mask=torch.ones(len(flat), 1, dtype=torch.bool),
    )


def test_rloo_golden() -> None:
    """Groups of unequal size; one left alone has nothing to be compared with."""
    batch = grouped({0: [6, 3], 1: [9, 12], 2: [1]})
    assert RLOO().advantages(batch).advantages.tolist() == [[3], [-3], [-3], [3], [0]]
    assert ReinforceBaseline(baseline="leave_one_out").advantages(batch).advantages.tolist() == [
        [3],
        [-3],
        [-3],
        [3],
        [0],
    ]


def test_grpo_golden() -> None:
    batch = grouped({0: [6, 3], 1: [9, 12]})
    assert GRPO(std=False).advantages(batch).advantages.tolist() == [[1.5], [-1.5], [-1.5], [1.5]]
    assert GRPO().advantages(batch).advantages[:, 0].tolist() == pytest.approx(
        [math.sqrt(0.5), -math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5)], rel=1e-5
    )


def test_grpo_with_the_deviation_of_the_step_golden() -> None:
    """6, 3, 9 and 12 have the unbiased variance 15, whatever their groups; a close group keeps its small advantages."""
    batch = grouped({0: [6, 3], 1: [9, 12]})
    expected = [1.5 / math.sqrt(15) * sign for sign in (1, -1, -1, 1)]
    algorithm = GRPO(std_over="batch")
    assert algorithm.advantages(batch).advantages[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    close = algorithm.advantages(grouped({0: [1, 1.001], 1: [0, 10]})).advantages[:, 0]
    assert close[:2].abs().max() < 1e-3
    assert GRPO().advantages(grouped({0: [1, 1.001], 1: [0, 10]})).advantages[0, 0].abs() > 0.5
    assert not algorithm.advantages(grouped({0: [4]})).advantages.any(), "one sample is its own mean"


@pytest.mark.parametrize(
    "algorithm",
    [GRPO(), GRPO(std=False), GRPO(std_over="batch"), RLOO(), ReinforceBaseline(baseline="leave_one_out")],
    ids=str,
)
def test_a_group_of_equal_returns_has_no_advantage_to_the_bit(algorithm: Any) -> None:
    """In float32 their mean may differ from them by rounding, which dividing by a tiny deviation would blow up."""
    batch = grouped({g: [1000.1 / (g + 3)] * (g + 1) for g in range(12)})
    assert not algorithm.advantages(batch).advantages.any()


def test_a_rollout_without_an_action_is_in_no_baseline() -> None:
    alone = Trajectories(
        rewards=torch.tensor([[4.0], [NAN], [2.0]]),
        values=torch.zeros(3, 1),
        scores=torch.tensor([4.0, 50.0, 2.0]),
        groups=torch.zeros(3, dtype=torch.int64),
        mask=torch.tensor([[True], [False], [True]]),
    )
    for algorithm, expected in (
        (RLOO(), [2, 0, -2]),
        (GRPO(std=False), [1, 0, -1]),
        (ReinforceBaseline(baseline="batch_mean"), [1, 0, -1]),
    ):
        assert algorithm.advantages(alone).advantages[:, 0].tolist() == expected


@random_inputs(200)
@given(seeds, st.sampled_from([1.0, 0.9]))
def test_identities(seed: int, gamma: float) -> None:
    batch = step_of(seed).batch
    zero = batch.rewards.new_zeros(())

    def same(a: Any, b: Any, factor: float = 1.0) -> None:
        assert torch.allclose(a.advantages(batch).advantages, factor * b.advantages(batch).advantages, atol=1e-5), (
            a,
            b,
        )

    same(A2C(gamma=gamma), PPO(gamma=gamma, lam=0.0))
    same(A2C(gamma=gamma, n_steps=100), ReinforceBaseline(baseline="value", gamma=gamma))
    same(A2C(gamma=gamma, n_steps=100), PPO(gamma=gamma, lam=1.0))
    to_go = discounted_returns(batch.rewards, batch.mask, gamma=gamma)
    n_step = A2C(gamma=gamma, n_steps=100).advantages(batch)
    assert torch.allclose(n_step.advantages, to_go - batch.values.where(batch.mask, zero), atol=1e-5)
    assert torch.allclose(n_step.returns, to_go, atol=1e-5)
    same(ReinforcePP(gamma=gamma), Reinforce(gamma=gamma))


@random_inputs(100)
@given(st.lists(st.tuples(number, number), min_size=1, max_size=6))
def test_without_std_two_samples_are_half_of_rloo(pairs: list[tuple[float, float]]) -> None:
    batch = grouped({g: list(pair) for g, pair in enumerate(pairs)})
    assert torch.allclose(GRPO(std=False).advantages(batch).advantages, RLOO().advantages(batch).advantages / 2)


def test_the_readmes_example_is_found_by_its_import_path_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a recipe would name it. The whole command runs it in test_pipeline_run.py."""
    (tmp_path / "my_algorithms.py").write_text(readme_example())
    monkeypatch.syspath_prepend(tmp_path)
    section = {"name": "my_algorithms:Raft", "aggregation": "constant", "margin": 0.0}
    raft = TypeAdapter(registry.AnyAlgorithm).validate_python(section)
    assert type(raft) is registry.algorithm_class("my_algorithms:Raft")
    assert section.items() <= raft.model_dump().items()
    assert raft.min_group_size == 2, (
        "or its gradient would be 0 at every step of a recipe that leaves batch.group_size at 1"
    )
    with pytest.raises(
        ValueError,
        match=r"^batch\.group_size: must let algorithm 'my_algorithms:Raft' compare samples, got 1 with batch\.prompts "
        r"64: every advantage would be 0",
    ):
        check_learns(raft, prompts=64, group_size=1, max_new_tokens=9)
    check_learns(raft, prompts=64, group_size=2, max_new_tokens=9)
    batch = grouped({0: [6, 3], 1: [9, 12], 2: [1]})
    advantages = raft.advantages(batch).advantages[:, 0]
    assert advantages.tolist() == [1, 0, 0, 1, 0]
    new = torch.full((5,), -2.0, requires_grad=True)
    old = torch.full((5,), -2.0)
    names = ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "returns")
    actions = ActionTokens(row=torch.arange(5), rows=5, advantages=advantages, **dict.fromkeys(names, old))
    loss, _ = raft.policy_loss(new, old, actions)
    loss.sum().backward()
    assert loss.tolist() == [2, 0, 0, 2, 0]
    assert new.grad is not None
    assert new.grad.tolist() == [-1, 0, 0, -1, 0]
    strict = raft.model_copy(update={"margin": 1.0})  # two samples are 0.71 deviations from their mean
    assert not strict.advantages(batch).advantages.any()


class Derived(PPO):
    """Of a user's who changes one thing of PPO."""


class Unfinished(Algorithm):
    """An algorithm that computes nothing."""


class Labelled(Reinforce):
    """An algorithm with a name of its own."""

    name: Literal["labelled"] = "labelled"


def test_an_algorithm_that_is_given_as_an_object_gets_the_name_of_its_class() -> None:
    """So that it can be found again when config.toml is read."""
    adapter = TypeAdapter(registry.AnyAlgorithm)
    own = adapter.validate_python(Derived(lam=0.5))
    assert own == Derived(name="test_pipeline_algorithms:Derived", lam=0.5)
    assert adapter.validate_python(adapter.dump_python(own)) == own
    assert adapter.validate_python(PPO(lam=0.5)) == PPO(lam=0.5)
    assert PPO().name == "ppo"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "test_pipeline_algorithms:row",
            "must name a subclass of pipeline.algorithms.base.Algorithm, got {}, which is "
            "a function; derive it from Algorithm or from one of the algorithms in pipeline/algorithms",
        ),
        (
            "test_pipeline_algorithms:Step",
            "must name a subclass of pipeline.algorithms.base.Algorithm, got {}, which "
            "is a class Step; derive it from Algorithm or from one of the algorithms in pipeline/algorithms",
        ),
        (
            "test_pipeline_algorithms:Unfinished",
            "must name a class that defines advantages, got {}, which does not; see pipeline/algorithms/README.md",
        ),
        (
            "test_pipeline_algorithms:Labelled",
            "must name a class that leaves the type of `name` as it is, got {}, which has another; remove it from the "
            "class, since the import path is the name",
        ),
        (
            "no_such_module:Raft",
            "must be importable, got {}: No module named 'no_such_module'; put the module beside "
            "the recipe, in the current folder or on PYTHONPATH",
        ),
    ],
)
def test_what_is_no_algorithm_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('algorithm.name: ' + message.format(repr(name)))}$"):
        registry.algorithm_class(name)


class Short(Reinforce):
    """Advantages of another shape than the step's."""

    def advantages(self, batch: Trajectories) -> Advantages:
        return Advantages(advantages=batch.scores, returns=batch.rewards)


class Endless(Reinforce):
    """Returns that are no numbers."""

    def advantages(self, batch: Trajectories) -> Advantages:
        return Advantages(advantages=batch.rewards, returns=batch.rewards / 0)


class Raising(Reinforce):
    """A bug."""

    def advantages(self, batch: Trajectories) -> Advantages:
        raise RuntimeError("oops")


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            Short(name="m:Short"),
            "must compute advantages that are a finite number for each token, got (12,), "
            "torch.float32 from 'm:Short' for a step of (12, 2); see pipeline/algorithms/README.md",
        ),
        (
            Endless(name="m:Endless"),
            "must compute returns that are a finite number for each token, got (12, 2), "
            "torch.float32 from 'm:Endless' for a step of (12, 2); see pipeline/algorithms/README.md",
        ),
        (
            Raising(name="m:Raising"),
            "must compute the advantages of a step, got 'm:Raising', but it raised "
            "RuntimeError: oops (test_pipeline_algorithms.py, line ",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_advantages_that_are_none_are_refused_before_a_run(algorithm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('algorithm.name: ' + message)}"):
        check_learns(algorithm, prompts=64, group_size=4, max_new_tokens=9)


@pytest.mark.parametrize(
    "algorithm", [Reinforce(), ReinforcePP(), ReinforceBaseline(baseline="batch_mean")], ids=lambda a: a.name
)
def test_a_step_of_one_sample_that_is_its_own_baseline_is_refused(algorithm: Any) -> None:
    """Whitening is a baseline, too."""
    with pytest.raises(
        ValueError,
        match=r"every advantage would be 0 and no step would change the policy; raise batch\.group_size or "
        r"batch\.prompts$",
    ):
        check_learns(algorithm, prompts=1, group_size=1, max_new_tokens=9)


@pytest.mark.parametrize("algorithm", KINDS, ids=str)
@pytest.mark.parametrize(("prompts", "max_new_tokens"), [(1, 1), (1, 9), (64, 1), (64, 9)])
def test_every_algorithm_can_learn_where_its_needs_are_met(algorithm: Any, prompts: int, max_new_tokens: int) -> None:
    check_learns(algorithm, prompts=prompts, group_size=2, max_new_tokens=max_new_tokens)


def test_the_tables_name_every_algorithm_and_every_option() -> None:
    text = "\n".join((Path(registry.__file__).parent / page).read_text() for page in ("README.md", "OPTIONS.md"))
    kinds = registry.ALGORITHMS.values()
    for kind in kinds:
        assert f"| `{kind.model_fields['name'].default}` |" in text
    everywhere = set(text.replace("`", " ").replace(",", " ").split())
    # in the formulas, as γ and λ
    assert {field for kind in kinds for field in kind.model_fields} - everywhere <= {
        "gamma",
        "lam",
        "name",
    }


def test_needs_are_declared() -> None:
    critics = {"ppo", "a2c", "reinforce_baseline"}
    assert {a.name for a in KINDS if a.needs_critic} == critics
    assert not ReinforceBaseline(baseline="batch_mean").needs_critic
    assert {a.name: a.min_group_size for a in KINDS if a.min_group_size > 1} == {
        "rloo": 2,
        "grpo": 2,
        "reinforce_baseline": 2,
    }
    assert ReinforceBaseline(baseline="value").min_group_size == 1
    assert not any(a.needs_reference for a in KINDS)
    assert Reinforce(kl_coef=0.1).needs_reference
