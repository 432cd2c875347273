"""Conversations in the built-in engine: every turn goes on where the last one ended, whatever else is in the slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from actors.config import RolloutConfig, SamplingConfig
from actors.engine.protocol import Answer, Completion, Request, Turn
from actors.engine.torch_engine import TorchEngine

CONTEXT = 96
SAMPLING = SamplingConfig(max_new_tokens=6)
MODELS = {"gpt2": tiny_models.save_gpt2, "llama": tiny_models.save_llama}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


def engine(folder: Path, slots: int = 8) -> TorchEngine:
    return TorchEngine(str(folder), RolloutConfig(slots=slots), torch.device("cpu"))


def requests(samples: int = 21) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size=int(rng.integers(1, 20))).astype(np.int32) for _ in range(samples)]
    return [Request(sample_id=i, group_id=i, prompt=prompt) for i, prompt in enumerate(prompts)]


class Talker:
    """Answers with what it heard, turned round, in as many turns as the sample's number says; slowly, if asked to."""

    def __init__(self, turns: int = 4, delay: int = 0, length: int = 5) -> None:
        self.turns, self.delay, self.length = turns, delay, length
        self.queue: deque[Turn] = deque()
        self.heard: list[Turn] = []
        self.asked = 0

    def hear(self, turns: Sequence[Turn]) -> None:
        self.queue.extend(turns)
        self.heard.extend(turns)

    def answers(self, *, wait: bool) -> Sequence[Answer]:
        self.asked += 1
        if not wait and (self.asked % (self.delay + 1)):
            return []
        found = [self.queue.popleft() for _ in range(len(self.queue) if not self.delay else 1)]
        return [Answer(sample_id=turn.sample_id, tokens=self.say(turn)) for turn in found]

    def say(self, turn: Turn) -> np.ndarray | None:
        if turn.number + 1 >= 1 + turn.sample_id % self.turns:
            return None
        return np.resize(turn.tokens[::-1], turn.sample_id % (self.length + 1)).astype(np.int32)


def assert_same(left: Sequence[Completion], right: Sequence[Completion]) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a.sample_id, a.finish, a.turn_starts) == (b.sample_id, b.finish, b.turn_starts)
        for name in ("tokens", "sampled", "logprobs"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_logprobs_of_every_turn_are_those_of_one_pass_over_the_whole_conversation(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    talker = Talker()
    completions = engine(folder).generate(requests(), SAMPLING, seed=3, partner=talker)
    assert [len(c.turn_starts) for c in completions] == [1 + i % 4 for i in range(21)]
    for request, completion in zip(requests(), completions, strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt, completion.tokens]).astype(np.int64))[None]
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0], -1)
        start = len(request.prompt)
        found = expected[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1).numpy()
        np.testing.assert_allclose(completion.logprobs[completion.sampled], found[completion.sampled], atol=1e-5)
        assert (completion.logprobs[~completion.sampled] == 0).all()
        turns = [turn for turn in talker.heard if turn.sample_id == request.sample_id]
        assert [turn.number for turn in turns] == list(range(len(completion.turn_starts)))
        for turn, begin in zip(turns, completion.turn_starts, strict=True):  # what was trained is what was heard
            end = begin + len(turn.tokens)
            np.testing.assert_array_equal(turn.tokens, completion.tokens[begin:end])
            assert completion.sampled[begin:end].all()
            assert not completion.sampled[end : end + 1].any() or end in completion.turn_starts


@pytest.mark.parametrize("slots", [8, 16])
def test_bits_do_not_depend_on_when_answers_come_nor_on_neighbours(folder: Path, slots: int) -> None:
    several = engine(folder, slots)
    whole = several.generate(requests(), SAMPLING, seed=3, partner=Talker())
    for delay in (1, 3):
        assert_same(several.generate(requests(), SAMPLING, seed=3, partner=Talker(delay=delay)), whole)
    alone = [several.generate([request], SAMPLING, seed=3, partner=Talker())[0] for request in requests()]
    assert_same(alone, whole)
    backwards = several.generate(requests()[::-1], SAMPLING, seed=3, partner=Talker())
    assert_same(backwards[::-1], whole)


def test_a_single_turn_is_what_it_is_without_a_partner(folder: Path) -> None:
    one = engine(folder)
    assert_same(
        one.generate(requests(), SAMPLING, seed=3, partner=Talker(turns=1)), one.generate(requests(), SAMPLING, seed=3)
    )


def test_an_answer_without_room_ends_the_conversation_and_keeps_what_was_said(folder: Path) -> None:
    class Wordy(Talker):
        def say(self, turn: Turn) -> np.ndarray:
            return np.full(20, 7, np.int32)

    talker = Wordy()
    for completion, request in zip(
        engine(folder).generate(requests(), SAMPLING, seed=3, partner=talker), requests(), strict=True
    ):
        turns = [turn for turn in talker.heard if turn.sample_id == request.sample_id]
        assert turns[-1].room < 20 <= min(turn.room for turn in turns[:-1])
        assert completion.finish == ("stop" if completion.tokens[-1] == 256 else "length"), "as the turn itself ended"
        assert completion.sampled[-1]
        assert len(request.prompt) + len(completion.tokens) <= CONTEXT
        last = completion.tokens[completion.turn_starts[-1] :]
        np.testing.assert_array_equal(last, turns[-1].tokens)


def test_each_turn_has_random_numbers_of_its_own(folder: Path) -> None:
    """The same words in every state would follow from numbers that are drawn anew for each turn."""

    class Same(Talker):
        def say(self, turn: Turn) -> np.ndarray | None:
            return None if turn.number == 3 else np.full(4, 9, np.int32)

    [completion] = engine(folder).generate(requests(1), SAMPLING, seed=3, partner=Same())
    first = [completion.tokens[start] for start in completion.turn_starts]
    assert len(set(first)) > 1


def test_the_number_of_slots_changes_no_bit(folder: Path) -> None:
    few, many = (engine(folder, slots).generate(requests(), SAMPLING, seed=3, partner=Talker()) for slots in (8, 24))
    assert_same(few, many)
