"""Conversations as chat models take them: lists of {"role": ..., "content": ...}."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.problems import RowError
from pipeline.data.turns import Role, Turn, Turns

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "human": "user"}


def parse(messages: Sequence[object]) -> Turns:
    """The turns of a list of messages. Raises RowError."""
    return tuple(_turn(number, message) for number, message in enumerate(messages))


def dump(turns: Turns) -> list[dict[str, str]]:
    """Turns as a chat template takes them."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _turn(number: int, message: object) -> Turn:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise RowError("broken message", f"message {number} must be an object with role and content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError("unknown role", f"message {number} has the role {role!r:.40}, must be one of system, user, assistant")
    if content is None:
        raise RowError("null", f"the content of message {number}")
    if not isinstance(content, str):
        raise RowError("not text", f"the content of message {number} is a {type(content).__name__}")
    return Turn(_ROLES[role], content)
