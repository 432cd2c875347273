"""The world as a task of single replies: prompts, demonstrations, and an exact reward.

The reward is the expected gain in the partner's mood, one reply ahead. The best reply for the next mood is not always
the best for the whole conversation: asking costs a turn and pays later. Training over conversations learns that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from actors.models.option_names import option_token
from pipeline.environments.world.layout import deed_of, layout, read_scene, speaker_grammar
from pipeline.environments.world.rules import MAX_REPLIES, NO_SENTENCE, SUBTASKS, Deed, expected_gain
from pipeline.environments.world.speaker import conversations
from pipeline.tasks.smalltalk import BOT
from pipeline.tasks.task import Demonstration, PromptText, Split

SEED = 7
CONVERSATIONS: Mapping[Split, int] = MappingProxyType({"train": 8000, "heldout": 400})
PROMPTS = {"train": 600, "heldout": 128}
HELDOUT_PERCENT = 10  # of the openings
MOST_REPLIES = 1  # largest number of replies in a prompt; the rest of a conversation is not used


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A conversation up to a line of the partner, and the speaker's reply."""

    prompt: str
    reply: str


class WorldTask:
    """The world as a task of single replies."""

    name = "world"
    conversations: Mapping[Split, int] = CONVERSATIONS
    most_replies = MOST_REPLIES
    reward = "pipeline.environments.world.task:expected_mood_gain"
    measures: Mapping[str, str] = MappingProxyType(
        {
            "replies that are sentences": "pipeline.environments.world.task:are_sentences",
            "replies to the point": "pipeline.environments.world.task:are_to_the_point",
            "replies that suit the mood": "pipeline.environments.world.task:suit_the_mood",
        }
    )

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Save a tokenizer with one token for each word; it ignores `vocabulary`."""
        from pipeline.environments.world.tokenizer import world_tokenizer

        world_tokenizer(folder)

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """The replies of the mediocre speaker."""
        shown = exchanges(split, self.conversations[split], self.most_replies)
        return [Demonstration(prompt=one.prompt, response=f" {one.reply}") for one in shown]

    def prompts(self, split: Split) -> list[PromptText]:
        """Conversations up to a line of the partner; about half of them are openings."""
        shown = exchanges(split, self.conversations[split], self.most_replies)
        texts = list(dict.fromkeys(one.prompt for one in shown))[: PROMPTS[split]]
        return [PromptText(text=text, metadata={}) for text in texts]

    def layout(self, line: str) -> str:
        """The prompt made of a line that a person typed, taken as the partner's opening line."""
        return layout([line.strip()])


class WorldConversations(WorldTask):
    """The world as a task of whole conversations: demonstrations from each turn of them, and openings as prompts."""

    name = "world-conversations"
    conversations: Mapping[Split, int] = MappingProxyType({"train": 5000, "heldout": 250})
    most_replies = MAX_REPLIES - 1

    def prompts(self, split: Split) -> list[PromptText]:
        """Opening lines of the partner."""
        shown = exchanges(split, self.conversations[split], self.most_replies)
        openings = dict.fromkeys(one.prompt for one in shown if one.prompt.count(BOT) == 1)
        return [PromptText(text=text, metadata={}) for text in list(openings)[: PROMPTS[split]]]


class WorldOptions(WorldConversations):
    """The same, where each demonstration begins with the control token of the sub-task that it carries out.

    So the policy knows from the beginning what the options mean. A rude reply carries out none of them: it is given one
    by the hash of its text, so that the policy is as often rude as the speaker, whatever it is told to do.
    """

    name = "world-options"

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Save a tokenizer with one token for each word and each option; it ignores `vocabulary`."""
        from pipeline.environments.world.tokenizer import world_tokenizer

        world_tokenizer(folder, SUBTASKS)

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """The replies of the mediocre speaker, each after its option."""
        return [
            Demonstration(prompt=one.prompt + option_token(_option_of(one.response)), response=one.response)
            for one in super().demonstrations(split)
        ]


def _option_of(reply: str) -> str:
    sentence = speaker_grammar.parse(reply)
    if sentence is not None and sentence.label in SUBTASKS:
        return sentence.label
    return SUBTASKS[xxhash.xxh3_64_intdigest(reply.encode()) % len(SUBTASKS)]


def expected_mood_gain(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """The expected rise in the value of the partner's mood by each reply, in [-1, 1]; -1 if it is not a sentence.

    It is exact, by the rules of the world. Raises ValueError for a prompt that does not end with a line of the partner.
    """
    return [_gain(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def are_sentences(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """1 for each reply that the grammar can parse, else 0."""
    return [float(_deed(*both).subtask != NO_SENTENCE) for both in zip(prompts, responses, strict=True)]


def are_to_the_point(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """1 for each reply that names the partner's topic, else 0."""
    return [float(_deed(*both).to_the_point) for both in zip(prompts, responses, strict=True)]


def suit_the_mood(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """1 for each reply that can lift the partner's mood, else 0."""
    return [
        float(expected_gain(read_scene(prompt).state, _deed(prompt, response)) > 0)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _deed(prompt: str, response: str) -> Deed:
    return deed_of(response, read_scene(prompt).noun)


def _gain(prompt: str, response: str) -> float:
    scene = read_scene(prompt)
    return expected_gain(scene.state, deed_of(response, scene.noun))


@cache
def exchanges(split: Split, count: int | None = None, most_replies: int = MOST_REPLIES) -> tuple[Exchange, ...]:
    """The exchanges of the mediocre speaker's conversations in this split; the opening line decides the split.

    count: of conversations. most_replies: largest number of replies in a prompt.
    """
    wanted = CONVERSATIONS[split] if count is None else count
    found: list[Exchange] = []
    begun = 0
    for lines in conversations(SEED):
        if split_of(lines[0]) != split:
            continue
        places = range(1, min(len(lines), 2 * most_replies + 2), 2)
        found += [Exchange(prompt=layout(lines[:place]), reply=lines[place]) for place in places]
        begun += 1
        if begun == wanted:
            break
    return tuple(found)


def split_of(opening: str) -> Split:
    """The split of an opening line, by the hash of its text."""
    return "heldout" if xxhash.xxh3_64_intdigest(opening.encode()) % 100 < HELDOUT_PERCENT else "train"
