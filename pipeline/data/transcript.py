"""Anthropic's transcripts: `\\n\\nHuman: ...\\n\\nAssistant: ...` in one string (Bai et al. 2022, the HH data).

A turn begins where a paragraph begins with `Human:` or `Assistant:`. One space behind it belongs to the marker,
everything else to the speaker. A marker anywhere else is text: in HH some replies speak for the human.
"""

from __future__ import annotations

import re

from pipeline.data.problems import RowError
from pipeline.data.turns import Role, Turn, Turns

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_START = re.compile(r"\s*(?:Human|Assistant):")
_WITHIN = re.compile(r"\b(?:Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Whether a text begins with a marker, after any number of blank lines."""
    return bool(_START.match(text))


def parse(text: str) -> Turns:
    """The turns of a transcript. Raises RowError when it has none, or begins with text before the first marker."""
    text = text.replace("\r\n", "\n")
    if is_transcript(text):
        text = f"\n\n{text.lstrip()}"
    lead, *rest = _TURN.split(text)
    if not rest:
        raise RowError("no turns")
    if lead.strip():
        raise RowError("first turn not human", "text stands before the first Human:")
    return tuple(Turn(_ROLES[name], said.removeprefix(" ")) for name, said in zip(rest[::2], rest[1::2], strict=True))


def speaks_for_others(reply: str) -> bool:
    """Whether a reply has a marker anywhere in it."""
    return bool(_WITHIN.search(reply))
