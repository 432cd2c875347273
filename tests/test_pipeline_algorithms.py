"""Estimators, advantages and the KL controller: golden numbers published elsewhere, and slow float64 loops. Losses: test_pipeline_losses.py."""

from __future__ import annotations

import importlib
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from actors.objective import ActionTokens
from pipeline.algorithms import registry
from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.base import Trajectories
from pipeline.algorithms.estimators import discounted_returns, gae, token_rewards, whiten
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.kl_controller import KLController
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.reinforce_baseline import ReinforceBaseline
from pipeline.algorithms.reinforce_pp import ReinforcePP
from pipeline.algorithms.rloo import RLOO
from random_inputs import random_inputs

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
]


@random_inputs(300)
@given(seeds)
def test_every_algorithms_advantages_equal_the_loop(seed: int) -> None:
    step = step_of(seed)
    for algorithm in KINDS:
        found = algorithm.advantages(step.batch)
        for i, expected in enumerate(loop_advantages(algorithm, step)):
            assert found.advantages[i, : len(expected)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5), algorithm
        for column in (found.advantages, found.returns):
            assert column.dtype == torch.float32
            assert not column[~step.batch.mask].any(), algorithm
            assert torch.isfinite(column).all(), algorithm


@random_inputs(150)
@given(seeds)
def test_advantages_do_not_depend_on_the_order_of_samples(seed: int) -> None:
    step = step_of(seed).batch
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(step.groups)))
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
    assert ReinforceBaseline(baseline="leave_one_out").advantages(batch).advantages.tolist() == [[3], [-3], [-3], [3], [0]]


def test_grpo_golden() -> None:
    batch = grouped({0: [6, 3], 1: [9, 12]})
    assert GRPO(std=False).advantages(batch).advantages.tolist() == [[1.5], [-1.5], [-1.5], [1.5]]
    assert GRPO().advantages(batch).advantages[:, 0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5)], rel=1e-5)


@pytest.mark.parametrize("algorithm", [GRPO(), GRPO(std=False), RLOO(), ReinforceBaseline(baseline="leave_one_out")], ids=str)
def test_a_group_of_equal_returns_has_no_advantage_to_the_bit(algorithm: Any) -> None:
    """In float32 their mean may differ from them by rounding, which dividing by a tiny deviation would blow up."""
    batch = grouped({g: [1000.1 / (g + 3)] * (g + 1) for g in range(12)})
    assert not algorithm.advantages(batch).advantages.any()


def test_a_rollout_without_an_action_is_in_no_baseline() -> None:
    alone = Trajectories(rewards=torch.tensor([[4.0], [NAN], [2.0]]), values=torch.zeros(3, 1), scores=torch.tensor([4.0, 50.0, 2.0]),
                         groups=torch.zeros(3, dtype=torch.int64), mask=torch.tensor([[True], [False], [True]]))  # fmt: skip
    for algorithm, expected in ((RLOO(), [2, 0, -2]), (GRPO(std=False), [1, 0, -1]), (ReinforceBaseline(baseline="batch_mean"), [1, 0, -1])):
        assert algorithm.advantages(alone).advantages[:, 0].tolist() == expected


@random_inputs(200)
@given(seeds, st.sampled_from([1.0, 0.9]))
def test_identities(seed: int, gamma: float) -> None:
    batch = step_of(seed).batch
    zero = batch.rewards.new_zeros(())

    def same(a: Any, b: Any, factor: float = 1.0) -> None:
        assert torch.allclose(a.advantages(batch).advantages, factor * b.advantages(batch).advantages, atol=1e-5), (a, b)

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


def test_the_readmes_example_is_registered_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README says is done to the letter: the file, the import, the name in the union. Then a recipe may name it."""
    folder = Path(registry.__file__).parent
    [example] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    said = re.search(r"`\.\.\. \| ReinforcePP( \| \w+)`", (folder / "README.md").read_text())
    assert said
    body = example[example.index("class ") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 11, "the class line and ten more"
    (tmp_path / "raft.py").write_text(example)
    source = (folder / "registry.py").read_text().replace(" | ReinforcePP", f" | ReinforcePP{said[1]}")
    (tmp_path / "registry_with_raft.py").write_text(source.replace("from pydantic import Field\n", "from pydantic import Field\nfrom raft import Raft\n"))
    monkeypatch.syspath_prepend(tmp_path)
    extended = importlib.import_module("registry_with_raft").AnyAlgorithm
    raft = TypeAdapter(extended).validate_python({"name": "raft", "aggregation": "constant"})
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


def test_the_readmes_table_names_every_algorithm_and_every_option() -> None:
    text = (Path(registry.__file__).parent / "README.md").read_text()
    kinds = get_args(get_args(registry.AnyAlgorithm)[0])
    for kind in kinds:
        assert f"| `{kind.model_fields['name'].default}` |" in text
    everywhere = set(text.replace("`", " ").replace(",", " ").split())
    assert {field for kind in kinds for field in kind.model_fields} - everywhere <= {"gamma", "lam", "name"}  # in the formulas, as γ and λ


def test_needs_are_declared() -> None:
    critics = {"ppo", "a2c", "reinforce_baseline"}
    assert {a.name for a in KINDS if a.needs_critic} == critics
    assert not ReinforceBaseline(baseline="batch_mean").needs_critic
    assert {a.name: a.min_group_size for a in KINDS if a.min_group_size > 1} == {"rloo": 2, "grpo": 2, "reinforce_baseline": 2}
    assert ReinforceBaseline(baseline="value").min_group_size == 1
    assert not any(a.needs_reference for a in KINDS)
    assert Reinforce(kl_coef=0.1).needs_reference
