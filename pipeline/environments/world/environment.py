"""The world as an environment: a partner that answers by the world's rules, in sentences of its grammar."""

from __future__ import annotations

from random import Random
from typing import Any

from pipeline.environments.environment import Turn
from pipeline.environments.lockstep import Lockstep
from pipeline.environments.world.layout import Scene, deed_of, partner_grammar, read_scene, speaker_grammar
from pipeline.environments.world.partner_frames import LAST_WORDS
from pipeline.environments.world.rules import LADDER, NO_SENTENCE, SUBTASKS, VALUES, Deed, State, outcomes, reward
from pipeline.tasks.task import PromptText


class World(Lockstep):
    """The environment; a prompt must end with a line of the partner, as `layout.py` describes."""

    def __init__(self) -> None:
        super().__init__(WorldConversation)


class WorldConversation:
    """One conversation with the partner."""

    def __init__(self) -> None:
        self._random = Random()
        self._scene = Scene(state=State(mood="sad"), noun="exam")

    def begin(self, prompt: PromptText, seed: int) -> Turn:
        """A turn without text, because the prompt already ends with the partner's line."""
        self._random = Random(seed)
        self._scene = read_scene(prompt.text)
        return Turn(options=SUBTASKS, info=_shown(self._scene.state))

    def answer(self, reply: str) -> Turn:
        """The partner's next line, which shows its reaction to the reply."""
        before, noun = self._scene.state, self._scene.noun
        deed = deed_of(reply, noun)
        after = draw(self._random, before, deed)
        self._scene = Scene(state=after, noun=noun)
        return Turn(
            text=partner_line(self._random, before, deed, after, noun),
            reward=reward(after),
            terminated=after.over,
            options=() if after.over else SUBTASKS,
            info={
                **_shown(after),
                "subtask": deed.subtask,
                "parsed": deed.subtask != NO_SENTENCE,
                "to_the_point": deed.to_the_point,
            },
        )

    def close(self) -> None:
        """It holds nothing."""


def draw(random: Random, state: State, deed: Deed) -> State:
    """Draw the state after a reply."""
    after = outcomes(state, deed)
    return random.choices(list(after), list(after.values()))[0]


def opening_line(random: Random, mood: str, noun: str) -> str:
    """A random first line of a partner in this mood."""
    return partner_grammar.generate(random, (mood, "opening", "closed"), noun)


def partner_line(random: Random, before: State, deed: Deed, after: State, noun: str) -> str:
    """A random line of the partner after a reply."""
    rise = LADDER.index(after.mood) - LADDER.index(before.mood)
    reaction = "better" if rise > 0 else "worse" if rise < 0 else "same"
    if deed.subtask == NO_SENTENCE:
        reaction = "confused"
    trust = "open" if after.trusts and after.mood not in LAST_WORDS else "closed"
    return partner_grammar.generate(random, (after.mood, reaction, trust), noun)


def carried_out(options: list[str], replies: list[str]) -> list[float]:
    """1 for each reply that carries out the sub-task chosen for it, else 0."""
    sentences = [speaker_grammar.parse(reply) for reply in replies]
    return [
        float(sentence is not None and sentence.label == option)
        for option, sentence in zip(options, sentences, strict=True)
    ]


def _shown(state: State) -> dict[str, Any]:
    return {
        "note": state.mood,
        "mood": state.mood,
        "value": VALUES[state.mood],
        "trusts": state.trusts,
        "replies": state.replies,
    }
