"""Before and after: paired by prompt, with an interval that covers what it claims, and failures left out, never zero."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipeline.evaluation import Comparison, Interval, Report, bootstrap, compare

NAN = math.nan


def report(rewards: list[float], *, samples: int = 1, kl: float = NAN, word: str = "reply") -> Report:
    prompts = [f"prompt {i}" for i in range(len(rewards) // samples)]
    return Report(
        samples=samples,
        prompts=prompts,
        responses=[f"{word} {i}" for i in range(len(rewards))],
        rewards=np.array(rewards),
        kl=kl,
        distinct_2=0.5,
        response_tokens=8.0,
    )


def test_a_report_on_disk_is_the_report_to_the_bit() -> None:
    """It is kept for a run that goes on after it was broken off."""
    for kl in (NAN, 0.1 + 0.2):
        before = report([0.1 + 0.2, NAN, 1e-300, -0.0], kl=kl)
        after = Report.from_text(before.to_text())
        assert after.rewards.tobytes() == before.rewards.tobytes()
        assert after.rewards.dtype == np.float64
        assert repr(after) == repr(before)


def test_the_interval_covers_a_known_mean_about_95_times_in_100() -> None:
    """A skewed distribution of mean 2, 60 values a draw. 190 of 200 are expected; chance alone stays within 178 and 199."""
    random = np.random.default_rng(0)
    draws = [random.exponential(2.0, 60) for _ in range(200)]
    intervals = [bootstrap(values, seed, resamples=1000) for seed, values in enumerate(draws)]
    assert 178 <= sum(i.low <= 2.0 <= i.high for i in intervals) <= 199
    assert all(i.low < i.mean < i.high for i in intervals)


def test_the_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap(values, seed=0)
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean(), abs=1e-12)
    assert (interval.low, interval.high) == pytest.approx((interval.mean - half, interval.mean + half), abs=half / 20)


def test_the_interval_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap(values, seed=3) == bootstrap(values.copy(), seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_values_that_do_not_differ_leave_nothing_open() -> None:
    assert bootstrap(np.full(9, 0.25), seed=0) == Interval(mean=0.25, low=0.25, high=0.25)
    assert bootstrap(np.array([3.0]), seed=0) == Interval(mean=3.0, low=3.0, high=3.0)


def test_a_failed_reward_is_left_out() -> None:
    values = np.random.default_rng(3).normal(size=20)
    assert bootstrap(np.concatenate([[NAN], values, [NAN]]), seed=5) == bootstrap(values, seed=5)


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_no_reward_at_all_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^evaluation: must have at least one scored response, got none; see the reward workers' logs$"):
        bootstrap(np.array(values), seed=0)


def test_the_gain_is_paired() -> None:
    """Prompts differ by hundreds, every one gains exactly 1: the gain is certain though both means are not."""
    hard_and_easy = [float(100 * i) for i in range(10)]
    comparison = compare(report(hard_and_easy), report([r + 1 for r in hard_and_easy]), seed=0)
    assert comparison.gain == Interval(mean=1.0, low=1.0, high=1.0)
    assert comparison.before_reward.high - comparison.before_reward.low > 100
    assert (comparison.before_reward.mean, comparison.after_reward.mean) == (450.0, 451.0)


def test_a_prompt_counts_once_however_often_it_was_sampled() -> None:
    before, after = report([0, 2, 10, 10], samples=2), report([1, 3, 10, 14], samples=2)
    comparison = compare(before, after, seed=0)
    assert before.prompt_rewards.tolist() == [1.0, 10.0]
    assert (comparison.before_reward.mean, comparison.after_reward.mean, comparison.gain.mean) == (5.5, 7.0, 1.5)
    assert (comparison.gain.low, comparison.gain.high) == (1.0, 2.0)  # two prompts: each drawn twice is among the resamples


def test_a_failure_spoils_its_sample_then_its_prompt_then_its_pair() -> None:
    before = report([1, NAN, NAN, NAN, 5, 7], samples=2)
    after = report([2, 4, 3, 3, NAN, NAN], samples=2)
    assert before.prompt_rewards.tolist() == pytest.approx([1, NAN, 6], nan_ok=True)
    comparison = compare(before, after, seed=0)
    assert comparison.before_reward.mean == 3.5
    assert comparison.after_reward.mean == 3.0
    assert comparison.gain == Interval(mean=2.0, low=2.0, high=2.0)  # the first prompt is the only one with both


@pytest.mark.parametrize(("before", "after"), [([NAN, NAN], [1.0, 2.0]), ([1.0, 2.0], [NAN, NAN]), ([NAN, 2.0], [1.0, NAN])])
def test_without_one_complete_pair_there_is_no_comparison(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="must have at least one scored response"):
        compare(report(before), report(after), seed=0)


def test_different_prompts_cannot_be_compared() -> None:
    with pytest.raises(AssertionError, match="the same prompts"):
        compare(report([1, 2]), report([1, 2, 3]), seed=0)


def comparison() -> Comparison:
    return compare(report([0.0, 1.0, 2.0, 3.0], samples=2, word="old"), report([1.0, NAN, 2.0, 5.0], samples=2, kl=0.5, word="new"), seed=0)


def test_pairs_are_the_first_samples_of_the_first_prompts() -> None:
    pairs = comparison().pairs(9)
    assert [(p.prompt, p.before, p.after) for p in pairs] == [("prompt 0", "old 0", "new 0"), ("prompt 1", "old 2", "new 2")]
    assert len(comparison().pairs(1)) == 1
    assert comparison().pairs(0) == []


def test_the_record_is_plain_json() -> None:
    """Strict JSON, which knows no NaN: a reward that failed and a KL that was not measured are null."""
    found = comparison()
    record = json.loads(json.dumps(found.record(1), allow_nan=False))
    assert set(record) == {"prompts", "gain", "before", "after", "replies"}
    assert record["prompts"] == 2
    assert record["gain"] == {"mean": found.gain.mean, "low": found.gain.low, "high": found.gain.high}
    assert set(record["before"]) == {"reward", "kl", "distinct_2", "response_tokens", "rewards"}
    assert record["before"]["reward"]["mean"] == found.before_reward.mean == 1.5
    assert (record["before"]["kl"], record["after"]["kl"]) == (None, 0.5)
    assert record["before"]["rewards"] == [0.0, 1.0, 2.0, 3.0]
    assert record["after"]["rewards"] == [1.0, None, 2.0, 5.0]
    assert record["replies"] == [{"prompt": "prompt 0", "before": "old 0", "after": "new 0"}]
