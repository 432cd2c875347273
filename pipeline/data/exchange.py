"""An exchange: a prompt as turns, with no reply (a prompt), one (a demonstration) or several (a comparison).

    Row --exchange_of--> Exchange | RowError

Rows have three forms: transcripts, lists of messages, plain columns. The column of a reply holds the reply alone, or
the whole conversation that ends with it. The prompt of a comparison is what its conversations share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.data import messages, transcript
from pipeline.data.config import ColumnsConfig, DataConfig, Kind
from pipeline.data.metadata import metadata_of
from pipeline.data.problems import RowError
from pipeline.data.reader import Row
from pipeline.data.turns import Turn, Turns, answered, asking, checked, joined, shared_prompt

Form = Literal["transcript", "columns", "messages"]
SHAREGPT = "conversations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A checked row. replies: the best first, all different, none empty. remarks: names in `problems.REMARKS`."""

    source: str
    line: int
    prompt: Turns
    replies: tuple[str, ...] = ()
    margin: float = 0.0
    remarks: tuple[str, ...] = ()
    metadata: str = "{}"  # JSON: the row's other columns


MAX_MARGIN = 1e6  # far beyond any with which a loss is of use


def wanted(kind: Kind, columns: ColumnsConfig) -> list[tuple[str, ...]]:
    """The sets of columns of which a row of this kind must have one."""
    pairs: list[tuple[str, ...]] = [(columns.chosen, columns.rejected), (columns.ranking,)]
    if kind == "comparisons":
        return pairs
    replies: list[tuple[str, ...]] = [
        (columns.response,),
        (columns.messages,),
        (columns.chosen,),
        (columns.text,),
        (SHAREGPT,),
    ]
    return replies if kind == "demonstrations" else [(columns.prompt,), *replies]


def with_own_columns(row: Row, columns: ColumnsConfig) -> Row:
    """The row with ShareGPT's column `conversations` renamed to that of our messages, unless it has both."""
    if SHAREGPT in row.values and columns.messages not in row.values:
        return replace(
            row, values={(columns.messages if name == SHAREGPT else name): value for name, value in row.values.items()}
        )
    return row


def form_of(rows: Iterable[Row], kind: Kind, columns: ColumnsConfig) -> Form:
    """The form that most of the rows have."""
    names = (columns.prompt, columns.response, columns.messages, columns.chosen, columns.ranking, columns.text)
    found = Counter(
        _form([row.values[name] for name in names if row.values.get(name) is not None], columns) for row in rows
    )
    return max(found, key=lambda form: found[form]) if found else "columns"


def exchange_of(row: Row, kind: Kind, form: Form, data: DataConfig) -> Exchange:
    """The row as an exchange. Raises RowError naming what is wrong with it."""
    reader = _Reader(row, form, data)
    prompt, replies = {
        "comparisons": reader.comparison,
        "demonstrations": reader.demonstration,
        "prompts": reader.prompt,
    }[kind]()
    _check_prompt(prompt)
    _check_replies(replies, row.values.get(data.columns.ranking) is not None)
    if kind == "comparisons" and any(transcript.speaks_for_others(reply) for reply in replies):
        reader.remarks.add("role marker in a reply")
    margin = reader.margin() if kind == "comparisons" else 0.0
    metadata, is_whole = metadata_of(row.values, reader.asked, data.columns.metadata, data.max_characters)
    if not is_whole:
        reader.remarks.add("column left out")
    remarks = tuple(sorted(reader.remarks))
    return Exchange(
        source=row.source,
        line=row.line,
        prompt=prompt,
        replies=replies,
        margin=margin,
        remarks=remarks,
        metadata=metadata,
    )


class _Reader:
    """Reads one row in one form."""

    def __init__(self, row: Row, form: Form, data: DataConfig) -> None:
        self.values, self.form, self.data = row.values, form, data
        self.remarks: set[str] = set()

    def comparison(self) -> tuple[Turns, tuple[str, ...]]:
        columns = self.data.columns
        if self._has(columns.ranking):
            answers = self._value(columns.ranking)
            if not isinstance(answers, list):
                raise RowError(
                    "not text", f"column {columns.ranking!r} must be a list of replies, is a {type(answers).__name__}"
                )
            if len(answers) < 2:
                raise RowError("ranking of one", f"it has {len(answers)}")
        else:
            answers = [self._value(columns.chosen), self._value(columns.rejected)]
        before = self._before()
        return shared_prompt([self._conversation(before, answer) for answer in answers])

    def demonstration(self) -> tuple[Turns, tuple[str, ...]]:
        columns = self.data.columns
        if self._has(columns.messages):
            prompt, reply = answered(self._joined(self._whole(columns.messages)))
        elif self._has(columns.text) and not (self._has(columns.response) or self._has(columns.chosen)):
            prompt, reply = self._divided(self._value(columns.text))
        else:
            name = columns.chosen if self._has(columns.chosen) and not self._has(columns.response) else columns.response
            prompt, reply = answered(self._conversation(self._before(), self._value(name)))
        return prompt, (reply,)

    def prompt(self) -> tuple[Turns, tuple[str, ...]]:
        """The prompt column or, without one, the prompt of the row's comparison or demonstration."""
        columns = self.data.columns
        if self._has(columns.prompt):
            return asking(self._before()), ()
        if self._has(columns.ranking) or self._has(columns.rejected):
            return self.comparison()[0], ()
        if self._has(columns.messages):
            turns = self._joined(self._whole(columns.messages))
            return (turns if turns and turns[-1].role == "user" else answered(turns)[0]), ()
        if self._has(columns.response) or self._has(columns.chosen) or self._has(columns.text):
            return self.demonstration()[0], ()
        self._value(columns.prompt)  # raises, because it is missing
        raise AssertionError

    @property
    def asked(self) -> set[str]:
        """The columns that the prompt is read from; all others are metadata."""
        columns = self.data.columns
        whole = {columns.messages, columns.text} if not self._has(columns.prompt) else set()
        pairs = (
            {columns.chosen, columns.rejected, columns.ranking}
            if not self._has(columns.prompt) or self.form != "columns"
            else set()
        )
        return {columns.prompt} | whole | pairs

    def margin(self) -> float:
        value = self.values.get(self.data.columns.margin)
        if value is None:
            return 0.0
        # NaN is in no range
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_MARGIN:
            raise RowError("bad margin", f"it is {_shown(value)}, must be from 0 to {MAX_MARGIN:,.0f}")
        return float(value)

    def _before(self) -> Turns:
        """The turns of the prompt column; none if the replies' columns hold whole conversations."""
        name = self.data.columns.prompt
        if not self._has(name) and self.form != "columns":
            return ()
        value = self._value(name)
        turns = self._turns(name, value, "user")
        return asking(self._joined(turns)) if turns else ()

    def _divided(self, text: Any) -> tuple[Turns, str]:
        """(prompt, reply) of running text; the space between them begins the reply, as everywhere."""
        name, words = self.data.columns.text, self.data.prompt_words
        if not isinstance(text, str):
            raise RowError("not text", f"column {name!r} is a {type(text).__name__}")
        head = re.match(rf"\s*\S+(?:\s+\S+){{{words - 1}}}", self._limited(name, text))
        if head is None:
            raise RowError("empty reply", f"column {name!r} has no more than {words} words")
        return (Turn("user", head.group().lstrip()),), text[head.end() :]

    def _whole(self, name: str) -> Turns:
        value = self._value(name)
        if not isinstance(value, list):
            raise RowError("not text", f"column {name!r} must be a list of messages, is a {type(value).__name__}")
        return messages.parse(self._limited(name, value))

    def _conversation(self, before: Turns, value: Any) -> Turns:
        """The conversation that ends with a reply; the value holds all of it, or the reply alone."""
        if value is None:
            raise RowError("null", "a reply")
        turns = self._turns("reply", value, "assistant")
        if before and turns and turns[0].role == "assistant":
            turns = (*before, *turns)
        elif before and self._joined(turns)[: len(before)] != before:
            raise RowError("no common prompt", "the reply's conversation does not begin with the prompt")
        elif not before and self.form == "transcript":
            turns = transcript.parse(value)  # raises with the reason if it is none
        return self._joined(turns)

    def _turns(self, name: str, value: Any, role: Literal["user", "assistant"]) -> Turns:
        """The turns of a value: a conversation, or one turn of `role` if the value names no speaker."""
        if isinstance(value, list) and self.form == "messages":
            return messages.parse(self._limited(name, value))
        if not isinstance(value, str):
            raise RowError("not text", f"{name!r} is a {type(value).__name__}")
        text = self._limited(name, value)
        return (
            transcript.parse(text)
            if self.form == "transcript" and transcript.is_transcript(text)
            else (Turn(role, text),)
        )

    def _joined(self, turns: Turns) -> Turns:
        """Join turns of one speaker in a row; plain columns are taken literally, spaces included."""
        if self.form == "columns":
            return turns
        together = joined(turns)
        if len(together) < len(turns):
            self.remarks.add("joined turns")
        return together

    def _has(self, name: str) -> bool:
        """Whether the row has the column, and it is not null."""
        return self.values.get(name) is not None

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise RowError("missing column", f"no {name!r} among {sorted(self.values)}"[:200])
        if self.values[name] is None:
            raise RowError("null", f"column {name!r}")
        return self.values[name]

    def _limited(self, name: str, value: Any) -> Any:
        """The text or messages, after the check that all of it can be encoded and is not too long."""
        for text in (
            text for part in (value if isinstance(value, list) else [value]) for text in messages.contents(part)
        ):
            if isinstance(text, str):
                _check_text(name, text, self.data.max_characters)
        return value


def _shown(value: object) -> str:
    """A value in at most 40 characters. Python refuses to write an integer of thousands of digits."""
    return (
        f"an integer of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 128
        else f"{value!r:.40}"
    )


def _check_text(name: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise RowError("too many characters", f"{name!r} has {len(text)}, at most {limit} may be")
    if "\x00" in text:
        raise RowError("NUL character", f"in {name!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("broken unicode", f"character {error.start + 1} of {name!r}") from error


def _check_prompt(prompt: Turns) -> None:
    if not prompt or not prompt[-1].text.strip():
        raise RowError("empty prompt")
    checked(prompt)


def _check_replies(replies: tuple[str, ...], ranked: bool) -> None:
    for number, reply in enumerate(replies):
        if not reply.strip():
            raise RowError(
                "empty reply", f"number {number + 1} of {len(replies)}, the best first" if len(replies) > 1 else ""
            )
    if len({reply.strip() for reply in replies}) < len(replies):
        raise RowError("equal replies" if ranked else "identical pair")


def _form(values: list[Any], columns: ColumnsConfig) -> Form:
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    if any(isinstance(part, dict | list) for part in flat):
        return "messages"
    return "transcript" if any(isinstance(part, str) and transcript.is_transcript(part) for part in flat) else "columns"
