"""The sampler draws from exactly the distribution it reports, with one uniform number a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.config import SamplingConfig
from actors.engine.sampler import BLOCK, keep_top_k, keep_top_p, sample, uniforms
from random_inputs import random_inputs


def reference_top_k(logits: np.ndarray, k: int) -> set[int]:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    return {i for i in range(len(logits)) if logits[i] >= logits[order[k - 1]]}


def reference_top_p(logits: np.ndarray, p: float) -> set[int]:
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    kept, mass = set(), 0.0
    for i in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if mass >= p:
            break
        kept.add(i)
        mass += probabilities[i]
    least = min(logits[i] for i in kept)
    return {i for i in range(len(logits)) if logits[i] >= least}


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in logits]


def test_frequencies_match_the_softmax() -> None:
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=7).astype(np.float32))
    draws = 40_000
    tokens, logprobs = sample(
        logits.expand(draws, -1), torch.from_numpy(generator.random(draws)), SamplingConfig(temperature=0.8)
    )
    expected = torch.softmax(logits.double() / 0.8, -1)
    observed = torch.bincount(tokens, minlength=7)
    chi_square = float(((observed - draws * expected) ** 2 / (draws * expected)).sum())
    assert chi_square < 22.46  # 6 degrees of freedom, p = 0.001
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-6, rtol=0)


@pytest.mark.parametrize("vocabulary", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_every_uniform_lands_where_the_exact_running_sum_says(vocabulary: int) -> None:
    generator = np.random.default_rng(vocabulary)
    logits = torch.from_numpy(3 * generator.normal(size=(512, vocabulary)).astype(np.float32))
    uniform = generator.random(512)
    tokens, _ = sample(logits, torch.from_numpy(uniform), SamplingConfig())
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1).numpy()
    chosen = np.arange(512), tokens.numpy()
    below = np.where(tokens.numpy() > 0, cumulative[chosen[0], chosen[1] - 1], 0.0)
    assert (below - 1e-6 <= uniform).all()
    assert (uniform <= cumulative[chosen] + 1e-6).all()


@random_inputs(60)
@given(
    seed=st.integers(0, 2**32 - 1),
    uniform=st.sampled_from([0.0, 5e-324, 0.25, 0.5, 1 - 2**-53]),
    vocabulary=st.sampled_from([3, 300, 1000]),
)
def test_a_token_of_probability_zero_is_never_drawn(seed: int, uniform: float, vocabulary: int) -> None:
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(10 * generator.normal(size=(16, vocabulary)).astype(np.float32))
    logits[torch.from_numpy(generator.random((16, vocabulary)) < 0.9)] = -torch.inf
    logits[:, int(generator.integers(vocabulary))] = 1.0
    tokens, logprobs = sample(logits, torch.full((16,), uniform, dtype=torch.float64), SamplingConfig())
    assert torch.isfinite(logits.gather(-1, tokens[:, None])).all()
    assert torch.isfinite(logprobs).all()


@random_inputs(60)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 40), p=st.floats(0.05, 0.99), ties=st.booleans())
def test_top_k_and_top_p_keep_exactly_the_reference_sets(seed: int, k: int, p: float, ties: bool) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 40)).astype(np.float32) * 2)
    logits = logits.round() if ties else logits
    assert kept(keep_top_k(logits, k)) == [reference_top_k(row, k) for row in logits.numpy()]
    assert kept(keep_top_p(logits, p)) == [reference_top_p(row, p) for row in logits.numpy()]


def test_top_p_widens_its_search_until_the_set_is_complete() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32) * 0.1)
    assert kept(keep_top_p(logits, 0.9)) == [reference_top_p(row, 0.9) for row in logits.numpy()]
    assert min(len(s) for s in kept(keep_top_p(logits, 0.9))) > 8 * BLOCK


def test_filters_apply_after_temperature_k_before_p_and_logprobs_are_renormalised() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    config = SamplingConfig(temperature=0.5, top_k=3, top_p=0.8)  # squares: 16, 9, 4 of 29; the first two reach 0.8
    drawn = {
        round(u, 2): sample(logits, torch.tensor([u], dtype=torch.float64), config) for u in (0.0, 0.63, 0.65, 0.99)
    }
    assert [int(t) for t, _ in drawn.values()] == [0, 0, 1, 1]
    assert float(drawn[0.0][1]) == pytest.approx(np.log(16 / 25), abs=1e-6)


def test_temperature_zero_takes_the_likeliest_and_reports_the_untempered_logprob() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, logprobs = sample(logits, torch.tensor([0.99], dtype=torch.float64), SamplingConfig(temperature=0, top_k=1))
    assert tokens.tolist() == [1]
    assert float(logprobs) == pytest.approx(float(torch.log_softmax(logits, -1)[0, 1]), abs=1e-6)


def test_uniforms_depend_on_seed_and_sample_alone_and_extend_each_other() -> None:
    np.testing.assert_array_equal(uniforms(3, 7, 10), uniforms(3, 7, 50)[:10])
    assert len({float(uniforms(seed, sample_id, 1)[0]) for seed in range(-5, 20) for sample_id in range(50)}) == 25 * 50
    many = np.concatenate([uniforms(1, i, 32) for i in range(2000)])
    assert abs(many.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.02


def test_a_row_is_drawn_alike_in_any_company() -> None:
    generator = np.random.default_rng(2)
    logits = torch.from_numpy(generator.normal(size=(64, 1000)).astype(np.float32))
    uniform = torch.from_numpy(generator.random(64))
    config = SamplingConfig(temperature=0.9, top_k=300, top_p=0.95)
    tokens, logprobs = sample(logits, uniform, config)
    order = torch.from_numpy(generator.permutation(64))
    again = sample(logits[order], uniform[order], config)
    assert torch.equal(again[0], tokens[order])
    assert torch.equal(again[1], logprobs[order])


def test_logits_that_are_not_finite_show_in_the_logprob() -> None:
    _, logprobs = sample(
        torch.tensor([[0.0, torch.nan, 1.0], [0.0, 0.0, 1.0]]),
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        SamplingConfig(),
    )
    assert torch.isfinite(logprobs).tolist() == [False, True]
