"""Reward shaping against slow loops and the papers' own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.algorithms.shaping import ShapingConfig, shape_scores, shape_token_rewards
from random_inputs import random_inputs

number = st.floats(-10, 10, width=32)


def slow(shaping: ShapingConfig, score: float, stopped: bool, length: int, longest: int) -> float:
    if shaping.clip:
        score = min(max(score, -shaping.clip), shaping.clip)
    if not stopped and shaping.missing_eos == "replace":
        score = shaping.eos_penalty
    if not stopped and shaping.missing_eos == "add":
        score += shaping.eos_penalty
    start = longest - shaping.overlong_tokens
    if shaping.overlong_tokens and length > start:
        score -= shaping.overlong_penalty * min((length - start) / shaping.overlong_tokens, 1)
    return score


@random_inputs(500)
@given(
    st.lists(st.tuples(number, st.booleans(), st.integers(0, 30)), max_size=6),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from(["keep", "replace", "add"]),
    st.sampled_from([0, 1, 7, 20]),
)
def test_scores_equal_the_loop(rows: list[tuple[float, bool, int]], clip: float, missing: Any, overlong: int) -> None:
    shaping = ShapingConfig(
        clip=clip, missing_eos=missing, eos_penalty=-1.5, overlong_tokens=overlong, overlong_penalty=0.5
    )
    scores, stopped, lengths = (
        torch.tensor([row[i] for row in rows], dtype=kind)
        for i, kind in enumerate((torch.float64, torch.bool, torch.int64))
    )
    expected = [slow(shaping, *row, 20) for row in rows]
    assert shape_scores(shaping, scores, stopped, lengths, 20).tolist() == pytest.approx(expected)


def test_the_soft_penalty_is_the_papers() -> None:
    """Yu et al. 2025, eq. 13, with their 16384 tokens of expected length and a cache of 4096."""
    lengths = torch.tensor([100, 16384, 18432, 20480, 20481])
    out = shape_scores(
        ShapingConfig(overlong_tokens=4096), torch.zeros(5), torch.ones(5, dtype=torch.bool), lengths, 20480
    )
    assert out.tolist() == [0, 0, -0.5, -1, -1]


def test_nothing_is_done_unless_it_is_asked_for() -> None:
    scores = torch.tensor([100.0, -3.0])
    assert shape_scores(ShapingConfig(), scores, torch.tensor([False, True]), torch.tensor([9, 9]), 9) is scores
    assert shape_token_rewards(ShapingConfig(), scores, torch.tensor([True, False])) is scores


def test_scores_stay_float32() -> None:
    shaping = ShapingConfig(clip=1, missing_eos="replace", overlong_tokens=3)
    assert (
        shape_scores(shaping, torch.ones(2), torch.tensor([False, True]), torch.tensor([2, 9]), 9).dtype
        == torch.float32
    )


def test_whitening_golden() -> None:
    """The published numbers of whitening without a shift of the mean (unbiased), NaN in the padding."""
    rewards = torch.cat([torch.arange(12, 21).reshape(3, 3) / 10, torch.full((3, 1), float("nan"))], dim=1)
    mask = torch.tensor([[True, True, True, False]] * 3)
    out = shape_token_rewards(ShapingConfig(whiten="scale"), rewards, mask)
    assert np.round([out[0, 0].item(), out[2, 2].item()], 4).tolist() == [0.1394, 3.0606]
    assert shape_token_rewards(ShapingConfig(whiten="shift"), rewards, mask)[mask].mean().item() == pytest.approx(
        0, abs=1e-6
    )
    assert out[:, 3].tolist() == [0, 0, 0]
