"""Turns and options: a slow float64 loop by the formulas, golden numbers, and what must not change anything."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.algorithms import registry
from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.base import Trajectories
from pipeline.algorithms.estimators import discounted_returns, gae, over_tokens, token_rewards, whiten
from pipeline.algorithms.losses import MAX_LOG_RATIO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.turns import (
    Bilevel,
    Turns,
    TurnTrajectories,
    WorkerTrajectories,
    credit_turns,
    gae_within_turns,
    intrinsic_rewards,
    option_counts,
    option_statistics,
    option_values,
    spread_over_tokens,
    turn_gae,
    with_bootstrap,
)
from random_inputs import random_inputs

NAN = math.nan
seeds = st.integers(0, 2**32 - 1)
fractions = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@dataclass(frozen=True)
class Conversation:
    """A conversation in plain lists, as a slow loop takes it; `acted`, `values` and `kl` are aligned with its tokens.

    values and kl are NaN at tokens that no policy sampled: prompt, environment, option tokens.
    """

    acted: list[bool]
    starts: list[int]
    values: list[float]
    kl: list[float]
    rewards: list[float]  # of turns, some of them 0
    turn_values: list[float]
    intrinsic: list[float]
    truncated: bool
    value_after: float  # NaN where terminated

    @property
    def actions(self) -> list[int]:
        return [t for t, acted in enumerate(self.acted) if acted]

    def of_turn(self, k: int) -> list[int]:
        """Indices of the action tokens of turn k."""
        end = self.starts[k + 1] if k + 1 < len(self.starts) else len(self.acted)
        return [t for t in range(self.starts[k], end) if self.acted[t]]


def conversation(random: np.random.Generator, turns: int, gaps: int = 4) -> Conversation:
    """One with turns of 1 to 4 tokens. Before each turn stand up to `gaps` - 1 tokens of others: none, too, is possible
    between two turns.
    """
    acted = [False] * int(random.integers(1, 4))
    starts = []
    for _ in range(turns):
        acted += [False] * int(random.integers(0, gaps))
        starts.append(len(acted))
        acted += [True] * int(random.choice([1, 1, 2, 3, 4]))
    acted += [False] * int(random.integers(0, gaps))
    values, kl = ([float(random.normal()) if is_action else NAN for is_action in acted] for _ in range(2))
    truncated = bool(random.random() < 0.5)
    return Conversation(
        acted=acted,
        starts=starts,
        values=values,
        kl=kl,
        rewards=[float(random.normal()) if random.random() < 0.5 else 0.0 for _ in range(turns)],
        turn_values=random.normal(size=turns).tolist(),
        intrinsic=random.normal(size=turns).tolist(),
        truncated=truncated,
        value_after=float(random.normal()) if truncated else NAN,
    )


def conversations(seed: int, least: int = 0, most: int = 5) -> list[Conversation]:
    random = np.random.default_rng(seed)
    return [conversation(random, int(random.integers(least, most))) for _ in range(random.integers(1, 7))]


def padded(rows: list[list[Any]], dtype: torch.dtype, filling: Any, more: int = 1) -> torch.Tensor:
    width = max(len(row) for row in rows) + more
    return torch.tensor([row + [filling] * (width - len(row)) for row in rows], dtype=dtype)


@dataclass(frozen=True)
class Batch:
    """The tensors of conversations, NaN in the padding."""

    turns: Turns
    manager: TurnTrajectories
    worker: WorkerTrajectories
    kl: torch.Tensor


def batch_of(
    talks: list[Conversation], *, kl_coef: float = 0.5, dtype: torch.dtype = torch.float64, more: int = 1
) -> Batch:
    mask = padded([[True] * len(c.actions) for c in talks], torch.bool, False, more)
    real = padded([[True] * len(c.starts) for c in talks], torch.bool, False, more)
    turns = Turns.of_starts(
        padded([c.starts for c in talks], torch.int64, -1, more),
        real,
        padded([c.actions for c in talks], torch.int64, -7, more),
        mask,
    )
    values, kl = (
        padded([[column[t] for t in c.actions] for c, column in rows], dtype, NAN, more)
        for rows in ([(c, c.values) for c in talks], [(c, c.kl) for c in talks])
    )
    rewards, turn_values, intrinsic = (
        padded([getattr(c, name) for c in talks], dtype, NAN, more) for name in ("rewards", "turn_values", "intrinsic")
    )
    manager = TurnTrajectories(
        rewards=rewards,
        values=turn_values,
        truncated=torch.tensor([c.truncated for c in talks]),
        values_after=torch.tensor([c.value_after for c in talks], dtype=dtype),
        real=real,
    )
    worker = WorkerTrajectories(kl_rewards=-kl_coef * kl, values=values, intrinsic=intrinsic, turns=turns)
    return Batch(turns, manager, worker, kl)


# --- the formulas, term by term, in float64 ---


def loop_gae(rewards: list[float], values: list[float], after: float, gamma: float, lam: float) -> list[float]:
    """after: the value of the state after the last step."""
    following = [*values, after][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]  # fmt: skip


def loop_turn_gae(c: Conversation, gamma: float, lam: float) -> list[float]:
    return loop_gae(c.rewards, c.turn_values, c.value_after if c.truncated else 0.0, gamma, lam)


def loop_token_rewards(c: Conversation, turn_rewards: list[float], kl_coef: float) -> dict[int, float]:
    """Index of the token -> its reward."""
    rewards = {t: -kl_coef * c.kl[t] for t in c.actions}
    for k, reward in enumerate(turn_rewards):
        rewards[c.of_turn(k)[-1]] += reward
    return rewards


def loop_worker(c: Conversation, how: Bilevel, kl_coef: float) -> list[float]:
    of_turns = loop_turn_gae(c, how.gamma, how.lam)
    credit = [a + how.intrinsic_coef * i for a, i in zip(of_turns, c.intrinsic, strict=True)]
    rewards = loop_token_rewards(c, credit, kl_coef)
    found = []
    for k in range(len(c.starts)):
        tokens = c.of_turn(k)
        found += loop_gae([rewards[t] for t in tokens], [c.values[t] for t in tokens], 0.0, 1.0, how.worker_lam)
    return found


def assert_rows(found: torch.Tensor, rows: list[list[float]]) -> None:
    """The rows, and 0 wherever the padding is."""
    for i, row in enumerate(rows):
        assert found[i, : len(row)].tolist() == pytest.approx(row, rel=1e-9, abs=1e-9)
        assert found[i, len(row) :].tolist() == [0] * (found.shape[1] - len(row))


@random_inputs(300)
@given(seeds, fractions, fractions)
def test_turn_gae_equals_the_loop(seed: int, gamma: float, lam: float) -> None:
    talks = conversations(seed)
    found = turn_gae(batch_of(talks).manager, gamma=gamma, lam=lam)
    expected = [loop_turn_gae(c, gamma, lam) for c in talks]
    assert_rows(found.advantages, expected)
    assert_rows(
        found.returns,
        [[a + v for a, v in zip(row, c.turn_values, strict=True)] for row, c in zip(expected, talks, strict=True)],
    )


@random_inputs(300)
@given(seeds, fractions, fractions)
def test_credit_of_turns_and_token_gae_over_conversations_equal_the_loop(seed: int, gamma: float, lam: float) -> None:
    """The loop walks over the whole conversation and skips what the policy did not sample."""
    talks = conversations(seed)
    batch = batch_of(talks)
    rewards = credit_turns(batch.worker.kl_rewards, batch.manager.rewards, batch.turns)
    by_token = [loop_token_rewards(c, c.rewards, 0.5) for c in talks]
    assert_rows(rewards, [[r[t] for t in c.actions] for r, c in zip(by_token, talks, strict=True)])
    after = [c.value_after if c.truncated else 0.0 for c in talks]
    expected = [
        loop_gae([r[t] for t in c.actions], [c.values[t] for t in c.actions], end, gamma, lam)
        for r, c, end in zip(by_token, talks, after, strict=True)
    ]
    mask, manager = batch.turns.mask, batch.manager
    bootstrapped = with_bootstrap(rewards, mask, manager.truncated, manager.values_after, gamma=gamma)
    assert_rows(gae(bootstrapped, batch.worker.values, mask, gamma=gamma, lam=lam)[0], expected)


@random_inputs(300)
@given(seeds, fractions, fractions, fractions, st.sampled_from([0.0, 0.3]))
def test_bilevel_advantages_equal_the_loop(seed: int, gamma: float, lam: float, worker_lam: float, coef: float) -> None:
    talks = conversations(seed)
    how = Bilevel(gamma=gamma, lam=lam, worker_lam=worker_lam, intrinsic_coef=coef, whiten_advantages=False)
    batch = batch_of(talks)
    high, low = how.advantages(batch.manager, batch.worker)
    assert_rows(high.advantages, [loop_turn_gae(c, gamma, lam) for c in talks])
    expected = [loop_worker(c, how, 0.5) for c in talks]
    assert_rows(low.advantages, expected)
    assert_rows(
        low.returns,
        [
            [a + c.values[t] for a, t in zip(row, c.actions, strict=True)]
            for row, c in zip(expected, talks, strict=True)
        ],
    )


@random_inputs(100)
@given(seeds)
def test_in_float32_it_is_the_loop_up_to_rounding(seed: int) -> None:
    talks = conversations(seed)
    batch = batch_of(talks, dtype=torch.float32)
    how = Bilevel(intrinsic_coef=0.3, whiten_advantages=False)
    high, low = how.advantages(batch.manager, batch.worker)
    for found in (high.advantages, high.returns, low.advantages, low.returns):
        assert found.dtype == torch.float32
        assert found.isfinite().all()
    for i, c in enumerate(talks):
        expected = loop_worker(c, how, 0.5)
        assert low.advantages[i, : len(expected)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@random_inputs(100)
@given(seeds)
def test_each_level_is_whitened_apart(seed: int) -> None:
    batch = batch_of(conversations(seed))
    raw = Bilevel(whiten_advantages=False).advantages(batch.manager, batch.worker)
    for found, before, mask in zip(
        Bilevel().advantages(batch.manager, batch.worker), raw, (batch.manager.real, batch.turns.mask), strict=True
    ):
        assert torch.equal(found.advantages, whiten(before.advantages, mask))
        assert torch.equal(found.returns, before.returns)


# --- golden numbers ---


def manager_of(rewards: list[float], values: list[float], after: float | None = None) -> TurnTrajectories:
    """One conversation, truncated where `after` is given."""
    return TurnTrajectories(
        rewards=torch.tensor([rewards]),
        values=torch.tensor([values]),
        truncated=torch.tensor([after is not None]),
        values_after=torch.tensor([NAN if after is None else after]),
        real=torch.ones(1, len(rewards), dtype=torch.bool),
    )


def turns_of(*lengths: int) -> Turns:
    """One conversation with turns of so many tokens."""
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return Turns(
        mask=torch.ones(1, sum(lengths), dtype=torch.bool),
        number=number,
        real=torch.ones(1, len(lengths), dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("gamma", "lam", "returns"),
    [(1.0, 1.0, [6, 5, 3]), (0.5, 1.0, [2.75, 3.5, 3]), (1.0, 0.5, [3.625, 4.25, 3])],
)
def test_gae_golden_over_turns_and_within_a_turn(gamma: float, lam: float, returns: list[float]) -> None:
    """Published numbers. The second turn has other values and rewards, which must not reach the first."""
    assert turn_gae(manager_of([1, 2, 3], [0.5, 1, 1.5]), gamma=gamma, lam=lam).returns.tolist() == [returns]
    rewards, values = torch.tensor([[1.0, 2, 3, 50]]), torch.tensor([[0.5, 1, 1.5, -40]])
    found = gae_within_turns(rewards, values, turns_of(3, 1), gamma=gamma, lam=lam)
    assert found.returns.tolist() == [[*returns, 50]]


def test_gae_golden_one_step() -> None:
    assert turn_gae(manager_of([0, 0, 5], [1, 2, 3]), gamma=1, lam=0).advantages.tolist() == [[1, 1, 2]]


@pytest.mark.parametrize(("after", "advantages"), [(None, [-0.1875, 0.75]), (2.0, [0.0625, 1.75])])
def test_a_truncated_conversation_bootstraps_and_a_terminated_one_does_not(
    after: float | None, advantages: list[float]
) -> None:
    """delta of the last turn: 1 - .25, or 1 + .5 * 2 - .25; of the first: .5 * .25 - .5; decay .25."""
    assert turn_gae(manager_of([0, 1], [0.5, 0.25], after), gamma=0.5, lam=0.5).advantages.tolist() == [advantages]


def test_bilevel_golden_on_two_turns() -> None:
    """A_turn = [-.1875, .75]. The first turn, of two tokens, ends with -.1875 + .5 * 1 - .5 = -.1875, and begins with
    (.5 - .25) + .5 * -.1875 = .15625. The second, of one token: .75 + .5 * 0 - .5.
    """
    how = Bilevel(gamma=0.5, lam=0.5, worker_lam=0.5, intrinsic_coef=0.5, whiten_advantages=False)
    worker = WorkerTrajectories(
        kl_rewards=torch.zeros(1, 3),
        values=torch.tensor([[0.25, 0.5, 0.5]]),
        intrinsic=torch.tensor([[1.0, 0.0]]),
        turns=turns_of(2, 1),
    )
    high, low = how.advantages(manager_of([0, 1], [0.5, 0.25]), worker)
    assert high.advantages.tolist() == [[-0.1875, 0.75]]
    assert high.returns.tolist() == [[0.3125, 1]]
    assert low.advantages.tolist() == [[0.15625, -0.1875, 0.25]]
    assert low.returns.tolist() == [[0.40625, 0.3125, 0.75]]


def test_returns_cross_turns_and_the_discount_counts_action_tokens_only() -> None:
    """mask 1 1 0 0 1 1, reward 1 at the end: the first turn's reward of 0 is no end, and 0 0 does not discount."""
    turns = Turns.of_starts(
        torch.tensor([[0, 4]]), torch.ones(1, 2).bool(), torch.tensor([[0, 1, 4, 5]]), torch.ones(1, 4).bool()
    )
    rewards = credit_turns(torch.zeros(1, 4), torch.tensor([[0.0, 1.0]]), turns)
    assert rewards.tolist() == [[0, 0, 0, 1]]
    assert discounted_returns(rewards, turns.mask, gamma=0.5).tolist() == [[0.125, 0.25, 0.5, 1]]


def test_a_turns_reward_is_at_its_last_action_token() -> None:
    """The example of Turns: NaN in the padding; a conversation without any turn."""
    turns = Turns(
        mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool(),
        number=torch.tensor([[0, 0, 0, 1], [0, 0, 9, -4], [3, 3, 3, 3]]),
        real=torch.tensor([[1, 1], [1, 0], [0, 0]]).bool(),
    )
    kl = torch.tensor([[1.0, 2, 3, 4], [5, 6, NAN, NAN], [NAN, NAN, NAN, NAN]])
    turn_rewards = torch.tensor([[10.0, 20], [30, NAN], [NAN, NAN]])
    assert credit_turns(kl, turn_rewards, turns).tolist() == [[1, 2, 13, 24], [5, 36, 0, 0], [0, 0, 0, 0]]
    assert spread_over_tokens(turn_rewards, turns).tolist() == [[10, 10, 10, 20], [30, 30, 0, 0], [0, 0, 0, 0]]
    assert option_values(kl, turns).tolist() == [[1, 4], [5, 0], [0, 0]]


# --- conversations of a single turn are rollouts, to the bit ---


@random_inputs(200)
@given(seeds, st.sampled_from([0.0, 0.5]))
def test_with_a_single_turn_every_algorithm_is_what_it_was_to_the_bit(seed: int, kl_coef: float) -> None:
    talks = conversations(seed, most=2)
    batch = batch_of(talks, kl_coef=kl_coef, dtype=torch.float32)
    mask, scores = batch.turns.mask, batch.manager.rewards[:, 0].nan_to_num()
    before = token_rewards(scores, batch.kl, mask, kl_coef=kl_coef)
    now = credit_turns(batch.worker.kl_rewards, batch.manager.rewards, batch.turns)
    assert torch.equal(now.signbit(), before.signbit())
    rest = {
        "values": batch.worker.values,
        "scores": scores,
        "groups": torch.zeros(len(talks), dtype=torch.int64),
        "mask": mask,
    }
    for kind in registry.ALGORITHMS.values():
        expected = kind().advantages(Trajectories(rewards=before, **rest))
        found = kind().advantages(Trajectories(rewards=now, **rest))
        assert torch.equal(found.advantages, expected.advantages), kind
        assert torch.equal(found.returns, expected.returns), kind
    within = gae_within_turns(now, batch.worker.values, batch.turns, gamma=0.99, lam=0.95)
    across = gae(before, batch.worker.values, mask, gamma=0.99, lam=0.95)
    assert torch.equal(within.advantages, across[0])
    assert torch.equal(within.returns, across[1])
    assert torch.equal(spread_over_tokens(batch.manager.rewards, batch.turns), over_tokens(scores.double(), mask))


@random_inputs(200)
@given(seeds)
def test_with_turns_of_one_token_turn_gae_is_token_gae_to_the_bit(seed: int) -> None:
    """Tokens are then turns, and the manager's estimator is the flat one."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 5, 4)
    mask = torch.tensor([[t < n for t in range(5)] for n in sizes])
    rewards, values = (torch.from_numpy(random.normal(size=(4, 5)).astype(np.float32)) for _ in range(2))
    turns = Turns(mask=mask, number=torch.arange(5).repeat(4, 1), real=mask)
    manager = TurnTrajectories(
        rewards=rewards, values=values, truncated=torch.zeros(4).bool(), values_after=torch.full((4,), NAN), real=mask
    )
    found = turn_gae(manager, gamma=0.9, lam=0.8)
    expected = PPO(gamma=0.9, lam=0.8).advantages(
        Trajectories(
            rewards=credit_turns(torch.zeros(4, 5), rewards, turns),
            values=values,
            scores=torch.zeros(4),
            groups=torch.zeros(4, dtype=torch.int64),
            mask=mask,
        )
    )
    assert torch.equal(found.advantages, expected.advantages)
    assert torch.equal(found.returns, expected.returns)


@random_inputs(200)
@given(seeds)
def test_classic_algorithms_over_conversations_equal_the_loop(seed: int) -> None:
    talks = conversations(seed)
    batch = batch_of(talks)
    rewards = credit_turns(batch.worker.kl_rewards, batch.manager.rewards, batch.turns)
    step = Trajectories(
        rewards=rewards,
        values=batch.worker.values,
        scores=torch.full((len(talks),), NAN),
        groups=torch.zeros(len(talks), dtype=torch.int64),
        mask=batch.turns.mask,
    )
    for algorithm, lam in ((PPO(gamma=0.9, lam=0.8), 0.8), (A2C(gamma=0.9), 0.0), (Reinforce(gamma=0.9), 1.0)):
        expected = []
        for c in talks:
            by_token = loop_token_rewards(c, c.rewards, 0.5)
            values = [0.0 if isinstance(algorithm, Reinforce) else c.values[t] for t in c.actions]
            expected.append(loop_gae([by_token[t] for t in c.actions], values, 0.0, 0.9, lam))
        assert_rows(algorithm.advantages(step).advantages, expected)


# --- what must not change anything ---


@random_inputs(200)
@given(seeds, st.sampled_from([0.0, 0.5]), st.booleans())
def test_one_option_one_turn_and_a_manager_value_of_0_is_flat_ppo_to_the_bit(
    seed: int, kl_coef: float, whitened: bool
) -> None:
    """Both see the same control token, so that they have the same values. The discriminator of one option knows it."""
    talks = conversations(seed, most=2)
    batch = batch_of(talks, kl_coef=kl_coef, dtype=torch.float32)
    mask, real, scores = batch.turns.mask, batch.turns.real, batch.manager.rewards[:, 0].nan_to_num()
    manager = replace(batch.manager, values=torch.zeros(real.shape), values_after=torch.zeros(len(talks)))
    certain, alone = torch.zeros(real.shape), torch.ones(real.shape, dtype=torch.int64)
    intrinsic = intrinsic_rewards(torch.zeros(real.shape), certain, alone, real, check_coef=0, diversity_coef=1)
    assert not intrinsic.any()
    worker = replace(batch.worker, intrinsic=intrinsic)
    _, low = Bilevel(intrinsic_coef=1.0, whiten_advantages=whitened).advantages(manager, worker)
    flat = PPO(gamma=1.0, lam=0.95).advantages(
        Trajectories(
            rewards=token_rewards(scores, batch.kl, mask, kl_coef=kl_coef),
            values=batch.worker.values,
            scores=scores,
            groups=torch.zeros(len(talks), dtype=torch.int64),
            mask=mask,
        )
    )
    assert torch.equal(low.advantages, whiten(flat.advantages, mask) if whitened else flat.advantages)
    assert torch.equal(low.returns, flat.returns)


@random_inputs(200)
@given(seeds, st.floats(-5, 5), fractions, fractions)
def test_a_constant_in_the_managers_values_and_targets_leaves_the_worker_as_it_is(
    seed: int, constant: float, gamma: float, lam: float
) -> None:
    """Targets rise by c if each reward rises by c - gamma c, and that of a last turn with nothing after it by c."""
    talks = conversations(seed)
    batch, c = batch_of(talks), constant
    manager = batch.manager
    ended = torch.zeros_like(manager.real)
    for i, talk in enumerate(talks):
        ended[i, max(len(talk.starts) - 1, 0)] = not talk.truncated
    raised = replace(
        manager,
        rewards=manager.rewards + torch.full(ended.shape, c, dtype=torch.float64).where(ended, (1 - gamma) * c),
        values=manager.values + c,
        values_after=manager.values_after + c,
    )
    how = Bilevel(gamma=gamma, lam=lam)
    (high, low), (high_raised, low_raised) = (how.advantages(m, batch.worker) for m in (manager, raised))
    added = torch.zeros_like(manager.values).where(~manager.real, c)
    assert torch.allclose(high_raised.returns, high.returns + added, atol=1e-9)
    assert torch.allclose(low_raised.advantages, low.advantages, atol=1e-5)  # whitened, and so scaled up
    assert torch.allclose(low_raised.returns, low.returns, atol=1e-9)


@random_inputs(200)
@given(seeds, st.integers(1, 5))
def test_permuting_options_permutes_results(seed: int, options: int) -> None:
    talks = conversations(seed)
    batch, random = batch_of(talks), np.random.default_rng(seed)
    real = batch.turns.real
    chosen, done = (torch.from_numpy(random.integers(0, options, tuple(real.shape))) for _ in range(2))
    log_q = torch.from_numpy(random.normal(size=(*real.shape, options))).log_softmax(dim=2)
    checks = torch.from_numpy(random.random(tuple(real.shape)))
    renamed = torch.from_numpy(random.permutation(options))  # option o becomes renamed[o]
    backwards = renamed.argsort()
    on_offer = torch.full(real.shape, options)
    found = []
    for names, columns in ((chosen, log_q), (renamed[chosen], log_q[:, :, backwards])):
        own = columns.gather(2, names[:, :, None]).squeeze(2)
        intrinsic = intrinsic_rewards(checks, own, on_offer, real, check_coef=0.7, diversity_coef=0.2)
        worker = replace(batch.worker, intrinsic=intrinsic)
        found.append(Bilevel(intrinsic_coef=0.5).advantages(batch.manager, worker))
    for level in (0, 1):
        assert torch.equal(found[0][level].advantages, found[1][level].advantages)
        assert torch.equal(found[0][level].returns, found[1][level].returns)
    if not real.any():
        return
    counts = option_counts(chosen, done, real, option_count=options, outcome_count=options)
    other = option_counts(renamed[chosen], renamed[done], real, option_count=options, outcome_count=options)
    assert torch.equal(other[renamed][:, renamed], counts)
    before, after = option_statistics(counts), option_statistics(other)
    assert torch.equal(after.usage[renamed], before.usage)
    assert after.entropy == pytest.approx(before.entropy, abs=1e-12)
    assert after.mutual_information == pytest.approx(before.mutual_information, abs=1e-12)


@random_inputs(100)
@given(seeds)
def test_the_manager_never_sees_the_intrinsic_reward(seed: int) -> None:
    batch = batch_of(conversations(seed))
    praised = replace(batch.worker, intrinsic=batch.worker.intrinsic + 9)
    found = [Bilevel(intrinsic_coef=0.5).advantages(batch.manager, worker)[0] for worker in (batch.worker, praised)]
    assert torch.equal(found[0].advantages, found[1].advantages)
    assert torch.equal(found[0].returns, found[1].returns)


@random_inputs(100)
@given(seeds)
def test_turns_of_reward_0_keep_their_boundaries(seed: int) -> None:
    """Nothing of a turn's values and rewards reaches another one, though no reward marks an end."""
    talks = [conversation(np.random.default_rng(seed), 3)]
    batch = batch_of(talks)
    nothing = torch.zeros_like(batch.manager.rewards)
    rewards = credit_turns(batch.worker.kl_rewards, nothing, batch.turns)
    before = gae_within_turns(rewards, batch.worker.values, batch.turns, gamma=1.0, lam=0.95).advantages
    second = batch.turns.mask & (batch.turns.number == 1)
    after = gae_within_turns(
        (rewards + 3).where(second, rewards),
        (batch.worker.values - 7).where(second, batch.worker.values),
        batch.turns,
        gamma=1.0,
        lam=0.95,
    ).advantages
    assert torch.equal(after[~second], before[~second])
    assert (after[second] != before[second]).all()
    assert batch.turns.ends.sum() == batch.turns.begins.sum() == 3


@random_inputs(100)
@given(seeds)
def test_the_workers_baseline_is_the_value_after_the_option(seed: int) -> None:
    """With lambda 1, a turn's first advantage is all of the turn's rewards minus Q(s, o), whatever V_L thinks after."""
    talks = conversations(seed)
    batch = batch_of(talks)
    how = Bilevel(worker_lam=1.0, intrinsic_coef=0.3, whiten_advantages=False)
    first = option_values(how.advantages(batch.manager, batch.worker)[1].advantages, batch.turns)
    baseline = option_values(batch.worker.values, batch.turns)
    for i, c in enumerate(talks):
        for k, credit in enumerate(loop_turn_gae(c, how.gamma, how.lam)):
            q = c.values[c.starts[k]]
            assert baseline[i, k] == q
            total = sum(-0.5 * c.kl[t] for t in c.of_turn(k)) + credit + 0.3 * c.intrinsic[k]
            assert first[i, k].item() == pytest.approx(total - q, abs=1e-9)


@random_inputs(100)
@given(seeds)
def test_padding_order_and_the_environments_tokens_change_nothing(seed: int) -> None:
    talks = conversations(seed)
    how = Bilevel(intrinsic_coef=0.3, whiten_advantages=False)
    batch = batch_of(talks)
    order = np.random.default_rng(seed).permutation(len(talks)).tolist()
    silent = [
        replace(
            c,
            acted=[True] * len(c.actions),
            starts=[c.actions.index(start) for start in c.starts],
            values=[c.values[t] for t in c.actions],
            kl=[c.kl[t] for t in c.actions],
        )
        for c in talks
    ]
    wide, cut = batch_of(talks, more=4), batch_of(silent)
    turned = batch_of([talks[i] for i in order])
    straight = how.advantages(batch.manager, batch.worker)
    for level in (0, 1):
        expected = straight[level].advantages
        assert torch.equal(how.advantages(cut.manager, cut.worker)[level].advantages, expected)
        assert torch.equal(how.advantages(turned.manager, turned.worker)[level].advantages, expected[order])
        widened = how.advantages(wide.manager, wide.worker)[level].advantages
        assert torch.equal(widened[:, : expected.shape[1]], expected)
        assert not widened[:, expected.shape[1] :].any()


def test_a_nan_that_is_real_is_noticed() -> None:
    worker = WorkerTrajectories(
        kl_rewards=torch.zeros(1, 3),
        values=torch.tensor([[0.0, NAN, 0.0]]),
        intrinsic=torch.zeros(1, 2),
        turns=turns_of(2, 1),
    )
    low = Bilevel(whiten_advantages=False).advantages(manager_of([0, 1], [0, 0]), worker)[1]
    assert low.advantages.isnan().tolist() == [[True, True, False]]


# --- intrinsic rewards and statistics ---


def test_intrinsic_rewards_golden() -> None:
    """Sure and right: log of the number on offer. It knows nothing: 0. No choice: 0. NaN where no turn is."""
    log_q = torch.tensor([[1.0, 0.5, 1.0, 1.0, 0.1, NAN]]).log()
    on_offer, real = torch.tensor([[2, 2, 4, 1, 5, 0]]), torch.tensor([[True] * 5 + [False]])
    checks = torch.tensor([[0.0, 1.0, 0.0, 0.5, 0.0, NAN]])
    found = intrinsic_rewards(checks, log_q, on_offer, real, check_coef=2.0, diversity_coef=3.0)
    assert found[0].tolist() == pytest.approx([3 * math.log(2), 2, 6 * math.log(2), 1, -3 * math.log(2), 0], abs=1e-6)
    only = intrinsic_rewards(checks, log_q, on_offer, real, check_coef=2.0, diversity_coef=0.0)
    assert only.tolist() == [[0, 2, 0, 1, 0, 0]]


@pytest.mark.parametrize("coef", [0.0, 1.0])
def test_an_option_that_the_discriminator_rules_out_has_a_bounded_reward(coef: float) -> None:
    found = intrinsic_rewards(
        torch.zeros(1, 1),
        torch.tensor([[-math.inf]]),
        torch.tensor([[2]]),
        torch.ones(1, 1).bool(),
        check_coef=1.0,
        diversity_coef=coef,
    )
    assert found.item() == pytest.approx(coef * (math.log(2) - MAX_LOG_RATIO))


@random_inputs(300)
@given(seeds)
def test_intrinsic_rewards_and_statistics_equal_the_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    talks = conversations(seed, least=1)
    real = batch_of(talks).turns.real
    k, c = int(random.integers(1, 5)), int(random.integers(1, 4))
    options = torch.from_numpy(random.integers(0, k, tuple(real.shape)))
    outcomes = torch.from_numpy(random.integers(0, c, tuple(real.shape)))
    log_q = torch.from_numpy(-random.exponential(size=tuple(real.shape)))
    on_offer = torch.from_numpy(random.integers(1, k + 1, tuple(real.shape)))
    checks = torch.from_numpy(random.random(tuple(real.shape)))
    found = intrinsic_rewards(checks, log_q, on_offer, real, check_coef=0.7, diversity_coef=0.2)
    pairs = []
    expected = []
    for i, talk in enumerate(talks):
        expected.append([])
        for t in range(len(talk.starts)):
            o = int(options[i, t])
            pairs.append((o, int(outcomes[i, t])))
            diversity = float(log_q[i, t]) + math.log(int(on_offer[i, t]))
            expected[-1].append(0.7 * float(checks[i, t]) + 0.2 * diversity)
    assert_rows(found, expected)
    nowhere = options.where(real, 77)  # what stands in the padding is not counted
    statistics = option_statistics(option_counts(nowhere, outcomes, real, option_count=k, outcome_count=c))
    n = len(pairs)
    usage = [sum(o == a for a, _ in pairs) / n for o in range(k)]
    seen = [sum(e == b for _, b in pairs) / n for e in range(c)]
    assert statistics.usage.tolist() == pytest.approx(usage)
    assert statistics.entropy == pytest.approx(-sum(p * math.log(p) for p in usage if p), abs=1e-12)
    shares = {pair: pairs.count(pair) / n for pair in set(pairs)}
    information = sum(p * math.log(p / (usage[o] * seen[e])) for (o, e), p in shares.items())
    assert statistics.mutual_information == pytest.approx(information, abs=1e-12)
    assert 0 <= statistics.mutual_information <= statistics.entropy + 1e-12


@pytest.mark.parametrize(
    ("counts", "usage", "entropy", "information"),
    [
        ([[5, 0], [0, 5]], [0.5, 0.5], math.log(2), math.log(2)),  # each does its own
        ([[3, 6], [5, 10]], [0.375, 0.625], 0.6615632381579821, 0.0),  # what is done does not depend on the option
        ([[4, 2], [0, 0]], [1, 0], 0.0, 0.0),  # one option is used alone
        ([[7]], [1], 0.0, 0.0),
    ],
)
def test_option_statistics_golden(
    counts: list[list[int]], usage: list[float], entropy: float, information: float
) -> None:
    found = option_statistics(torch.tensor(counts))
    assert found.usage.tolist() == usage
    assert found.entropy == pytest.approx(entropy, abs=1e-15)
    assert found.mutual_information == pytest.approx(information, abs=1e-15)


def test_statistics_without_a_turn_are_not_known() -> None:
    none = option_counts(
        torch.full((2, 1), -1), torch.full((2, 1), -1), torch.zeros(2, 1).bool(), option_count=3, outcome_count=2
    )
    assert none.tolist() == [[0, 0]] * 3
    found = option_statistics(none)
    assert found.usage.isnan().all()
    assert math.isnan(found.entropy) and math.isnan(found.mutual_information)


# --- what is refused ---


UNCOUNTED = "Turns.real: must mark as many turns as have action tokens; leave out a turn without one"


@pytest.mark.parametrize(
    ("mask", "number", "real", "message", "shown"),
    [
        ([1, 0, 1], [0, 0, 0], [1], "Turns.mask: must be padded on the right alone", [True, False, True]),
        ([1, 1, 0], [0, 0, 0], [0, 1], "Turns.real: must be padded on the right alone", [False, True]),
        ([1, 1, 0], [0, 2, 0], [1], "Turns.number: must rise by 0 or 1 from an action token to the next", [0, 2, 0]),
        ([1, 1, 0], [1, 0, 0], [1], "Turns.number: must rise by 0 or 1 from an action token to the next", [1, 0, 0]),
        ([1, 1, 0], [1, 1, 0], [1, 1], "Turns.number: must be 0 at the first action token", [1, 1, 0]),
        ([1, 1, 0], [0, 0, 0], [1, 1], UNCOUNTED, [True, True]),
        ([1, 1, 0], [0, 1, 0], [1, 0], UNCOUNTED, [True, False]),
        ([0, 0, 0], [0, 0, 0], [1], UNCOUNTED, [True]),
    ],
)
def test_turns_that_are_none_are_refused(
    mask: list[int], number: list[int], real: list[int], message: str, shown: list[Any]
) -> None:
    good = [1] + [0] * (len(real) - 1)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{message}; row 1 begins with {shown}')}$"):
        Turns(
            mask=torch.tensor([[1, 1, 1], mask]).bool(),
            number=torch.tensor([[0, 0, 0], number]),
            real=torch.tensor([good, real]).bool(),
        )


def test_two_turns_that_begin_at_one_token_are_refused() -> None:
    """One of them would have no token, and its reward no place."""
    with pytest.raises(
        ValueError, match=r"^Turns\.number: must be 0 at the first action token; row 0 begins with \[1\]$"
    ):
        Turns.of_starts(torch.tensor([[3, 3]]), torch.ones(1, 2).bool(), torch.tensor([[3]]), torch.ones(1, 1).bool())


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 2), (2, 1)), ((2, 3), (2, 3), (3, 1)), ((2, 0), (2, 0), (2, 1)), ((3,), (3,), (3,))]
)
def test_turns_of_other_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    mask, number, real = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
    with pytest.raises(ValueError, match=rf"^Turns: mask, .* got {re.escape(str(shapes))}$"):
        Turns(mask=mask.bool(), number=number, real=real.bool())


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_option_that_there_is_not_is_refused(wrong: int) -> None:
    options, real = torch.tensor([[0, 2], [1, wrong]]), torch.ones(2, 2).bool()
    message = f"options: must be at least 0 and less than 3, got {wrong} in turn 1 of conversation 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        option_counts(options, options * 0, real, option_count=3, outcome_count=1)


def test_a_turn_whose_option_was_not_on_offer_is_noticed() -> None:
    nothing, on_offer, real = torch.zeros(1, 2), torch.tensor([[1, 0]]), torch.tensor([[True, True]])
    with pytest.raises(AssertionError, match="a turn whose option was not on offer"):
        intrinsic_rewards(nothing, nothing, on_offer, real, check_coef=1, diversity_coef=1)
    real[0, 1] = False
    assert intrinsic_rewards(nothing, nothing, on_offer, real, check_coef=1, diversity_coef=1).tolist() == [[0, 0]]
