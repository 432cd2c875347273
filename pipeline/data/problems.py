"""The names of what can be wrong with a row.

A row with a problem is left out, counted and listed; one with a remark is kept and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.tasks.task import DataError

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
    "bad margin": "the margin is not a number from 0 to 1,000,000",
    "broken CSV": "the line has more or fewer cells than the first, or its quotes do not fit",
    "tool use": "a message calls a tool or is a tool's answer, which cannot be laid out as text",
    "other media": "a part of a message is an image, a sound or a file",
}
TOOLS, MEDIA = "tool use", "other media"
DUPLICATE = "duplicate"  # of an earlier row
NO_FAULT = (DUPLICATE, TOOLS, MEDIA)  # left out and counted, but there is nothing to mend in such a row

REMARKS: dict[str, str] = {
    "joined turns": "a speaker spoke several times in a row, which is taken for one turn of several paragraphs",
    "role marker in a reply": "a reply speaks for somebody: it has `Human:` or `Assistant:` within it",
    "column left out": "a column has no value that JSON can hold, or a very long one, and is not handed to the reward",
    "contradiction": "an earlier row prefers these replies the other way round",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The reason why a row is left out. line: from 1; in Parquet, the row. kind: a name in PROBLEMS, or DUPLICATE."""

    source: str
    line: int
    kind: str
    detail: str = ""


class RowError(Exception):
    """A row that cannot be used; the reader, which knows its line, turns this into a Problem."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class NoRowsError(DataError):
    """There are no rows of a kind, or none on one side of the split. Some callers can do without them."""
