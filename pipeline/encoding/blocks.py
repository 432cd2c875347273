"""A block of texts as token rows: the work of one Ray task.

Rows that do not fit are shortened or left out, as `encode.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actors.experience import Comparisons, Experience
from pipeline.encoding.tables import demonstration_table

if TYPE_CHECKING:
    from actors.models.text import Ids, TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """A row that fits the context.

    number: of the task's row. parts: prompt and response of a demonstration, or all texts of a comparison; each text
    ends with end-of-text. truncated: whether the row lost anything; cut: whether a reply lost its end.
    """

    number: int
    parts: Sequence[Ids]
    truncated: bool = False
    cut: bool = False


def encode_block(texts: pa.Table, *, comparisons: bool, tokenizer_path: str, context: int, shortens: bool) -> pa.Table:
    """Tokenise a block of TEXTS with a column `number`.

    Returns the rows that fit, as the learners' table with the columns `number`, `truncated` and `cut` after its own.
    """
    codec, given = _codec(tokenizer_path), texts.to_pylist()
    eos = codec.tokenizer.eos_token_id
    found = (
        _comparisons(given, codec, eos, context, shortens)
        if comparisons
        else _demonstrations(given, codec, eos, context, shortens, _learned(tokenizer_path))
    )
    rows = [row for row in found if row]
    table = (
        Comparisons.of_texts([row.parts for row in rows], _margins(texts, rows)).table
        if comparisons
        else _demonstration_table(rows)
    )
    account = {"number": pa.int64(), "truncated": pa.bool_(), "cut": pa.bool_()}
    for name, dtype in account.items():
        table = table.append_column(name, pa.array([getattr(row, name) for row in rows], dtype))
    return table


def _demonstrations(
    rows: list[dict[str, Any]], codec: TextCodec, eos: int, context: int, shortens: bool, learned: frozenset[int]
) -> list[EncodedRow | None]:
    """learned: control tokens that are learned with the reply."""
    prompts = codec.encode_prompts([row["prompts"][0] for row in rows])
    responses = codec.encode_replies([row["replies"][0] for row in rows])
    found: list[EncodedRow | None] = []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        prompt, response = with_option(prompt, response, learned)
        room, response = context - len(response) - 1, [*response, eos]
        if len(prompt) <= room:
            found.append(EncodedRow(number=row["number"], parts=(prompt, response)))
        elif room < 1 or not shortens:
            found.append(None)
        else:
            ids = [with_option(ids, [], learned)[0] for ids in codec.encode_prompts(row["prompts"][1:])]
            prompt = next((p for p in ids if len(p) <= room), codec.shortened((ids or [prompt])[-1], room))
            found.append(EncodedRow(number=row["number"], parts=(prompt, response), truncated=True))
    return found


def _comparisons(
    rows: list[dict[str, Any]], codec: TextCodec, eos: int, context: int, shortens: bool
) -> list[EncodedRow | None]:
    """A prompt and its reply are encoded as one text, as a classifier will read it."""
    replies = [reply for row in rows for reply in row["replies"]]
    texts = iter(codec.encode_judged([row["prompts"][0] for row in rows for _ in row["replies"]], replies))
    found: list[EncodedRow | None] = []
    for row in rows:
        whole = [next(texts) for _ in row["replies"]]
        truncated = max(map(len, whole)) >= context
        kept, cut = _shortened(row, whole, codec, context) if truncated and shortens else (whole, False)
        # texts that became equal compare nothing
        fits = max(map(len, kept)) < context and len(set(map(tuple, kept))) == len(kept)
        found.append(
            EncodedRow(number=row["number"], parts=[[*text, eos] for text in kept], truncated=truncated, cut=cut)
            if fits
            else None
        )
    return found


def _shortened(row: dict[str, Any], whole: list[Ids], codec: TextCodec, context: int) -> tuple[list[Ids], bool]:
    """(texts, whether a reply lost its end) of a comparison that is too long.

    The prompt is shortened until all texts fit, down to its last token; then the replies lose their end.
    """
    texts, prompt = whole, row["prompts"][-1]
    for prompt in row["prompts"][1:]:
        texts = codec.encode_judged([prompt] * len(row["replies"]), row["replies"])
        if max(map(len, texts)) < context:
            return texts, False
    lost = min(
        max(map(len, texts)) + 1 - context, max(len(codec.encode_prompts([prompt])[0]) - len(codec.prefix) - 1, 0)
    )
    rest = [codec.shortened(text, len(text) - lost) for text in texts]
    return [text[: context - 1] for text in rest], max(map(len, rest)) >= context


def with_option(prompt: Ids, response: Ids, learned: frozenset[int]) -> tuple[Ids, Ids]:
    """Prompt and response of a demonstration; a control token between them that is learned begins the response."""
    return (prompt[:-1], [prompt[-1], *response]) if len(prompt) > 1 and prompt[-1] in learned else (prompt, response)


def _demonstration_table(rows: Sequence[EncodedRow]) -> pa.Table:
    return (
        demonstration_table([(row.parts[0], row.parts[1]) for row in rows]).table
        if rows
        else Experience.schema.empty_table()
    )


def _margins(texts: pa.Table, rows: Sequence[EncodedRow]) -> list[float]:
    margins = dict(zip(texts["number"].to_pylist(), texts["margin"].to_pylist(), strict=True))
    return [margins[row.number] for row in rows]


@cache
def _learned(path: str) -> frozenset[int]:
    from actors.models.option_tokens import learned_options

    return learned_options(path, _codec(path).tokenizer)


@cache
def _codec(path: str) -> TextCodec:
    from actors.models.text import TextCodec
    from actors.models.tokenizer import load_tokenizer

    return TextCodec(load_tokenizer(path))
