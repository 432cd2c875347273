"""Writes a conversation of the world as a prompt, and reads the state of the conversation from a prompt.

    <|user|> My exam went badly, and nobody called.<|bot|> What happened with your exam?<|endoftext|><|user|> ...<|bot|>

Each reply ends as the model ends it. The state is read from the text alone, so a reward or an environment needs no
metadata.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.environments.world.grammar import Grammar
from pipeline.environments.world.partner_frames import PARTNER, Shown
from pipeline.environments.world.rules import MOODS, NO_SENTENCE, Deed, State
from pipeline.environments.world.speaker_frames import SPEAKER
from pipeline.environments.world.topics import NOUNS
from pipeline.tasks.smalltalk import BOT, USER
from pipeline.tasks.tokenizers import END

_CONTROL = re.compile(r"<\|option:[^|]*\|>")  # before a reply, where a manager chose an option; nobody says it
speaker_grammar: Grammar[str] = Grammar(SPEAKER, list(NOUNS))
partner_grammar: Grammar[Shown] = Grammar(PARTNER, list(NOUNS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the partner's last line shows. noun: the noun by which the partner names its topic."""

    state: State
    noun: str


def layout(lines: Sequence[str]) -> str:
    """The prompt made of these lines, alternately the partner's and the speaker's, the partner's first and last."""
    marked = (f"{BOT} {line}{END}" if place % 2 else f"{USER} {line}" for place, line in enumerate(lines))
    return f"{''.join(marked)}{BOT}"


def read_scene(prompt: str) -> Scene:
    """Read the scene from a prompt.

    Raises ValueError when the prompt's last line is no line of the partner, or is one that ends the conversation.
    """
    before, _, line = _CONTROL.sub("", prompt).removesuffix(BOT).rpartition(USER)
    sentence = partner_grammar.parse(line)
    if sentence is None or sentence.label[0] not in MOODS:
        raise ValueError(
            f"prompt: must end with a line of the world's partner, got {line.strip()!r:.80}; such as 'I am so sad "
            "about my dog.'"
        )
    mood, _, trust = sentence.label
    return Scene(state=State(mood=mood, trusts=trust == "open", replies=before.count(BOT)), noun=sentence.noun)


def deed_of(reply: str, noun: str) -> Deed:
    """What a reply does when the partner talks about `noun`."""
    sentence = speaker_grammar.parse(reply)
    if sentence is None:
        return Deed(subtask=NO_SENTENCE)
    return Deed(subtask=sentence.label, to_the_point=NOUNS[sentence.noun] == NOUNS[noun])
