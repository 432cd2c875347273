"""The world: its language, its rules, the best play, and the task and environment that are made of them."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.models.tokenizer import load_tokenizer
from conversation_helpers import assert_same_in_every_process
from pipeline.environments.environment import Turn
from pipeline.environments.world import rules, solve
from pipeline.environments.world.environment import World, carried_out, opening_line
from pipeline.environments.world.grammar import FrameSet, Grammar
from pipeline.environments.world.layout import deed_of, layout, partner_grammar, read_scene, speaker_grammar
from pipeline.environments.world.measures import (
    measure_conversations,
    measure_replies,
    measure_table,
    share_of_best,
    shares_of_evaluation,
)
from pipeline.environments.world.partner_frames import MOODS, PARTNER
from pipeline.environments.world.rules import DEEDS, EFFECTS, LADDER, OPENING_MOODS, RUDE, SUBTASKS, VALUES, Deed, State
from pipeline.environments.world.speaker import conversations, mediocre_play, say
from pipeline.environments.world.speaker_frames import SPEAKER
from pipeline.environments.world.task import (
    WorldOptions,
    WorldTask,
    are_sentences,
    are_to_the_point,
    exchanges,
    expected_mood_gain,
    split_of,
    suit_the_mood,
)
from pipeline.environments.world.topics import NOUNS, TOPICS
from pipeline.tasks.task import PromptText

README = Path(__file__).parents[1] / "pipeline" / "environments" / "README.md"
SIGN = {"settles": "!", "helps much": "++", "helps": "+", "nothing": "0", "hurts": "-", "hurts much": "--"}
OPENINGS = list(OPENING_MOODS)


def prompt(mood: str, noun: str = "exam", seed: int = 0) -> PromptText:
    return PromptText(text=layout([opening_line(Random(seed), mood, noun)]), metadata={})


# --- the language ---


def test_the_speaker_has_more_than_a_hundred_thousand_sentences_and_all_say_one_thing() -> None:
    """Each of them, not a sample: the sentences with a place for the noun, and the nouns."""
    templates = {label: set(speaker_grammar.templates(label)) for label in SPEAKER}
    assert sum(map(len, templates.values())) == len(set().union(*templates.values())) == 3240
    assert len(NOUNS) == 36 and 3240 * 36 == 116_640 > 1e5
    assert sum(len(own.frames) for own in SPEAKER.values()) == 54
    assert sum(map(len, MOODS.values())) == 48
    assert len(set(speaker_grammar.sentences("comfort"))) == 480 * 36
    assert sum(len(set(partner_grammar.templates(label))) for label in PARTNER) > 5000


def test_every_sentence_template_is_parsed_as_what_it_says() -> None:
    for grammar in (speaker_grammar, partner_grammar):
        nouns = list(NOUNS)
        for label in grammar.frames:
            for number, template in enumerate(grammar.templates(label)):
                noun = nouns[number % len(nouns)]
                sentence = grammar.parse(template.replace("{noun}", noun))
                assert sentence is not None and (sentence.label, sentence.noun) == (label, noun)


def test_what_is_generated_is_parsed_as_what_was_meant() -> None:
    random = Random(5)
    for label in SPEAKER:
        for noun in NOUNS:
            sentence = speaker_grammar.parse(f" {speaker_grammar.generate(random, label, noun)} ")
            assert sentence is not None and (sentence.label, sentence.noun) == (label, noun)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "exam",
        "I am sorry about your.",
        "i am sorry about your exam.",
        "I am sorry about your  exam.",
        "I am sorry about your exam",
        "I am sorry about your exams.",
        "I am sorry about your exam. I am sorry about your exam.",
        "I am sorry about my exam.",
        "Oh. Oh. I am sorry about your exam.",
        "Really. I am sorry about your exam.",
        "What happened with your exam.",
        "I am sorry about your exam and dog.",
        "I am sorry about your moon.",
    ],
)
def test_what_is_no_sentence_is_not_parsed(text: str) -> None:
    assert speaker_grammar.parse(text) is None
    assert deed_of(text, "exam") == Deed(subtask="no sentence")


def test_the_common_ways_to_say_it_come_first() -> None:
    random = Random(0)
    counts = Counter(speaker_grammar.generate(random, "ask", "dog").partition(" ")[0] for _ in range(3000))
    assert counts["Well."] > counts["Oh."] > counts["Look."] > 200  # openers with the weights 1/2, 1/3 and 1/4


def test_a_grammar_that_cannot_be_undone_is_refused() -> None:
    same = FrameSet(openers=("",), frames=("The {noun} is here.",), closers=("",))
    with pytest.raises(ValueError, match=r"must have one label, got .* for 'a' and 'b'"):
        Grammar({"a": same, "b": same}, ["dog"]).parse("The dog is here.")
    twice = FrameSet(openers=("A dog!",), frames=("The {noun} is here.",), closers=("",))
    with pytest.raises(ValueError, match="must name one noun, got 'A dog! The"):
        Grammar({"a": twice}, ["dog"]).parse("The dog is here.")


# --- the rules ---


def test_the_tables_are_whole_and_the_readme_shows_them() -> None:
    readme = README.read_text(encoding="utf-8")
    for aim in (True, False):
        assert set(EFFECTS[aim]) == {(mood, subtask) for mood in rules.MOODS for subtask in (*SUBTASKS, RUDE)}
    for mood in rules.MOODS:
        cells = [
            f"{SIGN[EFFECTS[True][mood, subtask]]} / {SIGN[EFFECTS[False][mood, subtask]]}"
            for subtask in (*SUBTASKS, RUDE)
        ]
        assert f"| {mood} {VALUES[mood]:g} | {' | '.join(cells)} |" in readme
    for effect, sign in SIGN.items():
        closed, trusting = (
            ", ".join(f"{move:+d}: {chance:g}" if move else f"0: {chance:g}" for move, chance in moves[effect].items())
            for moves in (rules.CLOSED, rules.OPEN)
        )
        assert f"| `{sign}` {effect} | {closed} | {trusting} |" in readme


def test_chances_add_up_and_every_reply_counts() -> None:
    assert sum(OPENING_MOODS.values()) == pytest.approx(1)
    for state in solve.states():
        for deed in DEEDS:
            after = rules.outcomes(state, deed)
            assert sum(after.values()) == pytest.approx(1)
            assert {reached.replies for reached in after} == {state.replies + 1}


@pytest.mark.parametrize(
    ("state", "deed", "after"),
    [
        (State(mood="sad"), Deed(subtask="comfort", to_the_point=True), {"worried": 0.5, "sad": 0.5}),
        (
            State(mood="sad", trusts=True),
            Deed(subtask="comfort", to_the_point=True),
            {"bored": 0.3, "worried": 0.5, "sad": 0.2},
        ),
        (State(mood="sad"), Deed(subtask="comfort"), {"sad": 1.0}),
        (State(mood="angry"), Deed(subtask="rude", to_the_point=True), {"left": 1.0}),
        (State(mood="bored"), Deed(subtask="no sentence"), {"sad": 0.4, "worried": 0.6}),
        (State(mood="cheerful"), Deed(subtask="goodbye", to_the_point=True), {"content": 1.0}),
        (
            State(mood="cheerful", trusts=True),
            Deed(subtask="joke", to_the_point=True),
            {"content": 0.4, "cheerful": 0.6},
        ),
    ],
)
def test_moods_move_as_the_table_says(state: State, deed: Deed, after: dict[str, float]) -> None:
    found: Counter[str] = Counter()
    for reached, chance in rules.outcomes(state, deed).items():
        found[reached.mood] += chance
    assert dict(found) == pytest.approx(after)


def test_how_a_conversation_ends_and_what_it_is_worth() -> None:
    bye, ask = Deed(subtask="goodbye"), Deed(subtask="ask", to_the_point=True)
    assert all(after.over for after in rules.outcomes(State(mood="sad"), bye))
    assert all(after.over for after in rules.outcomes(State(mood="sad", replies=5), ask))
    [asked] = rules.outcomes(State(mood="sad", replies=4), ask)
    assert asked.trusts and not asked.over and rules.reward(asked) == -0.02
    assert rules.reward(State(mood="bored", over=True)) == pytest.approx(0.63)
    assert not any(after.trusts for after in rules.outcomes(State(mood="sad"), Deed(subtask="ask")))


# --- the best play ---


def brute_force(mood: int, trusts: bool, left: int) -> float:
    """The best return by following every line of play to its end, written apart from `solve`: the mood is a rung."""
    if mood in (0, 6) or left == 0:
        return VALUES[LADDER[mood]]
    best = -9.0
    for aim in (True, False):
        for subtask in (*SUBTASKS, RUDE):
            moves = (rules.OPEN if trusts else rules.CLOSED)[EFFECTS[aim][LADDER[mood], subtask]]
            value = -0.02
            for move, chance in moves.items():
                rung = max(0, min(6, mood + move))
                rest = 0 if subtask == "goodbye" else left - 1
                value += chance * brute_force(rung, trusts or (aim and subtask == "ask"), rest)
            best = max(best, value)
    return best


@pytest.mark.parametrize("left", [1, 2, 3])
def test_the_best_play_is_what_brute_force_finds(left: int) -> None:
    values = solve.solve_flat().values
    for mood in rules.MOODS:
        for trusts in (False, True):
            expected = brute_force(LADDER.index(mood), trusts, left)
            assert values[State(mood=mood, trusts=trusts, replies=6 - left)] == pytest.approx(expected, abs=1e-12)


def test_flat_and_hierarchical_play_are_worth_the_same_with_a_perfect_worker() -> None:
    flat, hierarchical = solve.solve_flat(), solve.solve_hierarchical()
    assert flat.value == pytest.approx(0.872344, abs=1e-6)
    assert hierarchical.value == flat.value
    assert all(flat.best[state].subtask == option for state, option in hierarchical.best.items())
    assert flat.value == pytest.approx(solve.return_of(lambda state: {flat.best[state]: 1.0}))


def test_no_single_change_and_no_random_play_beats_the_best() -> None:
    best = solve.solve_flat()
    for state in solve.states():
        for deed in DEEDS:
            changed = sum(
                chance * (rules.reward(after) + (0 if after.over else best.values[after]))
                for after, chance in rules.outcomes(state, deed).items()
            )
            assert changed <= best.values[state] + 1e-12
    random = Random(0)
    for _ in range(20):
        table = {state: random.choice(DEEDS) for state in solve.states()}
        assert solve.return_of(lambda at, table=table: {table[at]: 1.0}) < best.value  # type: ignore[misc]


def test_looking_one_reply_ahead_is_not_the_best_and_the_mediocre_speaker_is_far_from_it() -> None:
    best = solve.solve_flat()
    myopic, mediocre = solve.return_of(solve.myopic_play), solve.return_of(mediocre_play)
    assert myopic / best.value == pytest.approx(0.8887, abs=1e-3)
    assert mediocre / best.value == pytest.approx(0.3303, abs=1e-3)
    assert best.best[State(mood="sad")].subtask == "ask"  # costs a reply, pays later
    assert solve.myopic_play(State(mood="sad")) == {Deed(subtask="comfort", to_the_point=True): 1.0}


def test_a_worse_worker_limits_what_a_manager_can_reach() -> None:
    def clumsy(state: State, option: str) -> dict[Deed, float]:
        return {Deed(subtask=option, to_the_point=aim): 0.5 for aim in (True, False)}

    perfect, limited = solve.solve_hierarchical(), solve.solve_hierarchical(clumsy)
    assert 0.3 < limited.value < perfect.value - 0.2
    assert solve.solve_hierarchical(options=("joke", "ask")).value < perfect.value


@pytest.mark.parametrize("name", ["best", "mediocre"])
def test_monte_carlo_through_sentences_agrees_with_dynamic_programming(name: str) -> None:
    """The optimal policy speaks sentences to the environment, which parses them and answers in sentences."""
    best, environment, random = solve.solve_flat(), World(), Random(1)
    moods = random.choices(OPENINGS, list(OPENING_MOODS.values()), k=1500)
    prompts = [prompt(mood, random.choice(list(NOUNS)), seed) for seed, mood in enumerate(moods)]
    returns = np.zeros(len(prompts))
    texts = [p.text for p in prompts]
    episodes, _ = environment.reset(prompts, range(len(prompts)))
    going = list(range(len(prompts)))
    while going:
        replies = []
        for place in going:
            scene = read_scene(texts[place])  # nothing but what can be read
            play = {best.best[scene.state]: 1.0} if name == "best" else mediocre_play(scene.state)
            replies.append(say(random, random.choices(list(play), list(play.values()))[0], scene.noun))
        turns = environment.step([episodes[place] for place in going], replies)
        for place, reply, turn in zip(going, replies, turns, strict=True):
            returns[place] += turn.reward
            texts[place] += f" {reply}{layout([turn.text])}"
        going = [place for place, turn in zip(going, turns, strict=True) if not turn.over]
    exact = best.value if name == "best" else solve.return_of(mediocre_play)
    assert abs(returns.mean() - exact) < 4 * returns.std() / np.sqrt(len(returns))


# --- the environment ---


def test_the_partner_shows_its_whole_state() -> None:
    environment = World()
    [episode], [first] = environment.reset([prompt("sad", "dog")], [0])
    assert first == Turn(
        options=SUBTASKS, info={"note": "sad", "mood": "sad", "value": 0.3, "trusts": False, "replies": 0}
    )
    [turn] = environment.step([episode], [" What happened with your cat?"])
    assert turn.info == {
        "note": "sad",
        "mood": "sad",
        "value": 0.3,
        "trusts": True,
        "replies": 1,
        "subtask": "ask",
        "parsed": True,
        "to_the_point": True,
    }
    sentence = partner_grammar.parse(turn.text)
    assert sentence is not None and sentence.label == ("sad", "same", "open") and sentence.noun == "dog"
    assert (turn.reward, turn.over, turn.options) == (-0.02, False, SUBTASKS)
    [turn] = environment.step([episode], ["Fnord."])
    assert turn.info["subtask"] == "no sentence" and not turn.info["parsed"]
    said = partner_grammar.parse(turn.text)
    assert said is not None and said.label[1] == "confused"


def test_samples_of_a_prompt_begin_alike_and_a_seed_decides_the_rest() -> None:
    environment = World()

    def play(seed: int) -> tuple[Turn, Turn]:
        episodes, [first] = environment.reset([prompt("worried")], [seed])
        [second] = environment.step(episodes, ["Studies show that sleep helps with the exam."])
        return first, second

    assert play(1) == play(1)
    assert len({str(play(seed)[0]) for seed in range(20)}) == 1
    assert len({str(play(seed)[1]) for seed in range(20)}) > 10


def test_an_environment_goes_on_where_the_prompt_ends() -> None:
    text = layout(
        [
            "I am so sad about my dog.",
            "What happened with your dog?",
            "Hm. I cried about my dog all night. I trust you.",
        ]
    )
    assert read_scene(text).state == State(mood="sad", trusts=True, replies=1)
    [_], [turn] = World().reset([PromptText(text=text, metadata={})], [0])
    assert turn.info["trusts"] and turn.info["replies"] == 1
    [_], [turn] = World().reset([PromptText(text="<|user|> Hello<|bot|>", metadata={})], [0])
    assert "prompt: must end with a line of the world's partner, got 'Hello'" in turn.failure
    [_], [turn] = World().reset(
        [PromptText(text=layout(["All is well with my dog, thanks to you."]), metadata={})], [0]
    )
    assert turn.failure


def test_whether_an_option_was_carried_out() -> None:
    replies = ["I am sorry about the dog.", " I am sorry about the dog.", "Hello"]
    assert carried_out(["comfort", "joke", "ask"], replies) == [1.0, 0.0, 0.0]


# --- the task ---


def test_openings_are_held_out_whole() -> None:
    openings = {
        split: {shown.prompt.split("<|bot|>")[0].removeprefix("<|user|> ") for shown in exchanges(split)}
        for split in ("train", "heldout")
    }
    assert not openings["train"] & openings["heldout"]
    assert len(openings["heldout"]) > 300
    prompts = {split: {p.text for p in WorldTask().prompts(split)} for split in ("train", "heldout")}
    assert not prompts["train"] & prompts["heldout"]
    assert not prompts["heldout"] & {shown.prompt for shown in exchanges("train")}
    assert all(split_of(opening) == "heldout" for opening in openings["heldout"])


def test_the_judge_says_what_the_world_would() -> None:
    """The expected gain is the mean of what the environment does."""
    start = prompt("angry", "car")
    replies = {
        "There is no hurry with your car.": 0.5 * 0.2,
        "There is no hurry with the bike.": 0.5 * 0.2,
        "There is no hurry with the dog.": 0.0,
        "Keep quiet about the car.": -0.1,
        "What happened with your car?": -0.05,
        "Fnord": -1.0,
    }
    assert expected_mood_gain([start.text] * len(replies), list(replies), [{}] * len(replies)) == pytest.approx(
        list(replies.values())
    )
    measured = [f([start.text] * 6, list(replies), [{}] * 6) for f in (are_sentences, are_to_the_point, suit_the_mood)]
    assert measured == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="prompt: must end with a line of the world's partner"):
        expected_mood_gain(["<|user|> Hello<|bot|>"], ["x"], [{}])


# --- the yardsticks ---


def test_replies_are_measured_exactly() -> None:
    prompts = [prompt("angry", "car").text] * 4
    found = measure_replies(
        prompts,
        [
            "There is no hurry with your car.",
            "There is no hurry with the dog.",
            "Keep quiet about the van.",
            "Keep quiet about.",
        ],
    )
    assert (found.replies, found.parsed, found.to_the_point) == (4, 0.75, 0.5)
    assert found.gain == pytest.approx((0.1 + 0 - 0.1 - 1) / 4)
    assert found.best_gain == pytest.approx(0.1)
    assert found.subtasks == {"calm": 0.5, "rude": 0.25, "no sentence": 0.25}
    with pytest.raises(ValueError, match="replies: must be at least one"):
        measure_replies([], [])


def test_returns_are_a_share_of_what_their_openings_allow() -> None:
    prompts = [prompt("angry").text, prompt("cheerful").text]
    best = solve.solve_flat().values
    possible = [best[State(mood="angry")], best[State(mood="cheerful")]]
    assert share_of_best(prompts, possible) == pytest.approx(1)
    assert share_of_best(prompts, [0.0, 0.5 * sum(possible)]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="returns: must be at least one"):
        share_of_best([], [])


def had(start: PromptText, *replies: str, seed: int = 0) -> list[dict[str, Any]]:
    """What the environment says to these replies, as a rollout's metadata has it."""
    environment = World()
    episodes, _ = environment.reset([start], [seed])
    turns = [environment.step(episodes, [reply])[0] for reply in replies]
    assert turns[-1].over and not any(turn.over for turn in turns[:-1])
    return [{"reward": turn.reward, "line": turn.text, "info": dict(turn.info)} for turn in turns]


def test_whole_conversations_are_measured_exactly() -> None:
    """One gives up at once; the other asks, and says goodbye beside the point."""
    starts = [prompt("cheerful", "dog"), prompt("bored", "car")]
    talks = [
        had(starts[0], "Goodbye and good luck with your dog."),
        had(starts[1], "What happened with your car?", "Goodbye and good luck with the dog."),
    ]
    found = measure_conversations([start.text for start in starts], talks)
    values = solve.solve_flat().values
    assert (found.conversations, found.replies) == (2, 1.5)
    assert found.mean_return == pytest.approx((0.98 + VALUES[talks[1][1]["info"]["mood"]] - 0.04) / 2)
    assert found.best_return == pytest.approx((values[State(mood="cheerful")] + values[State(mood="bored")]) / 2)
    assert found.share == pytest.approx(found.mean_return / found.best_return)
    assert (found.parsed, found.to_the_point) == (1.0, pytest.approx(2 / 3))
    assert found.subtasks == {
        **dict.fromkeys((*SUBTASKS, RUDE, "no sentence"), 0.0),
        "ask": pytest.approx(1 / 3),
        "goodbye": pytest.approx(2 / 3),
    }
    with pytest.raises(ValueError, match="conversations: must be at least one"):
        measure_conversations([], [])


def test_a_table_of_rollouts_is_measured_as_its_conversations_are(tmp_path: Path) -> None:
    """The opening is read from the tokens before the first reply; with a manager its option stands there, too."""
    start = prompt("cheerful", "dog")
    WorldOptions().build_tokenizer(tmp_path, 512)
    tokenizer = load_tokenizer(str(tmp_path))
    turns = had(start, "Fnord.", *["What happened with your dog?"] * 5)
    rows = {"tokens": [], "turn_starts": [], "metadata": []}  # type: dict[str, list[Any]]
    for option in ("", "<|option:ask|>"):
        tokens = tokenizer(start.text + option, add_special_tokens=False)["input_ids"]
        rows["tokens"].append([*tokens, *tokenizer(" Fnord.", add_special_tokens=False)["input_ids"]])
        rows["turn_starts"].append([len(tokens)])
        rows["metadata"].append(json.dumps({"conversation": {"turns": turns, "end": "terminated", "failure": ""}}))
    pq.write_table(pa.table(rows), tmp_path / "experience.parquet")
    found = measure_table(tmp_path / "experience.parquet", tmp_path / "tokenizer.json")
    assert found == measure_conversations([start.text] * 2, [turns] * 2)
    assert found.best_return == solve.solve_flat().values[State(mood="cheerful")]
    assert found.subtasks["no sentence"] == pytest.approx(1 / 6)


def test_an_evaluation_is_measured_by_its_openings() -> None:
    best = solve.solve_flat().values[State(mood="angry")]
    opening = prompt("angry").text.removeprefix("<|user|> ").removesuffix("<|bot|>")
    record = {
        "replies": [{"prompt": opening}],
        "rewards": {"return": {"policy": [[best, best / 2]], "baseline": [[0.0, None, best / 2]]}},
    }
    found = shares_of_evaluation(record)
    assert found == {"policy": pytest.approx((0.75 * best, 0.75)), "baseline": pytest.approx((best / 4, 0.25))}


@cache
def some_conversations() -> list[list[str]]:
    return list(islice(conversations(3), 2000))


def test_demonstrations_are_mixed_often_beside_the_point_and_sometimes_rude() -> None:
    deeds = []
    for lines in some_conversations():
        assert len(lines) % 2 == 1 and len(lines) <= 13
        for place in range(1, len(lines), 2):
            scene = read_scene(layout(lines[:place]))
            deeds.append(deed_of(lines[place], scene.noun))
    counts = Counter(deed.subtask for deed in deeds)
    assert set(counts) == {*SUBTASKS, RUDE}
    assert counts[RUDE] / len(deeds) == pytest.approx(0.1, abs=0.02)
    assert sum(deed.to_the_point for deed in deeds) / len(deeds) == pytest.approx(0.65, abs=0.03)
    assert min(counts.values()) / len(deeds) > 0.08


def test_the_task_is_the_same_in_every_process() -> None:
    assert_same_in_every_process(
        "from pipeline.environments.world.task import WorldTask, exchanges",
        "(exchanges('heldout'), WorldTask().prompts('heldout'))",
    )


def test_every_sentence_has_a_token_for_each_word_and_comes_back(tmp_path: Path) -> None:
    WorldTask().build_tokenizer(tmp_path, 512)
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == 347
    for grammar in (speaker_grammar, partner_grammar):
        texts = [
            f" {template}".replace("{noun}", "dog") for label in grammar.frames for template in grammar.templates(label)
        ]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False) == texts
        assert all(tokenizer.pad_token_id not in row for row in rows)
    assert tokenizer.encode("<|bot|> your fnord.")[0] == tokenizer.convert_tokens_to_ids("<|bot|>")
    assert tokenizer.pad_token_id in tokenizer.encode(" fnord")  # no word of the world


def test_what_a_person_types_is_an_opening() -> None:
    assert WorldTask().layout(" I am afraid of my dog. ") == "<|user|> I am afraid of my dog.<|bot|>"
    assert sum(map(len, TOPICS.values())) == len(NOUNS) == 36  # no noun has two topics
