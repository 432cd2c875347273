"""Options in the built-in engine: one is chosen at the beginning of each turn, from the state of the last token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from actors.config import RolloutConfig, SamplingConfig
from actors.engine.protocol import Answer, Completion, OptionChooser, Request
from actors.engine.torch_engine import TorchEngine
from actors.manager.option_head import OptionHead
from actors.models.causal_lm import PolicyModel, TokenInputs, load_causal_lm
from actors.models.export import save_model
from actors.models.option_tokens import add_option_tokens, option_ids
from actors.models.tokenizer import load_tokenizer
from test_actors_conversations import CONTEXT, MODELS, SAMPLING, Talker, assert_same, engine, requests

NAMES = ("comfort", "ask", "joke")
WIDTH = 32


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    add_option_tokens(str(MODELS[request.param](root / "plain")), root / "model", NAMES)
    model: Any = load_causal_lm(str(root / "model"), torch.float32)
    tokenizer = load_tokenizer(str(root / "model"))
    torch.manual_seed(1)
    with torch.no_grad():  # as if trained: at first all options have the same embedding
        rows = model.get_input_embeddings().weight
        rows[list(option_ids(tokenizer, NAMES))] = rows.std() * torch.randn(len(NAMES), WIDTH)
    save_model(model, tokenizer, root / "trained")
    return root / "trained"


class Chooser:
    """A manager's head with random weights; it notes what it was asked."""

    def __init__(self, folder: Path, choose: Callable[[int, int], int] | None = None) -> None:
        """choose: the option of (sample, turn); None: drawn by the head."""
        self.tokens = option_ids(load_tokenizer(str(folder)), NAMES)
        rng = np.random.default_rng(5)
        weights = {
            "policy_weight": rng.normal(size=(len(NAMES), WIDTH)).astype(np.float32),
            "policy_bias": np.zeros(len(NAMES), np.float32),
        }
        self.head, self.fixed = OptionHead(weights), choose
        self.asked: dict[tuple[int, int], np.ndarray] = {}
        self.calls: list[int] = []

    def choose(self, features: np.ndarray, sample_ids: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert (features.dtype, sample_ids.dtype, turns.dtype) == (np.float32, np.int64, np.int32)
        assert features.shape == (len(sample_ids), WIDTH)
        assert turns.shape == sample_ids.shape
        keys = list(zip(sample_ids.tolist(), turns.tolist(), strict=True))
        assert not self.asked.keys() & set(keys), "each turn is chosen once"
        self.asked |= dict(zip(keys, features.copy(), strict=True))
        self.calls.append(len(keys))
        offered = np.ones((len(keys), len(NAMES)), np.bool_)
        options, logprobs = self.head.choose(features, offered, sample_ids, turns, seed=9)
        if self.fixed is not None:
            options = np.array([self.fixed(*key) for key in keys], np.int16)
        return options, logprobs

    def token_of(self, option: int) -> int:
        return self.tokens[option]


class Cut(Talker):
    """Breaks off every second conversation at the end of its turns, with a line or without; the others terminate."""

    def answers(self, *, wait: bool) -> Sequence[Answer]:
        found = []
        for answer in super().answers(wait=wait):
            if answer.tokens is None and answer.sample_id % 2:
                line = np.arange(answer.sample_id % 3, dtype=np.int32)
                answer = Answer(sample_id=answer.sample_id, tokens=line, is_last=True)
            found.append(answer)
        return found


def generate(
    folder: Path,
    chooser: OptionChooser,
    talker: Talker | None = None,
    *,
    asked: list[Request] | None = None,
    sampling: SamplingConfig = SAMPLING,
    slots: int = 8,
) -> list[Completion]:
    return engine(folder, slots).generate(
        requests() if asked is None else asked, sampling, seed=3, partner=talker or Cut(), chooser=chooser
    )


def assert_alike(left: Sequence[Completion], right: Sequence[Completion]) -> None:
    assert_same(left, right)
    for a, b in zip(left, right, strict=True):
        for name in ("options", "option_logprobs", "features"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.last_features is None) == (b.last_features is None)
        if a.last_features is not None:
            np.testing.assert_array_equal(a.last_features, b.last_features)


def test_options_stand_before_their_turns_and_are_chosen_once(folder: Path) -> None:
    chooser, talker = Chooser(folder), Cut()
    completions = generate(folder, chooser, talker)
    assert [len(c.turn_starts) for c in completions] == [1 + i % 4 for i in range(21)]
    assert len(chooser.asked) == sum(len(c.turn_starts) for c in completions)
    assert max(chooser.calls) > 1, "turns that begin together are chosen together"
    for c in completions:
        assert c.options.dtype == np.int16
        assert c.option_logprobs.dtype == c.features.dtype == np.float32
        assert c.options.shape == c.option_logprobs.shape == (len(c.turn_starts),)
        controls = [start - 1 for start in c.turn_starts]
        assert c.tokens[controls].tolist() == [chooser.tokens[option] for option in c.options]
        assert not c.sampled[controls].any()
        assert (c.logprobs[controls] == 0).all()
        assert np.flatnonzero(np.isin(c.tokens, chooser.tokens)).tolist() == controls
        for number, start in enumerate(c.turn_starts):
            np.testing.assert_array_equal(c.features[number], chooser.asked[c.sample_id, number])
            heard = next(turn for turn in talker.heard if (turn.sample_id, turn.number) == (c.sample_id, number))
            np.testing.assert_array_equal(heard.tokens, c.tokens[start : start + len(heard.tokens)])
            assert 1 <= len(heard.tokens) <= SAMPLING.max_new_tokens
            assert c.sampled[start : start + len(heard.tokens)].all()
        assert c.sampled.sum() == sum(len(t.tokens) for t in talker.heard if t.sample_id == c.sample_id)
        offered = np.ones((len(controls), 3), np.bool_)
        again = chooser.head.choose(
            c.features, offered, np.full(len(controls), c.sample_id), np.arange(len(controls), dtype=np.int32), seed=9
        )
        np.testing.assert_array_equal(again.options, c.options)
        np.testing.assert_array_equal(again.logprobs, c.option_logprobs)
    assert len({option for c in completions for option in c.options.tolist()}) > 1


def test_features_and_log_probs_are_those_of_one_pass_over_the_whole_conversation(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    chooser = Chooser(folder)
    for request, c in zip(requests(), generate(folder, chooser), strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt, c.tokens]).astype(np.int64))[None]
        start = len(request.prompt)
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0].numpy()
            logits = model(ids).logits[0]
        before = [start + turn - 2 for turn in c.turn_starts]  # the token before the control token
        np.testing.assert_allclose(c.features, hidden[before], atol=1e-4, rtol=1e-4)
        if c.last_features is not None:
            np.testing.assert_allclose(c.last_features, hidden[-1], atol=1e-4, rtol=1e-4)
        logits[:, list(chooser.tokens)] = -torch.inf
        expected = torch.log_softmax(logits, -1)[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1).numpy()
        np.testing.assert_allclose(c.logprobs[c.sampled], expected[c.sampled], atol=2e-5)


def test_log_probs_are_those_of_the_learner(folder: Path) -> None:
    policy = PolicyModel(load_causal_lm(str(folder), torch.float32), 0.7)
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.7)
    for request, c in zip(requests(), generate(folder, Chooser(folder), sampling=sampling), strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt, c.tokens]).astype(np.int64))
        places = torch.from_numpy(len(request.prompt) + np.flatnonzero(c.sampled))
        with torch.no_grad():
            found, _ = policy(TokenInputs(input_ids=ids[None], states=places - 1, targets=ids[places]))
        np.testing.assert_allclose(c.logprobs[c.sampled], found, atol=2e-5)


def test_a_conversation_that_was_broken_off_has_last_features_and_no_other_has(folder: Path) -> None:
    completions = generate(folder, Chooser(folder))
    for c in completions:
        if c.sample_id % 2:
            assert c.last_features is not None
            assert c.last_features.shape == (WIDTH,)
            assert c.last_features.dtype == np.float32
        else:
            assert c.last_features is None
    lines = {c.sample_id % 3 for c in completions if c.sample_id % 2}
    assert lines == {0, 1, 2}, "also without a line, where the last token is the policy's own"


def test_the_policy_continues_the_control_token(folder: Path) -> None:
    """Another option before the second turn changes that turn, and nothing before it."""
    one, other = (
        generate(folder, Chooser(folder, lambda sample, turn, second=second: second if turn == 1 else 0))
        for second in (0, 2)
    )
    changed = 0
    for a, b in zip(one, other, strict=True):
        end = a.turn_starts[1] - 1 if len(a.turn_starts) > 1 else len(a.tokens)
        np.testing.assert_array_equal(a.tokens[:end], b.tokens[:end])
        np.testing.assert_array_equal(a.logprobs[:end], b.logprobs[:end])
        changed += len(a.turn_starts) > 1 and not np.array_equal(a.tokens[end + 1 :], b.tokens[end + 1 :])
    assert changed > 5


@pytest.mark.parametrize("slots", [8, 16])
def test_bits_do_not_depend_on_when_answers_come_nor_on_neighbours(folder: Path, slots: int) -> None:
    whole = generate(folder, Chooser(folder), slots=slots)
    for delay in (1, 3):
        assert_alike(generate(folder, Chooser(folder), Cut(delay=delay), slots=slots), whole)
    backwards = generate(folder, Chooser(folder), asked=requests()[::-1], slots=slots)
    assert_alike(backwards[::-1], whole)
    several = engine(folder, slots)
    chunks = [
        several.generate(requests()[begin : begin + 4], SAMPLING, seed=3, partner=Cut(), chooser=Chooser(folder))
        for begin in range(0, 21, 4)
    ]
    assert_alike([c for chunk in chunks for c in chunk], whole)
    alone = [
        several.generate([request], SAMPLING, seed=3, partner=Cut(), chooser=Chooser(folder))[0]
        for request in requests()
    ]
    assert_alike(alone, whole)


def test_the_number_of_slots_changes_no_bit(folder: Path) -> None:
    few, many = (generate(folder, Chooser(folder), slots=slots) for slots in (8, 24))
    assert_alike(few, many)


def test_samples_of_one_prompt_choose_for_themselves(folder: Path) -> None:
    prompt = np.arange(7, dtype=np.int32)
    group = [Request(sample_id=i, group_id=0, prompt=prompt) for i in range(12)]
    completions = generate(folder, Chooser(folder), asked=group)
    for c in completions[1:]:
        np.testing.assert_array_equal(c.features[0], completions[0].features[0])
    assert len({int(c.options[0]) for c in completions}) > 1


def test_without_a_chooser_nothing_of_options_is_there(folder: Path) -> None:
    for c in engine(folder).generate(requests(), SAMPLING, seed=3, partner=Cut()):
        assert (c.options.shape, c.option_logprobs.shape, c.features.shape) == ((0,), (0,), (0, 0))
        assert c.last_features is None
        assert c.turn_starts[0] == 0
    with pytest.raises(AssertionError, match="chooser: must come with a partner"):
        engine(folder).generate(requests(), SAMPLING, seed=3, chooser=Chooser(folder))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_control_tokens_are_not_sampled_even_if_they_are_the_likeliest(folder: Path, temperature: float) -> None:
    one, chooser = engine(folder), Chooser(folder)
    made = []

    def raise_controls(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        made.append(logits.index_fill(-1, torch.tensor(chooser.tokens), 1e30))
        return made[-1]

    one.model.get_output_embeddings().register_forward_hook(raise_controls)
    sampling = SamplingConfig(max_new_tokens=6, temperature=temperature)
    completions = one.generate(requests(), sampling, seed=3, partner=Cut(), chooser=chooser)
    assert all(bool(torch.isin(logits.argmax(-1), torch.tensor(chooser.tokens)).all()) for logits in made)
    assert len(made) > 20
    for c in completions:
        assert not np.isin(c.tokens[c.sampled], chooser.tokens).any()
        assert np.isfinite(c.logprobs).all()


def test_a_control_token_that_the_policy_could_say_is_refused(folder: Path) -> None:
    class Other(Chooser):
        def token_of(self, option: int) -> int:
            return 65 + option

    with pytest.raises(ValueError, match=r"in suppress_tokens of its generation_config.json, got none for token 6"):
        generate(folder, Other(folder))


class Wordy(Talker):
    """Answers as many tokens as there is room for, and more if asked to; ends the conversation with that, or not."""

    def __init__(self, more: int, *, is_last: bool = False) -> None:
        super().__init__()
        self.more, self.is_last = more, is_last

    def answers(self, *, wait: bool) -> Sequence[Answer]:
        found, self.queue = list(self.queue), type(self.queue)()
        lines = {t.sample_id: np.full(max(t.room, 0) + self.more, 7, np.int32) for t in found}
        return [Answer(sample_id=sample, tokens=line, is_last=self.is_last) for sample, line in lines.items()]


def test_an_answer_leaves_room_for_a_control_token_and_one_sampled_token(folder: Path) -> None:
    for request, c in zip(requests(), generate(folder, Chooser(folder), Wordy(0)), strict=True):
        assert len(request.prompt) + len(c.tokens) == CONTEXT
        assert len(c.turn_starts) == 2
        assert c.turn_starts[1] == len(c.tokens) - 1
        assert c.sampled[-1]
        assert c.finish == ("stop" if c.tokens[-1] == 256 else "length")
    for request, c in zip(requests(), generate(folder, Chooser(folder), Wordy(1)), strict=True):
        assert len(c.turn_starts) == len(c.options) == 1, "one token more, and there is no room"
        assert c.last_features is None
        assert c.finish == ("stop" if c.tokens[-1] == 256 else "length")
        assert len(request.prompt) + len(c.tokens) < CONTEXT


def test_a_last_answer_may_have_one_token_more(folder: Path) -> None:
    talkers = defaultdict(list)
    for more in (1, 2):
        for c in generate(folder, Chooser(folder), Wordy(more, is_last=True)):
            talkers[more].append((c.last_features is not None, c.tokens[-1] == 7 and not c.sampled[-1]))
    assert set(talkers[1]) == {(True, True)}
    assert {has for has, _ in talkers[2]} == {False}


def test_a_prompt_leaves_room_for_a_control_token_and_one_sampled_token(folder: Path) -> None:
    def of(length: int) -> list[Request]:
        return [Request(sample_id=0, group_id=0, prompt=np.zeros(length, np.int32))]

    [c] = generate(folder, Chooser(folder), asked=of(CONTEXT - 2))
    assert c.sampled.tolist() == [False, True]
    with pytest.raises(ValueError, match="context of 95 tokens without the control token, got 95 tokens for sample 0"):
        generate(folder, Chooser(folder), asked=of(CONTEXT - 1))


def test_states_that_are_not_finite_name_their_sample(folder: Path) -> None:
    broken = engine(folder)
    for parameter in broken.model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="features of sample 0 are not finite; the weights have diverged"):
        broken.generate(requests(), SAMPLING, seed=3, partner=Cut(), chooser=Chooser(folder))


def test_bfloat16_features_are_float32(tmp_path: Path) -> None:
    add_option_tokens(str(tiny_models.save_llama(tmp_path / "plain")), tmp_path / "model", NAMES)
    one = TorchEngine(str(tmp_path / "model"), RolloutConfig(slots=8, dtype="bfloat16"), torch.device("cpu"))
    for c in one.generate(requests(3), SAMPLING, seed=3, partner=Cut(), chooser=Chooser(tmp_path / "model")):
        assert c.features.dtype == np.float32
