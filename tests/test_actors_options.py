"""The choice of options in a rollout worker, and the table of turns."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.sampler import uniforms
from actors.manager.option_head import OptionHead, load_head, option_uniform, save_head
from actors.manager.turns import Turns
from actors.models.causal_lm import load_causal_lm
from actors.models.option_names import TRAINED_HEAD
from actors.models.option_tokens import add_option_tokens
from manager_helpers import make_turns, replace
from tiny_models import save_gpt2


def make_head(*, width: int = 20, options: int = 5, seed: int = 0) -> OptionHead:
    rng = np.random.default_rng(seed)
    return OptionHead(
        {
            "policy_weight": rng.normal(size=(options, width)).astype(np.float32),
            "policy_bias": rng.normal(size=options).astype(np.float32),
        }
    )


@given(rows=st.integers(1, 9), width=st.sampled_from([1, 7, 64, 257]), options=st.integers(1, 6), seed=st.integers(0))
def test_a_row_s_bits_do_not_depend_on_its_neighbours(rows: int, width: int, options: int, seed: int) -> None:
    head = make_head(width=width, options=options, seed=seed % 1000)
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(rows, width)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype(np.float32)
    offered = rng.random((rows, options)) < 0.7
    offered[:, 0] |= ~offered.any(1)
    samples, turns = rng.integers(0, 2**62, rows), rng.integers(0, 99, rows).astype(np.int32)
    logits, together = head.logits(features), head.choose(features, offered, samples, turns, seed=seed)
    for i in range(rows):
        one = slice(i, i + 1)
        alone = head.choose(features[one].copy(), offered[one], samples[one], turns[one], seed=seed)
        assert np.array_equal(head.logits(features[one].copy()), logits[one])
        assert np.array_equal(alone.options, together.options[one])
        assert np.array_equal(alone.logprobs, together.logprobs[one])
        assert offered[i, together.options[i]]


def test_logits_equal_the_formula() -> None:
    weight, h = np.array([[1, 0, 0, 0], [0, 2, 0, 1]], np.float32), np.array([[1, 2, 3, 6]], np.float32)
    head = OptionHead({"policy_weight": weight, "policy_bias": np.array([0.5, 0], np.float32)})
    normed = (h[0] - 3) / math.sqrt(3.5 + 1e-5)
    assert head.logits(h)[0].tolist() == pytest.approx([normed[0] + 0.5, 2 * normed[1] + normed[3]], abs=1e-6)


def test_options_are_drawn_with_their_probabilities_and_never_if_not_on_offer() -> None:
    head, draws = make_head(options=4), 20_000
    h = np.random.default_rng(1).normal(size=(1, 20)).astype(np.float32)
    offered = np.array([[True, False, True, True]])
    weights = np.where(offered[0], np.exp(0.3 * head.logits(h)[0].astype(np.float64)), 0)
    head = OptionHead(
        {"policy_weight": np.zeros((4, 20), np.float32), "policy_bias": (0.3 * head.logits(h)[0]).astype(np.float32)}
    )
    chosen = head.choose(
        np.repeat(h, draws, 0), np.repeat(offered, draws, 0), np.arange(draws), np.zeros(draws, np.int32), seed=3
    )
    shares = np.bincount(chosen.options, minlength=4) / draws
    expected = weights / weights.sum()
    assert shares[1] == 0
    np.testing.assert_allclose(shares, expected, atol=4 * math.sqrt(0.25 / draws))
    np.testing.assert_allclose(chosen.logprobs, np.log(expected[chosen.options]), atol=1e-6)


def test_options_begin_uniform() -> None:
    zeros = {"policy_weight": np.zeros((3, 20), np.float32), "policy_bias": np.zeros(3, np.float32)}
    h = np.random.default_rng(1).normal(size=(2, 20)).astype(np.float32)
    offered = np.array([[True, True, True], [False, True, True]])
    chosen = OptionHead(zeros).choose(h, offered, np.arange(2), np.zeros(2, np.int32), seed=0)
    assert chosen.logprobs.tolist() == pytest.approx([-math.log(3), -math.log(2)], abs=1e-7)


def test_greedy_takes_the_likeliest_option_on_offer_whatever_the_seed() -> None:
    weights = {"policy_weight": np.zeros((3, 2), np.float32), "policy_bias": np.array([0, 3, 1], np.float32)}
    h, offered = np.ones((2, 2), np.float32), np.array([[True, True, True], [True, False, True]])
    for seed in range(5):
        chosen = OptionHead(weights).choose(h, offered, np.arange(2), np.zeros(2, np.int32), seed=seed, greedy=True)
        assert chosen.options.tolist() == [1, 2]
        expected = [3 - math.log(1 + math.exp(3) + math.exp(1)), 1 - math.log(1 + math.exp(1))]
        assert chosen.logprobs.tolist() == pytest.approx(expected, abs=1e-6)


def test_random_numbers_depend_on_seed_sample_and_turn_alone_and_are_not_those_of_tokens() -> None:
    assert option_uniform(5, 7, 0) == option_uniform(5, 7, 0)
    found = {option_uniform(seed, sample, turn) for seed in (5, 6) for sample in range(20) for turn in range(20)}
    assert len(found) == 800
    assert found.isdisjoint({number for seed in (5, 6) for s in range(20) for number in uniforms(seed, s, 2000)})
    numbers = np.array([option_uniform(5, sample, turn) for sample in range(100) for turn in range(50)])
    assert 0 <= numbers.min() < 0.01 < 0.99 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    turns = numbers.reshape(100, 50)
    assert abs(np.corrcoef(turns[:, :-1].ravel(), turns[:, 1:].ravel())[0, 1]) < 0.05


def test_a_head_lies_beside_its_policy_and_one_that_is_lost_is_missed(tmp_path: Path) -> None:
    """A model that was not trained with a manager has no head, and its options are all alike."""
    save_gpt2(tmp_path, width=20)
    uniform = load_head(str(tmp_path), 5, 20)
    assert not uniform["policy_weight"].any() and not uniform["policy_bias"].any()
    assert uniform["policy_weight"].shape == (5, 20)
    assert not load_head("nobody/nothing", 5, 20)["policy_weight"].any()

    own = {"policy_weight": np.full((5, 20), 0.5, np.float32), "policy_bias": np.arange(5, dtype=np.float32)}
    before = json.loads((tmp_path / "config.json").read_text())
    save_head(tmp_path, own)
    found = load_head(str(tmp_path), 5, 20)
    assert all(np.array_equal(found[name], own[name]) for name in own)
    with pytest.raises(ValueError, match="must be the head of a manager of 4 options and 20 features"):
        load_head(str(tmp_path), 4, 20)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after == before | {TRAINED_HEAD: "option-head.safetensors"}

    (tmp_path / "option-head.safetensors").unlink()
    message = "must be a folder with the manager's head, option-head.safetensors, since the policy was trained with a"
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: {message} manager, got none; copy the file"):
        load_head(str(tmp_path), 5, 20)

    copied = tmp_path / "copied"  # by other programs
    load_causal_lm(str(tmp_path), torch.float32).save_pretrained(copied)
    with pytest.raises(ValueError, match=message):
        load_head(str(copied), 5, 20)


def test_a_run_that_begins_with_a_trained_policy_begins_with_a_new_manager(tmp_path: Path) -> None:
    policy, start = save_gpt2(tmp_path / "policy", width=20), tmp_path / "start"
    save_head(policy, {"policy_weight": np.ones((2, 20), np.float32), "policy_bias": np.ones(2, np.float32)})
    add_option_tokens(str(policy), start, ("x", "y"))
    assert not load_head(str(start), 2, 20)["policy_weight"].any()
    assert load_head(str(policy), 2, 20)["policy_weight"].all()


def test_a_head_refuses_what_it_cannot_choose_from() -> None:
    head, one = make_head(), np.zeros(1, np.int32)
    h, offered = np.ones((1, 20), np.float32), np.ones((1, 5), bool)
    with pytest.raises(ValueError, match="must offer an option in each row, got none in row 0"):
        head.choose(h, ~offered, one, one, seed=0)
    with pytest.raises(ValueError, match=r"offered: must be \(1, 5\), got \(1, 4\)"):
        head.choose(h, offered[:, :4], one, one, seed=0)
    with pytest.raises(ValueError, match="features: must be finite, got row 0"):
        head.choose(h * np.float32(np.inf), offered, one, one, seed=0)
    large = np.where(np.arange(20) == 0, np.float32(3e38), np.float32(0))
    huge = {"policy_weight": np.tile(large, (5, 1)), "policy_bias": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match="logits: must be finite, got row 0"):
        OptionHead(huge).choose(np.eye(20, dtype=np.float32)[:1], offered, one, one, seed=0)
    with pytest.raises(ValueError, match=r"features: must be \(rows, 20\), got \(1, 19\)"):
        head.logits(h[:, :19])
    with pytest.raises(ValueError, match="weights: must be finite"):
        OptionHead({"policy_weight": np.full((2, 3), np.nan, np.float32), "policy_bias": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="weights: must be float32"):
        OptionHead({"policy_weight": np.zeros((2, 3)), "policy_bias": np.zeros(2)})
    with pytest.raises(ValueError, match=r"weights: must be \[.*\], got"):
        OptionHead({"policy_weight": np.zeros((2, 3), np.float32)})


def changed(name: str, row: int, value: object) -> dict[str, object]:
    """A column of well-formed turns with one value replaced."""
    values = make_turns(4, seed=1)[name].to_pylist()
    values[row] = value
    return {name: values}


_TURNS = make_turns(4, seed=1).to_pylist()
_FIRST_END = next(i for i, row in enumerate(_TURNS) if row["terminated"] or row["truncated"])
_CUT = next(i for i, row in enumerate(_TURNS) if row["truncated"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (changed("sample_id", 0, 99), "Turns.sample_id: must not descend"),
        (changed("turn", 0, 1), "Turns.turn: must count from 0"),
        (changed("turn", 1, 2), "Turns.turn: must count from 0 within each conversation, got 2 in row 1"),
        (changed("features", 1, [1.0]), "Turns.features: must be as many as in the first row"),
        (changed("features", 1, [math.nan] * 12), "Turns.features: must be finite"),
        (changed("offered", 1, [True]), "Turns.offered: must be as many as in the first row"),
        (changed("option", 2, 3), "Turns.option: must be >= 0 and < 3, got 3 in row 2"),
        (changed("option", 2, -1), "Turns.option: must be >= 0 and < 3, got -1 in row 2"),
        (changed("offered", 0, [False] * 3), "Turns.option: must be an option that was offered"),
        (changed("option_logprob", 0, 0.1), "Turns.option_logprob: must be finite and <= 0"),
        (changed("option_logprob", 0, -math.inf), "Turns.option_logprob: must be finite and <= 0"),
        (changed("reward", 0, math.nan), "Turns.reward: must be finite, got nan in row 0"),
        (changed("terminated", 0, True), "Turns.terminated: must be false before a conversation's last turn"),
        (changed("truncated", 0, True), "Turns.truncated: must be false before a conversation's last turn"),
        (
            changed("terminated", _FIRST_END, False) | changed("truncated", _FIRST_END, False),
            "Turns.terminated: must be true in a conversation's last turn, unless `truncated` is",
        ),
        (changed("terminated", _CUT, True), "Turns.truncated: must be false where `terminated` is true"),
        (changed("last_features", _CUT, []), "Turns.last_features: must have the 12 features of the state after"),
        (changed("last_features", _CUT, [math.inf] * 12), "Turns.last_features: must be finite"),
        (changed("last_features", 0, [1.0] * 12), "Turns.last_features: must have the 12 features of the state after"),
    ],
)
def test_malformed_turns_are_refused(columns: dict[str, object], message: str) -> None:
    table = make_turns(4, seed=1)
    assert not table["terminated"][0].as_py()
    for name, values in columns.items():
        table = replace(table, name, values)
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        Turns(table)


def test_turns_give_their_arrays() -> None:
    turns = Turns(make_turns(4, seed=1))
    assert (turns.width, turns.options, len(turns.starts)) == (12, 3, 5)
    assert turns.features.tolist() == turns.table["features"].to_pylist()
    assert turns.offered.tolist() == turns.table["offered"].to_pylist()
    ends = [row for row in turns.table.to_pylist() if row["terminated"] or row["truncated"]]
    assert turns.last_features.tolist() == [row["last_features"] or [0.0] * 12 for row in ends]
    empty = Turns(Turns.schema.empty_table())
    assert (len(empty), empty.width, empty.options, len(empty.starts)) == (0, 0, 0, 1)
