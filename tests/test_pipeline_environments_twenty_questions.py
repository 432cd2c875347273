"""Twenty questions: the game, and that the best play is the best."""

from __future__ import annotations

from functools import cache

import pytest

from pipeline.environments.registry import load_environment
from pipeline.environments.things import QUESTIONS, THINGS
from pipeline.environments.twenty_questions import (
    MAX_REPLIES,
    REPLY_COST,
    TwentyQuestions,
    best_reply,
    possible_after,
    prompts,
)
from pipeline.tasks.task import PromptText


def test_every_thing_is_told_from_every_other_one() -> None:
    assert len(THINGS) == len(set(THINGS.values())) == 32
    assert all(properties <= set(QUESTIONS) for properties in THINGS.values())
    assert len({prompt.text for prompt in prompts()}) == 1  # or the text would give the thing away


def test_a_game() -> None:
    environment = load_environment("twenty-questions")
    episodes, [first] = environment.reset([PromptText(text="", metadata={"thing": "radio"})], [0])
    assert first.text == "" and not first.over

    def say(reply: str) -> tuple[str, float, bool]:
        [turn] = environment.step(episodes, [reply])
        return turn.text, round(turn.reward, 6), turn.terminated

    assert say(" Is it alive? ") == ("No.", -0.02, False)
    assert say("Does it need power?") == ("Yes.", -0.02, False)
    assert say("Is it heavy?") == ("I do not understand.", -0.02, False)
    assert say("Is it the lamp?") == ("No.", -0.02, False)
    assert say("Is it the radio?") == ("Yes!", 0.98, True)


def test_a_game_ends_after_twenty_replies_and_the_seed_draws_what_the_prompt_does_not_name() -> None:
    environment = TwentyQuestions()
    [episode], _ = environment.reset([PromptText(text="", metadata={"thing": "cat"})], [0])
    turns = [environment.step([episode], ["Hm."])[0] for _ in range(MAX_REPLIES)]
    assert [turn.terminated for turn in turns] == [False] * 19 + [True]
    assert sum(turn.reward for turn in turns) == pytest.approx(-0.4)

    def answers(seed: int) -> str:
        [episode], _ = environment.reset([PromptText(text="", metadata={})], [seed])
        return "".join(environment.step([episode], [question])[0].text for question in QUESTIONS.values())

    assert answers(1) == answers(1)
    assert len({answers(seed) for seed in range(40)}) > 15
    [_], [turn] = environment.reset([PromptText(text="", metadata={"thing": "pope"})], [0])
    assert "thing: must be one of cat, eagle" in turn.failure


def test_the_best_play_is_worth_what_it_says_in_every_game() -> None:
    environment, total, longest = TwentyQuestions(), 0.0, 0
    for prompt in prompts():
        episodes, _ = environment.reset([prompt], [0])
        said: list[tuple[str, str]] = []
        while True:
            reply = best_reply(possible_after(said)).reply
            [turn] = environment.step(episodes, [reply])
            said.append((reply, turn.text))
            total += turn.reward
            if turn.over:
                break
        longest = max(longest, len(said))
    assert total / len(THINGS) == pytest.approx(best_reply().value) == pytest.approx(0.889375)
    assert longest == best_reply().replies == 8 < MAX_REPLIES


@pytest.mark.parametrize("first", range(0, 24, 8))
def test_the_best_play_is_what_exhaustive_search_finds(first: int) -> None:
    """Of eight things, with every reply tried and no bound used."""
    names = frozenset(list(THINGS)[first : first + 8])

    @cache
    def value(possible: frozenset[str]) -> float:
        size = len(possible)
        if size == 0:
            return 0.0
        found = [1 / size + (size - 1) / size * value(possible - {thing}) for thing in possible]
        for name in QUESTIONS:
            yes = frozenset(thing for thing in possible if name in THINGS[thing])
            if 0 < len(yes) < size:
                found.append(len(yes) / size * value(yes) + (1 - len(yes) / size) * value(possible - yes))
        return max(found) - REPLY_COST

    assert best_reply(names).value == pytest.approx(value(names), abs=1e-12)
