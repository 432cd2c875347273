"""A conversation as turns, and the prompt and replies in one or several conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Literal

from pipeline.data.problems import RowError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """The text of one speaker, up to the next speaker."""

    role: Role
    text: str


Turns = tuple[Turn, ...]


def joined(turns: Turns) -> Turns:
    """Turns of one speaker in a row as one turn of several paragraphs, each without the space around it."""
    groups = ((role, list(group)) for role, group in groupby(turns, key=lambda turn: turn.role))
    return tuple(
        Turn(role, "\n\n".join(text for turn in group if (text := turn.text.strip()))) for role, group in groups
    )


def checked(turns: Turns) -> Turns:
    """The turns, after the check that a person's is first, or second after a system message. Raises RowError."""
    dialogue = turns[1:] if turns and turns[0].role == "system" else turns
    if not dialogue or dialogue[0].role == "assistant":
        raise RowError("first turn not human")
    if any(turn.role == "system" for turn in dialogue):
        raise RowError("turns out of order", "a system message must be the first")
    return turns


def answered(turns: Turns) -> tuple[Turns, str]:
    """(prompt, reply) of a conversation. Raises RowError when it does not end with a reply, or begins with one."""
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("no assistant turn")
    checked(turns)
    if turns[-1].role != "assistant":
        raise RowError("last turn human")
    return turns[:-1], turns[-1].text


def asking(turns: Turns) -> Turns:
    """The turns of a prompt, without an empty reply at its end, which only marks whose turn it is.

    Raises RowError when it does not end with a person's turn.
    """
    if turns and turns[-1].role == "assistant" and not turns[-1].text.strip():
        turns = turns[:-1]
    checked(turns)
    if turns[-1].role != "user":
        raise RowError("last turn assistant")
    return turns


def shared_prompt(conversations: Sequence[Turns]) -> tuple[Turns, tuple[str, ...]]:
    """(prompt, replies) of conversations that are equal up to their last reply. Raises RowError if they are not."""
    pairs = [answered(turns) for turns in conversations]
    prompts = [prompt for prompt, _ in pairs]
    if any(prompt != prompts[0] for prompt in prompts):
        shared = sum(1 for _ in takewhile(lambda turns: len(set(turns)) == 1, zip(*conversations, strict=False)))
        raise RowError(
            "no common prompt",
            f"the first {shared} turns are the same, of {' and '.join(str(len(turns)) for turns in conversations)}",
        )
    return prompts[0], tuple(reply for _, reply in pairs)
