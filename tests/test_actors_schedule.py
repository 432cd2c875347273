"""The learning rate's course, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from actors.learner.schedule import learning_rate


def rates(total: int, **options: Any) -> list[float]:
    return [
        learning_rate(i, total, **({"peak": 1.0, "schedule": "linear", "warmup_fraction": 0.0} | options))
        for i in range(total)
    ]


def test_linear_falls_to_one_step_above_zero() -> None:
    assert rates(5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_constant_stays_at_the_peak() -> None:
    assert rates(3, schedule="constant", peak=2e-5) == [2e-5] * 3


def test_cosine_halves_halfway() -> None:
    assert rates(4, schedule="cosine") == pytest.approx([1.0, 0.8535533906, 0.5, 0.1464466094])


def test_warmup_rises_without_a_wasted_update_and_meets_the_peak() -> None:
    assert rates(10, warmup_fraction=0.3) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    )


@pytest.mark.parametrize("update", [-1, 5])
def test_an_update_outside_the_run_is_refused(update: int) -> None:
    with pytest.raises(ValueError, match=f"total_updates = 5, got {update}"):
        learning_rate(update, 5, peak=1.0, schedule="linear", warmup_fraction=0.0)
