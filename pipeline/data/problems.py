"""What can be wrong with a row, by name. A row with a problem is left out, counted and listed; one with a remark is kept and counted."""

from __future__ import annotations

from dataclasses import dataclass

PROBLEMS: dict[str, str] = {
    "not UTF-8": "the line is in another encoding",
    "line too long": "the line has more bytes than a line may have",
    "broken JSON": "the line is no JSON",
    "not an object": "the line is JSON, but no object with columns",
    "missing column": "a column that is needed is not in the row",
    "null": "a column that is needed is null",
    "not text": "a column that must be text is something else",
    "broken unicode": "the text has half of a surrogate pair, which no encoding can write",
    "NUL character": "the text has a NUL character, so it is some binary data",
    "too many characters": "a prompt or reply is longer than data.max_characters",
    "no turns": "a transcript without a `Human:` or `Assistant:` that begins a paragraph",
    "no assistant turn": "nobody answers in the conversation",
    "first turn not human": "the conversation begins with a reply, or with text that is nobody's",
    "last turn human": "the conversation ends with a person's turn, so there is no reply",
    "last turn assistant": "a prompt ends with a reply, so there is nothing to answer",
    "turns out of order": "a system message stands behind the beginning",
    "unknown role": "a message's role is not system, user or assistant",
    "broken message": "a message is not an object with role and content",
    "no common prompt": "the conversations differ before their last reply",
    "refused by template": "the chat template refuses the conversation",
    "empty prompt": "there is nothing to answer",
    "empty reply": "a reply has no visible character",
    "identical pair": "both replies are the same",
    "equal replies": "two replies of a ranking are the same",
    "ranking of one": "a ranking of fewer than two replies compares nothing",
    "bad margin": "the margin is not a finite number >= 0",
}
DUPLICATE = "duplicate"  # of an earlier row: left out, but no fault

REMARKS: dict[str, str] = {
    "joined turns": "a speaker spoke several times in a row, which is taken for one turn of several paragraphs",
    "role marker in a reply": "a reply speaks for somebody: it has `Human:` or `Assistant:` within it",
    "contradiction": "an earlier row prefers these replies the other way round",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a row is left out. line: counted from 1; of Parquet, the row. kind: a name in PROBLEMS, or DUPLICATE."""

    source: str
    line: int
    kind: str
    detail: str = ""


class RowError(Exception):
    """A row that cannot be used; whoever reads it knows where it stands and makes a Problem of it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class DataError(ValueError):
    """What is wrong with data as a whole: a recipe's mistake like any ValueError, but told apart from mistakes in a user's code."""
