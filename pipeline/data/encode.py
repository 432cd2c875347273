"""Checked texts to the tables that learners read: tokenised once, on Ray Data, and kept as Parquet under the hash of everything they depend on.

    Comparison, Demonstration --texts--> Arrow --Ray Data, order kept--> Experience | Comparisons --> cache/<hash>.parquet

A text with too many tokens first loses the oldest exchanges of its prompt, where the task says how, then the oldest tokens of the prompt. A reply that alone is
too long is left out of what is imitated, since its end would be missed; compared replies lose their end, as the reward model sees replies of a policy that are
cut off (Huang et al. 2023, detail 6). All of it is counted, and what is left out is listed by its number.

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
from pipeline.data.blocks import encode_block
from pipeline.data.cache import Cache, content_hash
from pipeline.data.problems import DataError
from pipeline.tasks.task import Comparison, Demonstration, Split, Task, comparisons_of, demonstrations_of, shorter_of

VERSION = 1  # of what is computed here: a change of the code that changes tables must change it
BLOCK_BYTES = 8_000_000  # of text that one Ray task takes; small data are one task, since each takes seconds to start
SILENCE_S = 1800.0  # longest wait for one block, in seconds
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)

What = Literal["demonstrations", "comparisons"]
TEXTS = pa.schema([("prompts", pa.list_(pa.string())), ("replies", pa.list_(pa.string())), ("margin", pa.float32())])
"""One row a demonstration or comparison. prompts: the prompt, then ever shorter ones that may stand for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A table of learners in the cache, and its account. Lengths are of a row, in tokens: of a comparison, of all its texts together."""

    path: Path
    rows: int
    tokens: int
    truncated: int  # rows that lost something
    cut_replies: int  # those of them that lost the end of a reply
    excluded: tuple[int, ...]  # numbers of the task's rows, from 0, that are not in the table
    quantiles: tuple[int, ...]  # of the lengths, at QUANTILES


def encode_demonstrations(task: Task, split: Split, tokenizer_path: str, context: int, cache: Path) -> Encoded:
    """What the task shows to be imitated, as an `Experience` table. Needs a connection to Ray and one free CPU, unless it is in the cache.

    tokenizer_path: folder or hub name. context: longest row, end-of-text token included. cache: a folder that runs share.
    Raises ValueError for a task that has none, and when none fits; RunError when tokenising fails or stands still.
    """
    return _encode("demonstrations", demonstration_texts(demonstrations_of(task, split), shorter_of(task)), _shortens(task), tokenizer_path, context, cache)


def encode_comparisons(task: Task, split: Split, tokenizer_path: str, context: int, cache: Path) -> Encoded:
    """The comparisons of a task, as a `Comparisons` table; see `encode_demonstrations`."""
    return encode_pairs(comparisons_of(task, split), tokenizer_path, context, cache, shorter=shorter_of(task), shortens=_shortens(task))


def encode_pairs(
    comparisons: Sequence[Comparison],
    tokenizer_path: str,
    context: int,
    cache: Path,
    *,
    shorter: Callable[[str], Iterable[str]] = lambda prompt: (),
    shortens: bool = True,
) -> Encoded:
    """Any comparisons, such as those sampled from a policy; see `encode_demonstrations`."""
    return _encode("comparisons", comparison_texts(comparisons, shorter), shortens, tokenizer_path, context, cache)


def demonstration_texts(demonstrations: Sequence[Demonstration], shorter: Callable[[str], Iterable[str]]) -> pa.Table:
    """A TEXTS table."""
    return _texts([(d.prompt, (d.response,), 0.0) for d in demonstrations], shorter)


def comparison_texts(comparisons: Sequence[Comparison], shorter: Callable[[str], Iterable[str]]) -> pa.Table:
    """A TEXTS table."""
    return _texts([(c.prompt, c.replies, c.margin) for c in comparisons], shorter)


def _texts(rows: Sequence[tuple[str, tuple[str, ...], float]], shorter: Callable[[str], Iterable[str]]) -> pa.Table:
    prompts, replies, margins = zip(*rows, strict=True) if rows else ((), (), ())
    columns = [[[prompt, *shorter(prompt)] for prompt in prompts], list(replies), list(margins)]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, TEXTS, strict=True)], schema=TEXTS)


def _shortens(task: Task) -> bool:
    """Whether rows may lose something. A task without a say in it keeps its rows whole or not at all."""
    data = getattr(task, "data", None)
    return bool(getattr(data, "too_long", "exclude") == "shorten")


def _encode(what: What, texts: pa.Table, shortens: bool, tokenizer_path: str, context: int, cache: Path) -> Encoded:
    kept = Cache(cache)
    name = content_hash(texts, _tokenizer_text(tokenizer_path), what, context, shortens, VERSION)
    if (found := kept.find(name)) is None:
        encode = partial(encode_block, comparisons=what == "comparisons", tokenizer_path=tokenizer_path, context=context, shortens=shortens)
        blocks = [block for block in _on_ray_data(texts, encode) if block.num_rows]
        if not blocks:
            raise DataError(f"model.context: must hold at least one of the {what}, got {context} tokens, and none of {texts.num_rows} fits; raise it")
        found = kept.keep(name, *_gathered(pa.concat_tables(blocks), texts.num_rows))
    path, account = found
    excluded, quantiles = tuple(account.pop("excluded")), tuple(account.pop("quantiles"))
    return Encoded(path=path, excluded=excluded, quantiles=quantiles, **account)


def _on_ray_data(texts: pa.Table, encode: Callable[[pa.Table], pa.Table]) -> list[pa.Table]:
    """Blocks of texts, their rows numbered, to blocks of tokens, in order. Raises RunError."""
    import ray
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError

    _quieten()
    texts = texts.append_column("number", pa.array(range(texts.num_rows), pa.int64()))
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
            raise RunError("data", "tokenising", f"no block was done within {SILENCE_S:g} s", remedy, fault=Fault.EXPIRED) from error
        except ray.exceptions.RayError as error:
            raise RunError("data", "tokenising", last_lines(error), fault=classify(error)) from error
    return tables


def _quieten() -> None:
    """Ray Data tells the terminal what it does; its log file, in Ray's own log folder, hears it too, and that is enough."""
    logger = logging.getLogger("ray.data")
    for handler in [handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]:
        logger.removeHandler(handler)


def _gathered(encoded: pa.Table, rows: int) -> tuple[pa.Table, dict[str, Any]]:
    """(learners' table with ids of its own, account) of all blocks together."""
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
    return pa.table({name: ids if name in ("sample_id", "group_id") else table[name] for name in table.column_names}), account


def _tokenizer_text(path: str) -> str:
    """Everything that a tokenizer's ids depend on."""
    from actors.model import load_tokenizer

    tokenizer = load_tokenizer(path)
    inner = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"
    return f"{tokenizer.eos_token_id} {inner}"
