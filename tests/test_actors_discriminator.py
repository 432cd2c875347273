"""The discriminator: it learns what the formula says, from what was said alone, and repeats to the bit."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.config import ManagerConfig
from actors.manager.discriminator import BUCKETS, MAX_WEIGHT, Discriminator, HashedWords
from actors.manager.turns import Turns
from manager_helpers import make_turns, replace

OPTIONS = ("a", "b", "c")


def make(options: tuple[str, ...] = OPTIONS, **settings: float) -> Discriminator:
    return Discriminator(ManagerConfig(options=options, **{"diversity_coef": 0.5} | settings))


def bucket(*tokens: int) -> int:
    """The hash of a token or a pair, in whole numbers without bounds."""
    mixed = 0
    for token in tokens:
        mixed = (mixed ^ (token + 1)) * 0x9E3779B97F4A7C15 % 2**64
        mixed = (mixed ^ (mixed >> 29)) * 0xC2B2AE3D27D4EB4F % 2**64
    return mixed * BUCKETS // 2**64


def slow_words(utterance: list[int]) -> dict[int, float]:
    """Bucket -> value, of the entries that are not 0."""
    counts = Counter([*map(bucket, utterance), *map(bucket, utterance, utterance[1:])])
    length = math.sqrt(sum(count**2 for count in counts.values()))
    return {place: count / length for place, count in counts.items()}


def slow_log_q(weight: np.ndarray, row: dict) -> list[float]:
    words = slow_words(row["utterance"])
    logits = [sum(float(own[place]) * value for place, value in words.items()) for own in weight]
    total = math.log(sum(math.exp(x) for x, on_offer in zip(logits, row["offered"], strict=True) if on_offer))
    return [x - total if on_offer else -math.inf for x, on_offer in zip(logits, row["offered"], strict=True)]


def test_words_are_counted_hashed_and_scaled_as_in_a_slow_loop() -> None:
    utterances = [[5, 9, 5, 9, 5], [7], [0, 0], [2**31 - 1, 50256, 0, 3]]
    tokens, offsets = np.concatenate(utterances).astype(np.int32), np.array([0, 5, 6, 8, 12])
    found = HashedWords.of(tokens, offsets)
    for row, utterance in enumerate(utterances):
        own = found.row == row
        assert dict(zip(found.bucket[own].tolist(), found.value[own].tolist(), strict=True)) == slow_words(utterance)
    assert slow_words([7]) == {bucket(7): 1.0}
    assert len(slow_words([5, 9, 5, 9, 5])) == 4, "two tokens, and their pairs in both orders; none across utterances"


def test_buckets_are_used_evenly() -> None:
    tokens = np.arange(3 * BUCKETS, dtype=np.int32)
    used = np.bincount(HashedWords.of(tokens, np.array([0, len(tokens)])).bucket, minlength=BUCKETS)
    assert used.mean() > 0.99, "six entries a bucket leave 1 of 400 empty"


@pytest.mark.parametrize("offer", [1.0, 0.6])
def test_it_learns_and_scores_as_a_slow_loop_in_float64(offer: float) -> None:
    """Gradient and Adam written out, over two tables whose options were drawn unevenly."""
    rate, epochs = 0.1, 3
    found = make(discriminator_learning_rate=rate, discriminator_epochs=epochs)
    weight, first, second, steps = *(np.zeros((3, BUCKETS)) for _ in range(3)), 0
    for seed in range(2):
        table = make_turns(10, seed=seed, offer=offer, heard=True)
        uneven = [-0.3 if option == 1 else -6.0 for option in table["option"].to_pylist()]
        table = replace(table, "option_logprob", uneven)
        rows = table.to_pylist()
        before = [slow_log_q(weight, row) for row in rows]
        own = [log_q[row["option"]] for log_q, row in zip(before, rows, strict=True)]
        np.testing.assert_allclose(found.log_q(Turns(table)), own, atol=1e-5)
        report = found.learn(Turns(table))

        importance = [min(1 / sum(r["offered"]) / math.exp(r["option_logprob"]), MAX_WEIGHT) for r in rows]
        assert max(importance) == MAX_WEIGHT > 1 > min(importance)
        share = [each / sum(importance) for each in importance]
        gains = [log_q + math.log(sum(row["offered"])) for log_q, row in zip(own, rows, strict=True)]
        assert report.reward == pytest.approx(0.5 * sum(gains) / len(gains), abs=1e-5)
        assert report.loss == pytest.approx(-sum(s * log_q for s, log_q in zip(share, own, strict=True)), abs=1e-5)
        right = [log_q.index(max(log_q)) == row["option"] for log_q, row in zip(before, rows, strict=True)]
        assert report.accuracy == pytest.approx(sum(right) / len(right))
        for _ in range(epochs):
            gradient, steps = np.zeros((3, BUCKETS)), steps + 1
            for row, importance_share in zip(rows, share, strict=True):
                log_q = slow_log_q(weight, row)
                for option in range(3):
                    error = math.exp(log_q[option]) - (option == row["option"])
                    for place, value in slow_words(row["utterance"]).items():
                        gradient[option, place] += importance_share * error * value
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moved = np.sqrt(second / (1 - 0.999**steps)) + 1e-5
            weight = weight - rate * first / (1 - 0.9**steps) / moved
        np.testing.assert_allclose(found.weight.numpy(), weight, atol=2e-4)
    assert np.abs(weight).max() > 0.3


@pytest.mark.parametrize("on_offer", range(1, 9))
def test_untrained_it_knows_nothing_to_the_bit(on_offer: int) -> None:
    table = make_turns(4, options=8, heard=True)
    offered = [[(k - option) % 8 < on_offer for k in range(8)] for option in table["option"].to_pylist()]
    log_q = make(tuple("abcdefgh")).log_q(Turns(replace(table, "offered", offered)))
    assert not (torch.from_numpy(log_q) + torch.tensor(on_offer).double().log().float()).any()


def test_a_turn_s_bits_do_not_depend_on_its_neighbours_and_scoring_learns_nothing() -> None:
    found, table = make(), make_turns(9, seed=1, offer=0.7, heard=True)
    for seed in range(3):
        found.learn(Turns(make_turns(seed=seed, heard=True)))
    together = found.log_q(Turns(table))
    assert np.array_equal(found.log_q(Turns(table)), together)
    starts = np.append(np.flatnonzero(table["turn"].to_numpy() == 0), len(table))
    for start, stop in pairwise(starts):
        assert np.array_equal(found.log_q(Turns(table.slice(start, stop - start))), together[start:stop])


def test_it_hears_what_tells_options_apart_whichever_the_manager_prefers() -> None:
    """Utterances lean towards their option. Nine of ten options are `a`, and the weights make up for it."""
    found = make(discriminator_learning_rate=0.05)
    for seed in range(12):
        report = found.learn(Turns(make_turns(60, seed=seed, heard=True)))
    assert report.accuracy > 0.85
    assert 0.4 < report.reward / 0.5 < math.log(3)
    assert report.loss < 0.6

    def share_of_a(weighted: bool) -> float:
        """What it thinks of words that mean nothing, after it has heard them with 18 a, 1 b and 1 c."""
        option = [0] * 18 + [1, 2]
        logprobs = np.log(np.array([0.9, 0.05, 0.05]) if weighted else np.full(3, 1 / 3))[option]
        table = same_words(option, logprobs.astype(np.float32))
        deaf = make(discriminator_epochs=300)
        deaf.learn(Turns(table))
        return float(np.exp(deaf.log_q(Turns(table))[0]))

    assert share_of_a(True) == pytest.approx(1 / 3, abs=0.01)
    assert share_of_a(False) == pytest.approx(0.9, abs=0.01)


def same_words(options: list[int], logprobs: np.ndarray) -> pa.Table:
    """Conversations of one turn each, in which the same is said."""
    count = len(options)
    return Turns.of(
        {
            "sample_id": np.arange(count),
            "turn": np.zeros(count, np.int32),
            "features": [[0.0]] * count,
            "offered": [[True] * 3] * count,
            "option": options,
            "option_logprob": logprobs,
            "reward": np.zeros(count, np.float32),
            "terminated": [True] * count,
            "truncated": [False] * count,
            "last_features": [[]] * count,
            "utterance": [[4, 8]] * count,
        }
    ).table


def test_the_least_likely_option_takes_no_more_than_its_share() -> None:
    """Without a bound a probability of e^-200 would be the whole step, or no number at all."""
    table = same_words([0, 0, 1], np.array([-0.1, -0.1, -3e38], np.float32))
    found = make(discriminator_epochs=300)
    assert math.isfinite(found.learn(Turns(table)).loss)
    plain = math.exp(0.1) / 3
    expected = np.array([2 * plain, MAX_WEIGHT]) / (2 * plain + MAX_WEIGHT)
    np.testing.assert_allclose(np.exp(found.log_q(Turns(table)))[1:], expected, atol=0.01)


def test_permuting_options_permutes_what_is_learnt_and_one_never_on_offer_is_not_moved() -> None:
    order = np.array([2, 0, 1])  # option o is called order[o]
    own, other = make(), make()
    for seed in range(3):
        table = make_turns(seed=seed, options=3, offer=0.7, heard=True)
        offered = np.empty((len(table), 3), bool)
        offered[:, order] = Turns(table).offered
        renamed = replace(table, "offered", offered.tolist())
        renamed = replace(renamed, "option", order[table["option"].to_numpy()])
        own.learn(Turns(table))
        other.learn(Turns(renamed))
    torch.testing.assert_close(other.weight[order], own.weight, rtol=0, atol=1e-5)
    assert own.weight.abs().max() > 0.1

    table = make_turns(options=2, heard=True)
    never = make()
    never.learn(Turns(replace(table, "offered", [[*row, False] for row in table["offered"].to_pylist()])))
    assert not never.weight[2].any()
    assert never.weight[:2].any()


def test_what_was_said_must_be_known_of_all_turns_or_of_none() -> None:
    table = make_turns(2, heard=True)
    with pytest.raises(ValueError, match=r"Turns.utterance: must have a token in each row, or none in any, got \[\]"):
        Turns(replace(table, "utterance", [[], *table["utterance"].to_pylist()[1:]]))
