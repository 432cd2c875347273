"""The statistics of an evaluation: intervals that cover what they claim, estimates against brute force, failures left
out and never zero.
"""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.statistics import (
    Floats,
    Interval,
    best_of,
    best_of_at,
    best_of_kl,
    best_of_weights,
    bootstrap,
    interval,
    match,
    prompt_means,
    ratio,
    resampled,
    win_rates,
)

NAN = math.nan


# ---- intervals ----


def test_the_interval_covers_a_known_mean_about_95_times_in_100() -> None:
    """A skewed distribution of mean 2, 60 values a draw.

    190 of 200 are expected; chance alone stays within 178 and 199.
    """
    random = np.random.default_rng(0)
    draws = [random.exponential(2.0, 60) for _ in range(200)]
    intervals = [bootstrap(values, seed, resamples=1000) for seed, values in enumerate(draws)]
    assert 178 <= sum(i.low <= 2.0 <= i.high for i in intervals) <= 199
    assert all(i.low < i.mean < i.high for i in intervals)


def test_the_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(values, seed=0)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=half / 20)


def test_the_interval_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap(values, seed=3) == bootstrap(values.copy(), seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_many_values_are_resampled_in_parts_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=(50, 2))
    whole = resampled(values, 3)
    monkeypatch.setattr("pipeline.evaluation.statistics._AT_ONCE", 7_000)
    assert np.array_equal(resampled(values, 3), whole)
    assert resampled(values[:, :1], 3) == pytest.approx(whole[:, :1], abs=1e-12), "however many columns there are"


def test_values_that_do_not_differ_leave_nothing_open() -> None:
    assert bootstrap(np.full(9, 0.25), seed=0) == Interval(mean=0.25, low=0.25, high=0.25)
    assert bootstrap(np.array([3.0]), seed=0) == Interval(mean=3.0, low=3.0, high=3.0)


def test_a_failed_reward_is_left_out() -> None:
    values = np.random.default_rng(3).normal(size=20)
    assert bootstrap(np.concatenate([[NAN], values, [NAN]]), seed=5) == bootstrap(values, seed=5)
    assert prompt_means(np.array([[1, NAN], [NAN, NAN], [5, 7]])).tolist() == pytest.approx([1, NAN, 6], nan_ok=True)


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_no_reward_at_all_is_refused(values: list[float]) -> None:
    with pytest.raises(
        ValueError, match=r"^evaluation: must have at least one scored response, got none; see the examiners' logs$"
    ):
        bootstrap(np.array(values), seed=0)


def test_a_ratio_weighs_prompts_by_their_tokens() -> None:
    found = ratio(np.array([1.0, 30.0]), np.array([1.0, 10.0]), seed=0)
    assert found.mean == 31 / 11, "not the mean of 1 and 3"
    assert (found.low, found.high) == (1.0, 3.0)


def test_a_quantile_may_be_infinite_but_is_never_nan() -> None:
    assert interval(2.0, np.array([1.0] * 50 + [math.inf] * 50)) == Interval(mean=2.0, low=1.0, high=math.inf)


# ---- win rate ----


@given(data=st.data(), samples=st.integers(1, 4), pool=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_the_win_rate_is_that_of_every_pair_counted(data: st.DataObject, samples: int, pool: int) -> None:
    value = st.sampled_from([0.0, 1.0, 2.0, NAN])
    ours, theirs = (data.draw(st.lists(value, min_size=n, max_size=n)) for n in (samples, pool))
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(ours, theirs) if not math.isnan(a + b)]
    [found] = win_rates(np.array([ours]), np.array([theirs]))
    assert found == pytest.approx(np.mean(points) if points else NAN, nan_ok=True)


def test_who_plays_against_himself_wins_half() -> None:
    rewards = np.random.default_rng(4).normal(size=(20, 5))
    assert win_rates(rewards, rewards).tolist() == [0.5] * 20


# ---- best of n ----


def by_enumeration(judge: list[float], wanted: list[float], n: int) -> float:
    """Every subset of n; where several are the best, each with equal chance."""
    found = []
    for chosen in combinations(range(len(judge)), n):
        top = max(judge[i] for i in chosen)
        found.append(np.mean([wanted[i] for i in chosen if judge[i] == top]))
    return float(np.mean(found))


@given(data=st.data(), pool=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_best_of_n_is_the_mean_over_every_subset(data: st.DataObject, pool: int) -> None:
    judge = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=pool, max_size=pool), label="with ties")
    wanted = data.draw(st.lists(st.floats(-5, 5), min_size=pool, max_size=pool))
    assert best_of(np.array([judge]), np.array([judge]))[0] == pytest.approx(
        [by_enumeration(judge, judge, n) for n in range(1, pool + 1)], abs=1e-12
    )
    assert best_of(np.array([judge]), np.array([wanted]))[0] == pytest.approx(
        [by_enumeration(judge, wanted, n) for n in range(1, pool + 1)], abs=1e-12
    )


def test_the_weights_are_combinations() -> None:
    weights = best_of_weights(16)
    assert weights == pytest.approx(
        np.array([[math.comb(i, n - 1) / math.comb(16, n) for i in range(16)] for n in range(1, 17)]), abs=1e-15
    )
    assert weights.sum(axis=1) == pytest.approx(1.0)
    assert np.isfinite(best_of_weights(1000)).all(), "where the combinations themselves are no floats"


def test_best_of_n_is_unbiased() -> None:
    """Of 8 uniform samples the largest of n is expected at n / (n + 1), however large the pool."""
    samples = np.random.default_rng(5).uniform(size=(5_000, 8))
    assert best_of(samples, samples).mean(axis=0) == pytest.approx([n / (n + 1) for n in range(1, 9)], abs=0.012)


def test_a_prompt_with_a_failed_reward_says_nothing_of_best_of_n() -> None:
    judge = np.array([[0.0, 1.0], [NAN, 1.0], [0.0, 1.0]])
    wanted = np.array([[3.0, 4.0], [3.0, 4.0], [3.0, NAN]])
    assert np.isnan(best_of(judge, wanted)).any(axis=1).tolist() == [False, True, True]
    assert best_of(judge, wanted)[0].tolist() == [3.5, 4.0]


def test_the_kl_of_best_of_n() -> None:
    """log 2 - 1/2, log 16 - 15/16, and nothing for the one that is taken as it is."""
    assert best_of_kl(np.array([1, 2, 16])) == pytest.approx([0.0, 0.1931471805599453, 1.8350887222397811], abs=1e-15)


def test_the_kl_of_best_of_n_is_that_of_the_distribution_it_samples() -> None:
    """Among 400 equally likely replies, all of different worth: the largest of n has rank i with probability (i^n -
    (i-1)^n) / 400^n.
    """
    ranks = np.arange(1, 401) / 400
    for n in (2, 5):
        chances = ranks**n - (ranks - 1 / 400) ** n
        assert (chances * np.log(chances * 400)).sum() == pytest.approx(best_of_kl(np.array([n]))[0], abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 16, 1000, 10**6])
def test_the_n_of_a_kl(n: int) -> None:
    assert best_of_at(float(best_of_kl(np.array(n)))) == pytest.approx(n, rel=1e-6)


def test_the_n_of_an_absurd_kl_is_infinite() -> None:
    assert best_of_at(1e6) == math.inf
    assert best_of_at(-0.1) == 1.0


# ---- policy and best-of-n at the same KL ----

KL2 = math.log(2) - 0.5


def same(row: list[float], times: int = 3) -> Floats:
    return np.array([row] * times)


def test_halfway_in_kl_is_halfway_in_reward() -> None:
    found = match(np.full(3, 0.7), np.full(3, KL2 / 2), same([0.0, 1.0]), seed=0)
    assert found.prompts == 3
    assert not found.is_bound
    for value, expected in ((found.reward, 0.5), (found.lead, 0.2), (found.kl, 0.7 * KL2)):
        assert (value.low, value.mean, value.high) == pytest.approx((expected,) * 3)


def test_beyond_the_largest_n_its_reward_stands_as_a_bound() -> None:
    found = match(np.full(3, 0.5), np.full(3, 5.0), same([0.0, 1.0]), seed=0)
    assert found.is_bound
    assert (found.reward.mean, found.lead.mean) == (1.0, -0.5)
    assert found.kl.mean == pytest.approx(KL2 / 2)


def test_a_reward_that_best_of_n_does_not_reach_is_infinitely_far() -> None:
    found = match(np.full(3, 2.0), np.full(3, KL2), same([0.0, 1.0]), seed=0)
    assert (found.lead.mean, found.kl.mean, found.kl.low, found.kl.high) == (1.0, math.inf, math.inf, math.inf)


@pytest.mark.parametrize("reward", [-1.0, 0.0])
def test_a_policy_no_better_than_the_baseline_could_have_stayed_there(reward: float) -> None:
    assert match(np.full(3, reward), np.full(3, 0.1), same([0.0, 1.0]), seed=0).kl.mean == 0.0


def test_a_sampled_kl_below_zero_is_read_at_zero() -> None:
    assert match(np.full(3, 0.5), np.full(3, -0.01), same([0.25, 1.0]), seed=0).reward.mean == 0.25


def test_the_lead_is_paired_by_prompt() -> None:
    """Prompts differ by hundreds, the policy is 1 above best-of-n in every one."""
    hard_and_easy = np.arange(10) * 100.0
    found = match(hard_and_easy + 2, np.full(10, KL2), np.stack([hard_and_easy, hard_and_easy + 1], axis=1), seed=0)
    assert (found.lead.low, found.lead.mean, found.lead.high) == pytest.approx((1.0, 1.0, 1.0))
    assert found.reward.high - found.reward.low > 100


def test_prompts_with_a_failure_on_either_side_are_left_out() -> None:
    rewards, kls = np.array([0.5, NAN, 0.5]), np.full(3, KL2)
    found = match(rewards, kls, np.array([[0.0, 1.0], [0.0, 9.0], [NAN, NAN]]), seed=0)
    assert (found.prompts, found.reward.mean) == (1, 1.0)
    with pytest.raises(ValueError, match="must have a prompt whose replies are all scored, got none"):
        match(np.full(2, NAN), np.zeros(2), same([0.0, 1.0], 2), seed=0)
