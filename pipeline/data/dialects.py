"""The column names of TRL, OpenRLHF and verl, recognised from the first rows of a source.

    first rows, data.columns --recognise--> data.columns of this source, and what was recognised in words

A name of the recipe's always counts first. Another name stands in only where no row has the recipe's. Two names for
one thing are an error: which of them is meant decides what is learned, and only the user knows. Left out: rows
themselves, which `exchange.py` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.config import ColumnsConfig, Kind
from pipeline.data.exchange import SHAREGPT, form_of
from pipeline.data.reader import Row
from pipeline.tasks.task import DataError

PROMPTS = {"input": "OpenRLHF", "context_messages": "OpenRLHF", "instruction": "Alpaca"}
REPLIES = {"completion": "TRL", "output": "OpenRLHF"}
VERL = ("data_source", "reward_model")  # beside the prompt
_UNPAIRED = "label"  # beside a completion of TRL: whether it is a good one


def other_names(kind: Kind) -> list[tuple[str, ...]]:
    """Sets of columns, besides `exchange.wanted`, of which a row of this kind may have one."""
    names = {"comparisons": (), "demonstrations": (*REPLIES,), "prompts": (*PROMPTS, *REPLIES)}[kind]
    return [(name,) for name in names]


def recognise(rows: Sequence[Row], kind: Kind, columns: ColumnsConfig, source: str) -> tuple[ColumnsConfig, str]:
    """The columns as this source names them, and a phrase that says what was recognised; "" for our own names.

    Raises DataError naming the setting that decides, where several columns could be meant, or where what looks like
    demonstrations is TRL's unpaired preferences.
    """
    found = {name for row in rows for name, value in row.values.items() if value is not None}
    said: dict[str, str] = {}
    whole = {columns.messages, SHAREGPT, columns.text} & found
    needs_reply = kind == "demonstrations" or (kind == "prompts" and columns.prompt not in found)
    if needs_reply and not whole and not {columns.response, columns.chosen, columns.ranking} & found:
        said |= _stand_in("response", columns.response, REPLIES, found, kind, source)
        if said and kind == "demonstrations":
            _check_paired(rows, said["response"], source)
    known = columns.model_copy(update=said)
    replies = {known.response, known.chosen, known.rejected, known.ranking} & found
    if not whole and columns.prompt not in found and _are_plain(rows, kind, known, replies):
        said |= _stand_in("prompt", columns.prompt, PROMPTS, found, kind, source)
    if said:
        makers = sorted({(PROMPTS | REPLIES)[name] for name in said.values()})
        return columns.model_copy(update=said), f"{_named(said)} ({' and '.join(makers)})"
    if columns.prompt in found and set(VERL) <= found:
        return columns, f"verl's rows, with {' and '.join(VERL)} for the reward function"
    return columns, ""


def _stand_in(
    field: str, own: str, others: Mapping[str, str], found: set[str], kind: Kind, source: str
) -> dict[str, str]:
    """{field: column} of the only other name that the rows have; empty if they have none, or the recipe's own."""
    here = [name for name in others if name in found]
    if own in found or not here:
        return {}
    if len(here) > 1:
        raise DataError(
            f"data.columns.{field}: must say which column of {source!r} holds the {field} of its {kind}, since it has "
            f'{" and ".join(map(repr, here))} and no {own!r}; set it, such as data.columns.{field} = "{here[0]}"'
        )
    return {field: here[0]}


def _check_paired(rows: Sequence[Row], reply: str, source: str) -> None:
    if any(isinstance(row.values.get(_UNPAIRED), bool) for row in rows):
        raise DataError(
            f"data.columns.response: must be set where replies are good or bad, got {source!r} with {reply!r} and a "
            f"{_UNPAIRED!r} of true or false, which are TRL's unpaired preferences; to imitate every reply, set it to "
            f'"{reply}"; to imitate the good ones, leave the others out of the file'
        )


def _are_plain(rows: Sequence[Row], kind: Kind, columns: ColumnsConfig, replies: set[str]) -> bool:
    """Whether the replies hold no conversation that has the prompt in it."""
    shown = [
        Row(source=row.source, line=row.line, values={name: row.values[name] for name in replies & row.values.keys()})
        for row in rows
    ]
    return not replies or form_of(shown, kind, columns) == "columns"


def _named(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} in {column!r}" for field, column in sorted(said.items()))
