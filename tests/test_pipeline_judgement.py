"""What a reward model is worth: constructed models whose worth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.preparation.reward_model_report import RewardModelReport, judge, wilson

RNG = np.random.default_rng(3)
COMPARISONS = 4000
LENGTHS = RNG.integers(1, 40, (COMPARISONS, 2)).tolist()  # of which neither is better


def judged(rewards: object, lengths: object = LENGTHS, scale: float = 1.0) -> RewardModelReport:
    return judge(np.asarray(rewards, float).tolist(), np.asarray(lengths).tolist(), scale)


def test_a_perfect_model() -> None:
    found = judged(np.tile([9.0, -9.0], (COMPARISONS, 1)))
    assert (found.accuracy.value, found.accuracy.high) == (1.0, 1.0)
    assert 0.998 < found.accuracy.low < 1
    assert [part.accuracy.value for part in found.by_length] == [1.0] * 5
    assert found.calibration_error < 1e-6
    assert found.prefers_longer == pytest.approx(0.5, abs=0.02)
    assert (found.comparisons, found.pairs, found.mean, found.std) == (COMPARISONS, COMPARISONS, 0.0, 9.0)


def test_a_model_that_guesses() -> None:
    found = judged(RNG.normal(size=(COMPARISONS, 2)))
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert found.accuracy.high - found.accuracy.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(COMPARISONS), rel=0.01)
    assert found.calibration_error > 0.1, "it is sure of what it does not know"
    assert all(part.observed.low < 0.52 and part.observed.high > 0.48 for part in found.calibration)


def test_a_model_that_only_likes_long_replies_shows() -> None:
    found = judged(LENGTHS)
    assert found.prefers_longer == 1.0
    assert [part.accuracy.value for part in (found.by_length[0], found.by_length[-1])] == [0.0, 1.0]
    assert [part.accuracy.value for part in found.by_length] == pytest.approx([part.longer for part in found.by_length])
    assert found.accuracy.value == pytest.approx(found.longer.value)
    assert sum(part.pairs for part in found.by_length) == COMPARISONS
    assert all(a.most < b.fewest for a, b in zip(found.by_length, found.by_length[1:], strict=False))


def test_a_model_whose_probabilities_are_true_is_calibrated_and_scaled_it_is_not() -> None:
    difference = RNG.normal(size=20_000) * 1.5
    right = RNG.random(20_000) < 1 / (1 + np.exp(-difference))  # Bradley-Terry
    rewards = np.stack([np.where(right, difference, -difference), np.zeros(20_000)], axis=1)
    lengths = np.ones((20_000, 2), int)
    true = judged(rewards, lengths)
    assert true.calibration_error < 0.02
    assert len(true.by_length) == 1, "all pairs are of one length"
    assert judged(rewards * 4, lengths).calibration_error > 0.05
    assert judged(rewards / 4, lengths, scale=4.0).calibration_error == pytest.approx(true.calibration_error)
    for part in true.calibration:
        assert part.low <= part.predicted <= part.high
        assert part.observed.low < part.predicted < part.observed.high


def test_a_ranking_counts_once_and_a_tie_is_half_right() -> None:
    found = judge([[3.0, 2.0, 1.0], [0.0, 1.0], [5.0, 5.0]], [[1, 2, 3], [1, 1], [2, 1]])
    assert (found.comparisons, found.pairs) == (3, 5)
    assert found.accuracy.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.accuracy.of == 3
    assert found.longer.value == pytest.approx((0 + 0.5 + 1) / 3)


def test_wilsons_interval_by_hand() -> None:
    """8 of 10: (0.8 + z^2/20 -+ z sqrt(0.016 + z^2/400)) / (1 + z^2/10) with z = 1.96."""
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one comparison, got none"):
        judge([], [])
    with pytest.raises(ValueError, match=r"must be finite, got \[1.0, nan\] in comparison 1"):
        judge([[0.0, 1.0], [1.0, math.nan]], [[1, 2], [1, 2]])
