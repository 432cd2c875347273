"""Texts as the learners' tables: tokenised once, on Ray Data, and kept as Parquet under the hash of their inputs.

    Comparison, Demonstration --texts--> Arrow --Ray Data, in order--> Experience | Comparisons --> cache/<hash>.parquet

A text with too many tokens first loses the oldest exchanges of its prompt, if the task says how, then the oldest tokens
of the prompt. If the reply alone is too long, a demonstration is left out, because its end would be missing; the
replies of a comparison lose their end, because the reward model also scores replies of a policy that are cut off (Huang
et al. 2023, detail 6). All of this is counted, and rows that are left out are listed by number.

Left out: streaming from disk. The texts are in memory already, and their tokens take no more room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors import ragged
from cluster.faults import Fault, RunError, classify, last_lines
from pipeline.encoding.blocks import encode_block
from pipeline.encoding.cache import Cache, content_hash
from pipeline.tasks.task import (
    Comparison,
    DataError,
    Demonstration,
    Split,
    Task,
    comparisons_of,
    demonstrations_of,
    shorter_of,
)

VERSION = 4  # part of the cache's hash: raise it with every change of the code that changes tables
BLOCK_BYTES = 8_000_000  # of text for one Ray task, because a task takes seconds to start
HERE_BYTES = 500_000  # of text that is tokenised before a Ray task would have started, so none is used
SILENCE_S = 1800.0  # longest wait for one block, in seconds
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)

What = Literal["demonstrations", "comparisons"]
TEXTS = pa.schema([("prompts", pa.list_(pa.string())), ("replies", pa.list_(pa.string())), ("margin", pa.float32())])
"""One row a demonstration or comparison. prompts: the prompt, then ever shorter ones that may replace it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTable:
    """A table in the cache, and its account. Lengths are tokens of a row, all texts of a comparison together."""

    path: Path
    rows: int
    tokens: int
    truncated: int  # rows that lost any token
    cut_replies: int  # of these, rows in which a reply lost its end
    excluded: tuple[int, ...]  # numbers, from 0, of the task's rows that are not in the table
    quantiles: tuple[int, ...]  # of the lengths, at QUANTILES


def encode_demonstrations(task: Task, split: Split, tokenizer_path: str, context: int, cache: Path) -> EncodedTable:
    """The demonstrations of a task as an `Experience` table.

    tokenizer_path: folder or hub name. context: longest row, end-of-text token included. cache: a folder that runs
    share. Unless the table is in the cache, this needs a connection to Ray and one free CPU. Raises ValueError for a
    task without demonstrations, and when none fits; RunError when tokenising fails or makes no progress.
    """
    return _encode(
        "demonstrations",
        demonstration_texts(demonstrations_of(task, split), shorter_of(task)),
        _shortens(task),
        tokenizer_path,
        context,
        cache,
    )


def encode_comparisons(task: Task, split: Split, tokenizer_path: str, context: int, cache: Path) -> EncodedTable:
    """The comparisons of a task, as a `Comparisons` table; see `encode_demonstrations`."""
    return encode_pairs(
        comparisons_of(task, split), tokenizer_path, context, cache, shorter=shorter_of(task), shortens=_shortens(task)
    )


def encode_pairs(
    comparisons: Sequence[Comparison],
    tokenizer_path: str,
    context: int,
    cache: Path,
    *,
    shorter: Callable[[str], Iterable[str]] = lambda prompt: (),
    shortens: bool = True,
) -> EncodedTable:
    """Any comparisons, such as those sampled from a policy; see `encode_demonstrations`."""
    return _encode("comparisons", comparison_texts(comparisons, shorter), shortens, tokenizer_path, context, cache)


def demonstration_texts(demonstrations: Sequence[Demonstration], shorter: Callable[[str], Iterable[str]]) -> pa.Table:
    """Demonstrations as a TEXTS table. shorter: gives the ever shorter texts of a prompt."""
    return _texts([(d.prompt, (d.response,), 0.0) for d in demonstrations], shorter)


def comparison_texts(comparisons: Sequence[Comparison], shorter: Callable[[str], Iterable[str]]) -> pa.Table:
    """Comparisons as a TEXTS table. shorter: gives the ever shorter texts of a prompt."""
    return _texts([(c.prompt, c.replies, c.margin) for c in comparisons], shorter)


def _texts(rows: Sequence[tuple[str, tuple[str, ...], float]], shorter: Callable[[str], Iterable[str]]) -> pa.Table:
    prompts, replies, margins = zip(*rows, strict=True) if rows else ((), (), ())
    columns = [[[prompt, *shorter(prompt)] for prompt in prompts], list(replies), list(margins)]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, TEXTS, strict=True)], schema=TEXTS)


def _shortens(task: Task) -> bool:
    """Whether rows may be shortened; a task without a setting for it keeps its rows whole or leaves them out."""
    data = getattr(task, "data", None)
    return bool(getattr(data, "too_long", "exclude") == "shorten")


def _encode(
    what: What, texts: pa.Table, shortens: bool, tokenizer_path: str, context: int, cache: Path
) -> EncodedTable:
    kept = Cache(cache)
    name = content_hash(texts, _tokenizer_text(tokenizer_path), what, context, shortens, VERSION)
    if (found := kept.find(name)) is None:
        encode = partial(
            encode_block,
            comparisons=what == "comparisons",
            tokenizer_path=tokenizer_path,
            context=context,
            shortens=shortens,
        )
        texts = texts.append_column("number", pa.array(range(texts.num_rows), pa.int64()))
        blocks = [
            block
            for block in (_on_ray_data(texts, encode) if texts.nbytes > HERE_BYTES else [encode(texts)])
            if block.num_rows
        ]
        if not blocks:
            raise DataError(
                f"model.context: must hold at least one of the {what}, got {context} tokens, and none of "
                f"{texts.num_rows} fits; raise it"
            )
        found = kept.keep(name, *_gathered(pa.concat_tables(blocks), texts.num_rows))
    path, account = found
    excluded, quantiles = tuple(account.pop("excluded")), tuple(account.pop("quantiles"))
    return EncodedTable(path=path, excluded=excluded, quantiles=quantiles, **account)


def _on_ray_data(texts: pa.Table, encode: Callable[[pa.Table], pa.Table]) -> list[pa.Table]:
    """Tokenise numbered texts in Ray tasks; the blocks return in order. Raises RunError."""
    import ray
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError

    _quieten()
    blocks = max(1, min(texts.num_rows, -(-texts.nbytes // BLOCK_BYTES)))
    bounds = np.linspace(0, texts.num_rows, blocks + 1).astype(int).tolist()
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = SILENCE_S
    with ray.data.DataContext.current(context):
        try:
            data = ray.data.from_arrow([texts.slice(start, end - start) for start, end in pairwise(bounds)])
            encoded = data.map_batches(encode, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
            tables: list[pa.Table] = ray.get(encoded.to_arrow_refs(), timeout=SILENCE_S)
        except ExecutionTimeoutError as error:
            remedy = "It needs a CPU that no placement has reserved."
            raise RunError(
                "data", "tokenising", f"no block was done within {SILENCE_S:g} s", remedy, fault=Fault.EXPIRED
            ) from error
        except ray.exceptions.RayError as error:
            raise RunError("data", "tokenising", last_lines(error), fault=classify(error)) from error
    return tables


def _quieten() -> None:
    """Keep Ray Data's messages off the terminal; its log file in Ray's own folder has them."""
    logger = logging.getLogger("ray.data")
    for handler in [handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]:
        logger.removeHandler(handler)


def _gathered(encoded: pa.Table, rows: int) -> tuple[pa.Table, dict[str, Any]]:
    """(the learners' table with its own ids, account) of all blocks together."""
    lengths = ragged.lengths(encoded["tokens"])
    account = {
        "rows": encoded.num_rows,
        "tokens": int(lengths.sum()),
        "truncated": pc.sum(encoded["truncated"]).as_py(),
        "cut_replies": pc.sum(encoded["cut"]).as_py(),
        "excluded": sorted(set(range(rows)) - set(encoded["number"].to_pylist())),
        "quantiles": np.quantile(lengths, QUANTILES, method="nearest").astype(int).tolist(),
    }
    table = encoded.drop_columns(["number", "truncated", "cut"])
    ids = pa.array(range(encoded.num_rows), pa.int64())
    return pa.table(
        {name: ids if name in ("sample_id", "group_id") else table[name] for name in table.column_names}
    ), account


def _tokenizer_text(path: str) -> str:
    """Everything that the ids of a tokenizer depend on, as text."""
    from actors.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    inner = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"
    )
    return f"{tokenizer.eos_token_id} {tokenizer.pad_token_id} {inner}"
