"""Tokenising a block of texts: what one Ray task does. Rows that do not fit are shortened or left out as `encode.py` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from actors import ragged

Ids = list[int]

COMPARISONS = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("action_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("segment_starts", pa.list_(pa.int32()), nullable=False),
        pa.field("margin", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A row within the context. parts: prompt and response of a demonstration, or all texts of a comparison; each text ends with end-of-text."""

    number: int
    parts: Sequence[Ids]
    truncated: bool = False
    cut: bool = False


def encode_block(texts: pa.Table, *, comparisons: bool, tokenizer_path: str, context: int, shortens: bool) -> pa.Table:
    """A block of TEXTS with a column `number` to the learners' table, with the columns `number`, `truncated` and `cut` of every row that fits."""
    tokenizer = _tokenizer(tokenizer_path)

    def encode(lines: list[str]) -> list[Ids]:
        ids: list[Ids] = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
        return ids

    fit_rows = _comparisons if comparisons else _demonstrations
    rows = [row for row in fit_rows(texts.to_pylist(), encode, tokenizer.eos_token_id, context, shortens) if row]
    table = compared([row.parts for row in rows], _margins(texts, rows)) if comparisons else _experience(rows)
    account = {"number": pa.int64(), "truncated": pa.bool_(), "cut": pa.bool_()}
    for name, dtype in account.items():
        table = table.append_column(name, pa.array([getattr(row, name) for row in rows], dtype))
    return table


def compared(rows: Sequence[Sequence[Ids]], margins: Sequence[float]) -> pa.Table:
    """Comparisons, each the token ids of its texts, the best first, as a table with the schema COMPARISONS.

    Each text ends with its end-of-text token, the one place where the action mask is true.
    """
    flat = [text for row in rows for text in row]
    ends = np.cumsum([len(text) for text in flat], dtype=np.int64)
    texts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])  # where each row's texts begin, among all
    offsets = np.concatenate([[0], ends])[texts]
    action = np.zeros(offsets[-1], np.bool_)
    action[ends - 1] = True
    starts = np.concatenate([[0], ends])[:-1] - np.repeat(offsets[:-1], np.diff(texts))
    columns = [
        pa.array(range(len(rows)), pa.int64()),
        ragged.unflat(np.array([token for text in flat for token in text], np.int32), offsets, pa.int32()),
        ragged.unflat(action, offsets, pa.bool_()),
        ragged.unflat(starts.astype(np.int32), texts, pa.int32()),
        pa.array(margins, pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=COMPARISONS)


def _demonstrations(rows: list[dict[str, Any]], encode: Callable[[list[str]], list[Ids]], eos: int, context: int, shortens: bool) -> list[Fit | None]:
    prompts = encode([row["prompts"][0] for row in rows])
    responses = encode([row["replies"][0] for row in rows])
    found: list[Fit | None] = []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        room, response = context - len(response) - 1, [*response, eos]
        if len(prompt) <= room:
            found.append(Fit(number=row["number"], parts=(prompt, response)))
        elif room < 1 or not shortens:
            found.append(None)
        else:
            ids = encode(row["prompts"][1:])
            prompt = next((p for p in ids if len(p) <= room), (ids or [prompt])[-1][-room:])
            found.append(Fit(number=row["number"], parts=(prompt, response), truncated=True))
    return found


def _comparisons(rows: list[dict[str, Any]], encode: Callable[[list[str]], list[Ids]], eos: int, context: int, shortens: bool) -> list[Fit | None]:
    """A text is tokenised as one, prompt and reply together, as a classifier will read it."""
    texts = iter(encode([row["prompts"][0] + reply for row in rows for reply in row["replies"]]))
    found: list[Fit | None] = []
    for row in rows:
        whole = [next(texts) for _ in row["replies"]]
        truncated = max(map(len, whole)) >= context
        kept, cut = _shortened(row, whole, encode, context) if truncated and shortens else (whole, False)
        fits = max(map(len, kept)) < context and len(set(map(tuple, kept))) == len(kept)  # texts that became the same compare nothing
        found.append(Fit(number=row["number"], parts=[[*text, eos] for text in kept], truncated=truncated, cut=cut) if fits else None)
    return found


def _shortened(row: dict[str, Any], whole: list[Ids], encode: Callable[[list[str]], list[Ids]], context: int) -> tuple[list[Ids], bool]:
    """(texts, whether a reply lost its end): as much of the prompt as lets all of them fit, with its last token at least, and then of each reply what fits."""
    texts, prompt = whole, row["prompts"][-1]
    for prompt in row["prompts"][1:]:
        texts = encode([prompt + reply for reply in row["replies"]])
        if max(map(len, texts)) < context:
            return texts, False
    start = min(max(map(len, texts)) + 1 - context, max(len(encode([prompt])[0]) - 1, 0))
    rest = [text[start:] for text in texts]
    return [text[: context - 1] for text in rest], max(map(len, rest)) >= context


def _experience(rows: Sequence[Fit]) -> pa.Table:
    from actors.experience import Experience
    from pipeline.stages.finetune import demonstrated

    return demonstrated([(row.parts[0], row.parts[1]) for row in rows]).table if rows else Experience.schema.empty_table()


def _margins(texts: pa.Table, rows: Sequence[Fit]) -> list[float]:
    margins = dict(zip(texts["number"].to_pylist(), texts["margin"].to_pylist(), strict=True))
    return [margins[row.number] for row in rows]


@cache
def _tokenizer(path: str) -> Any:
    from actors.model import load_tokenizer

    return load_tokenizer(path)
