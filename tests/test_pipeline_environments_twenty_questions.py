"""Twenty questions: the game, that the best play is the best, and the task that is made of it."""

from __future__ import annotations

import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.models.tokenizer import load_tokenizer
from conversation_helpers import assert_same_in_every_process
from pipeline.config.recipe import load, recipe_path
from pipeline.environments.registry import load_environment
from pipeline.environments.twenty_questions.game import (
    CONFUSED,
    FOUND,
    MAX_REPLIES,
    OPENING,
    REPLY_COST,
    Game,
    TwentyQuestions,
    guess_of,
    possible_after,
)
from pipeline.environments.twenty_questions.measures import measure_games, measure_table, shares_of_evaluation
from pipeline.environments.twenty_questions.player import games
from pipeline.environments.twenty_questions.solve import best_reply
from pipeline.environments.twenty_questions.task import SEEDS, TwentyQuestionsTask, all_lines, prompts
from pipeline.environments.twenty_questions.things import ANSWERS, QUESTIONS, THINGS
from pipeline.tasks.task import SPLITS, PromptText


def test_every_thing_is_told_from_every_other_one() -> None:
    assert len(THINGS) == len(set(THINGS.values())) == 32
    assert all(properties <= set(QUESTIONS) for properties in THINGS.values())
    assert QUESTIONS.keys() == ANSWERS.keys()
    said = " ".join(all_lines())
    last = [answer.split()[-1] for own in ANSWERS.values() for answer in own]
    assert all(said.count(f" {word}") == 1 for word in last)  # an answer says by itself what was asked
    assert len({prompt.text for prompt in prompts()}) == 1  # or the text would give the thing away


def test_a_game() -> None:
    environment = load_environment("twenty-questions")
    episodes, [first] = environment.reset([PromptText(text="", metadata={"thing": "radio"})], [0])
    assert first.text == "" and not first.over

    def say(reply: str) -> tuple[str, float, bool]:
        [turn] = environment.step(episodes, [reply])
        return turn.text, round(turn.reward, 6), turn.terminated

    assert say(" Is it alive? ") == ("No, lifeless.", -0.02, False)
    assert say("Does it need power?") == ("Yes, powered.", -0.02, False)
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


# --- the player and the task ---


@cache
def some_games() -> list[list[str]]:
    return list(islice(games(3), 400))


def test_the_mediocre_player_says_what_is_understood_and_is_far_from_the_best() -> None:
    returns, replies, wrong, repeated = [], 0, 0, 0
    for opening, *lines in some_games():
        pairs = list(zip(lines[::2], lines[1::2], strict=True))
        assert opening == OPENING and len(pairs) <= MAX_REPLIES and CONFUSED not in lines
        assert [answer for _, answer in pairs].index(FOUND) == len(pairs) - 1 if FOUND in lines else len(pairs) == 20
        for place, (reply, _) in enumerate(pairs):
            before = possible_after(pairs[:place])
            wrong += reply not in QUESTIONS.values() and reply not in map(guess_of, before)
            repeated += reply in lines[: 2 * place : 2]
        replies += len(pairs)
        returns.append((FOUND in lines) - REPLY_COST * len(pairs))
    mean = sum(returns) / len(returns)
    assert 0.5 < mean / best_reply().value < 0.85
    assert wrong / replies > 0.01 and repeated / replies > 0.15


def test_every_line_has_a_token_for_each_word_and_comes_back(tmp_path: Path) -> None:
    task = TwentyQuestionsTask()
    task.build_tokenizer(tmp_path, 512)
    tokenizer = load_tokenizer(str(tmp_path))
    rows = tokenizer([task.continuation(line) for line in all_lines()], add_special_tokens=False)["input_ids"]
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    assert [text.strip() for text in texts] == all_lines() == list(dict.fromkeys(all_lines()))
    assert all(tokenizer.pad_token_id not in row for row in rows)
    assert len(tokenizer) == 2 + len({token for row in rows for token in row})
    assert tokenizer.pad_token_id in tokenizer.encode(" fnord")  # no word of the game


def test_every_reply_is_understood_and_ends_with_its_only_question_mark() -> None:
    game = Game()
    game.begin(prompts()[0], 0)
    replies = [*QUESTIONS.values(), *map(guess_of, THINGS)]
    assert [line for line in all_lines() if game.answer(line).info["parsed"]] == replies
    assert all(line.index("?") == len(line) - 1 for line in replies)  # the recipe's stop string


def test_a_demonstration_is_what_a_conversation_looks_like() -> None:
    """Prompt, replies and continuations, one after the other."""
    task, game = TwentyQuestionsTask(), next(games(SEEDS["heldout"]))
    demonstration = task.demonstrations("heldout")[0]
    said = [f" {line}" if place % 2 == 0 else task.continuation(line) for place, line in enumerate(game[1:])]
    assert demonstration.prompt == prompts()[0].text == task.layout(OPENING)
    assert demonstration.response == "".join(said)


def test_the_demonstrations_are_the_same_in_every_process_and_differ_between_the_splits() -> None:
    assert_same_in_every_process(
        "from pipeline.environments.twenty_questions.task import TwentyQuestionsTask as Task",
        "(Task().demonstrations('heldout'), Task().prompts('heldout'))",
    )
    train, heldout = (TwentyQuestionsTask().demonstrations(split) for split in SPLITS)
    assert train != heldout and train[: len(heldout)] != heldout


def test_the_recipe_has_room_for_every_game(tmp_path: Path) -> None:
    config = load(recipe_path("twenty-questions"))
    TwentyQuestionsTask().build_tokenizer(tmp_path, config.model.vocabulary)
    tokenizer = load_tokenizer(str(tmp_path))
    length = {line: len(tokenizer.encode(f" {line}", add_special_tokens=False)) for line in all_lines()}
    reply, answer = config.sampling.max_new_tokens, max(length[line] for line in (CONFUSED, *sum(ANSWERS.values(), ())))
    assert config.environment.max_turns == MAX_REPLIES and config.sampling.stop == ("?",)
    assert max(length.values()) == length[OPENING] <= config.batch.max_prompt_tokens
    assert max(length[line] for line in [*QUESTIONS.values(), *map(guess_of, THINGS)]) <= reply
    assert length[OPENING] + MAX_REPLIES * (reply + answer) <= config.model.context
    assert config.batch.samples % len(THINGS) == 0  # so that a step's mean return is comparable with the best


# --- the yardstick ---


def played(thing: str, *replies: str) -> list[dict[str, Any]]:
    """What the environment says to these replies, as a rollout's metadata has it."""
    environment = TwentyQuestions()
    episodes, _ = environment.reset([PromptText(text="", metadata={"thing": thing})], [0])
    turns = [environment.step(episodes, [reply])[0] for reply in replies]
    assert turns[-1].over and not any(turn.over for turn in turns[:-1])
    return [{"reward": turn.reward, "line": turn.text, "info": dict(turn.info)} for turn in turns]


def test_games_are_measured_exactly(tmp_path: Path) -> None:
    talks = [
        played("radio", "Is it alive?", "Is it the lamp?", "Is it the radio?"),
        played("oak", *["Is it a tree?"] * 5, *["Is it round?"] * 15),
    ]
    found = measure_games(talks)
    assert (found.conversations, found.replies, found.found) == (2, 11.5, 0.5)
    assert found.parsed == pytest.approx(18 / 23)
    assert found.mean_return == pytest.approx((1 - 0.06 - 0.4) / 2)
    assert found.share == pytest.approx(0.27 / 0.889375)
    assert found.cells() == {
        "return": "0.270",
        "of best": "30.4%",
        "replies": "11.50",
        "parsed": "78.3%",
        "found": "50.0%",
    }
    rows = [json.dumps({"conversation": {"turns": turns, "end": "terminated", "failure": ""}}) for turns in talks]
    pq.write_table(pa.table({"metadata": rows}), tmp_path / "experience.parquet")
    assert measure_table(tmp_path / "experience.parquet") == found
    with pytest.raises(ValueError, match="conversations: must be at least one"):
        measure_games([])


def test_an_evaluation_is_measured_by_its_returns() -> None:
    record = {"rewards": {"environment": {"policy": [[0.9, 0.7], [None, 0.5]], "baseline": [[0.1], [0.3]]}}}
    assert shares_of_evaluation(record) == {
        "policy": pytest.approx((0.7, 0.7 / 0.889375)),
        "baseline": pytest.approx((0.2, 0.2 / 0.889375)),
    }
