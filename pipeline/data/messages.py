"""Conversations as lists of messages: {"role": ..., "content": ...}, or ShareGPT's {"from": ..., "value": ...}.

Content is text, or a list of parts that are all text. A developer's message counts as a system message. A row with a
message that has no plain text (a tool's call or answer, an image) is left out, under a name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.problems import MEDIA, TOOLS, RowError
from pipeline.data.turns import Role, Turn, Turns

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_TOOLS = ("tool", "function", "function_call", "tool_call", "observation", "ipython")
_CALLS = ("tool_calls", "function_call")
_TEXTS = ("text", "input_text", "output_text")


def parse(messages: Sequence[object]) -> Turns:
    """The turns of a list of messages. Raises RowError."""
    return tuple(_turn(number, message) for number, message in enumerate(messages))


def dump(turns: Turns) -> list[dict[str, str]]:
    """Turns as a chat template takes them."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def contents(message: object) -> list[object]:
    """The contents of a message, of any type, without a check."""
    if not isinstance(message, dict):
        return [message]
    content = _first(message, "content", "value")
    return (
        [part.get("text") if isinstance(part, dict) else part for part in content]
        if isinstance(content, list)
        else [content]
    )


def _turn(number: int, message: object) -> Turn:
    if not isinstance(message, dict) or not (
        {"role", "from"} & set(message) and {"content", "value", *_CALLS} & set(message)
    ):
        raise RowError("broken message", f"message {number} must be an object with role and content")
    role, content = _first(message, "role", "from"), _first(message, "content", "value")
    if (isinstance(role, str) and role.strip().lower() in _TOOLS) or any(message.get(name) for name in _CALLS):
        raise RowError(TOOLS, f"message {number}")
    if not isinstance(role, str) or role.strip().lower() not in _ROLES:
        raise RowError(
            "unknown role", f"message {number} has the role {role!r:.40}, must be one of system, user, assistant"
        )
    if content is None:
        raise RowError("null", f"the content of message {number}")
    if isinstance(content, list):
        content = "".join(_part(number, part) for part in content)
    if not isinstance(content, str):
        raise RowError("not text", f"the content of message {number} is a {type(content).__name__}")
    return Turn(_ROLES[role.strip().lower()], content)


def _part(number: int, part: object) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError("not text", f"a part of message {number} is a {type(part).__name__}")
    kind, text = part.get("type", "text"), part.get("text")
    if kind in _TEXTS and isinstance(text, str):
        return text
    if kind in _TEXTS:
        raise RowError("not text", f"a part of message {number} has no text")
    raise RowError(
        TOOLS if str(kind) in ("tool_use", "tool_call", "tool_result") else MEDIA,
        f"a part of message {number} is of the type {kind!r:.40}",
    )


def _first(message: dict[str, object], *names: str) -> object:
    """The first value under these names that is not null; mixed tables have a null under the others."""
    return next((message[name] for name in names if message.get(name) is not None), None)
