"""Texts to the tables that learners read: order, lengths, the account of what did not fit, and the cache under a hash
of everything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors import ragged
from actors.experience import Comparisons, Experience
from actors.models.tokenizer import load_tokenizer
from cluster.faults import Fault, RunError
from cluster.session import Session
from data_files import files, hh, pairs
from pipeline.encoding import encode
from pipeline.encoding.blocks import encode_block
from pipeline.encoding.cache import Cache, content_hash
from pipeline.encoding.encode import (
    EncodedTable,
    comparison_texts,
    demonstration_texts,
    encode_comparisons,
    encode_demonstrations,
    encode_pairs,
)
from pipeline.tasks.task import Comparison, Demonstration


@pytest.fixture(scope="module")
def eos(tiny_model: Path) -> int:
    return int(load_tokenizer(str(tiny_model)).eos_token_id)


def block(
    texts: pa.Table, tiny_model: Path, context: int, *, shortens: bool = True, comparisons: bool = True
) -> pa.Table:
    numbered = texts.append_column("number", pa.array(range(texts.num_rows), pa.int64()))
    return encode_block(
        numbered, comparisons=comparisons, tokenizer_path=str(tiny_model), context=context, shortens=shortens
    )


def spoken(table: pa.Table, tiny_model: Path) -> list[list[str]]:
    """The texts of each comparison."""
    tokenizer = load_tokenizer(str(tiny_model))
    return [
        [tokenizer.decode(tokens[start:end]) for start, end in pairwise([*starts, len(tokens)])]
        for tokens, starts in zip(table["tokens"].to_pylist(), table["segment_starts"].to_pylist(), strict=True)
    ]


def drop_first(prompt: str) -> list[str]:
    """`a b c` to `b c` and `c`."""
    parts = prompt.split(" ")
    return [" ".join(parts[start:]) for start in range(1, len(parts))]


# A block, in this process.


def test_a_text_is_tokenised_with_its_reply_and_ends_with_end_of_text(tiny_model: Path, eos: int) -> None:
    rows = [Comparison(prompt="ab", replies=("cd", "é", "f"), margin=1.5)]
    table = block(comparison_texts(rows, lambda prompt: ()), tiny_model, 64)
    tokenizer = load_tokenizer(str(tiny_model))
    expected = [[*tokenizer.encode(f"ab{reply}"), eos] for reply in ("cd", "é", "f")]
    assert table["tokens"].to_pylist() == [[token for text in expected for token in text]]
    assert table["segment_starts"].to_pylist() == [[0, 5, 10]]
    assert table["margin"].to_pylist() == [1.5]


@pytest.mark.parametrize(
    ("context", "expected", "truncated", "cut"),
    [
        (12, ["aa bb cc|xxx", "aa bb cc|y"], False, False),
        (11, ["bb cc|xxx", "bb cc|y"], True, False),  # the same prompt for both
        (9, ["bb cc|xxx", "bb cc|y"], True, False),
        (8, ["cc|xxx", "cc|y"], True, False),
        (6, ["cc|xxx", "cc|y"], True, False),
        (5, ["c|xxx", "c|y"], True, False),  # the oldest tokens, when the last turn alone is too long
        (4, ["|xxx", "|y"], True, False),
        (3, ["|xx", "|y"], True, True),  # at last the reply loses its end
    ],
)
def test_what_is_too_long_loses_its_beginning_first(
    context: int, expected: list[str], truncated: bool, cut: bool, tiny_model: Path
) -> None:
    texts = comparison_texts([Comparison(prompt="aa bb cc|", replies=("xxx", "y"))], drop_first)
    table = block(texts, tiny_model, context + 1)
    assert spoken(table, tiny_model) == [[f"{text}<|endoftext|>" for text in expected]]
    assert (table["truncated"].to_pylist(), table["cut"].to_pylist()) == ([truncated], [cut])
    whole = block(texts, tiny_model, context + 1, shortens=False)
    assert whole.num_rows == (not truncated)


def test_replies_that_become_the_same_compare_nothing(tiny_model: Path) -> None:
    rows = [Comparison(prompt="p", replies=("aaaaab", "aaaaac")), Comparison(prompt="p", replies=("ab", "ac"))]
    assert block(comparison_texts(rows, lambda prompt: ()), tiny_model, 6)["number"].to_pylist() == [1]


def test_demonstrations_lose_the_beginning_of_their_prompt_but_no_reply_its_end(tiny_model: Path, eos: int) -> None:
    rows = [
        Demonstration(prompt=prompt, response=response)
        for prompt, response in (("aa", "x"), ("aa bb", "xx"), ("aabb", "xxxx"), ("a", "xxxxx"), ("a", "x" * 9))
    ]
    table = block(demonstration_texts(rows, drop_first), tiny_model, 6, comparisons=False)
    tokenizer = load_tokenizer(str(tiny_model))
    Experience(table.drop_columns(["number", "truncated", "cut"]))
    found = [tokenizer.decode(tokens) for tokens in table["tokens"].to_pylist()]
    assert found == ["aax<|endoftext|>", "bbxx<|endoftext|>", "bxxxx<|endoftext|>"]
    assert [sum(mask) for mask in table["action_mask"].to_pylist()] == [2, 3, 5]
    assert (table["number"].to_pylist(), table["truncated"].to_pylist()) == ([0, 1, 2], [False, True, True])
    assert block(demonstration_texts(rows, drop_first), tiny_model, 6, comparisons=False, shortens=False)[
        "number"
    ].to_pylist() == [0]
    assert block(demonstration_texts(rows[-1:], drop_first), tiny_model, 6, comparisons=False).num_rows == 0


# The cache.


def test_a_cached_table_is_believed_only_if_it_is_what_was_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "cache")
    assert cache.find("a") is None
    path, account = cache.keep("a", pa.table({"n": [1, 2]}), {"rows": 2})
    assert cache.find("a") == (path, account) == (tmp_path / "cache" / "a.parquet", {"rows": 2})
    assert caplog.text == ""
    content = path.read_bytes()
    for damage, said in ((content[:-1], "bytes, must have"), (b"X" + content[1:], "other bytes than were written")):
        path.write_bytes(damage)
        caplog.clear()
        assert cache.find("a") is None
        assert said in caplog.text and "it is made again" in caplog.text
    path.unlink()
    assert cache.find("a") is None
    (tmp_path / "cache" / "a.json").write_text("{")
    assert cache.find("a") is None


def test_the_hash_is_of_rows_and_settings_whatever_their_layout() -> None:
    table = pa.table({"t": ["a", "b", "c"], "l": [[1], [], [2, 3]]})
    parts = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert content_hash(table, "x", 3) == content_hash(parts, "x", 3)
    others = [
        content_hash(table, "x", 4),
        content_hash(table, "y", 3),
        content_hash(table.slice(1), "x", 3),
        content_hash(table.rename_columns(["u", "l"]), "x", 3),
    ]
    assert len({content_hash(table, "x", 3), *others}) == 5


# On Ray Data.


@pytest.fixture
def no_ray_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("Ray Data was asked to tokenise")

    monkeypatch.setattr(encode, "_on_ray_data", refuse)


@pytest.fixture(scope="module", autouse=True)
def on_ray_data_however_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "HERE_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def encoded(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, ray_session: Session
) -> tuple[Any, Path, dict[str, EncodedTable], str]:
    """A task, its cache, both tables of its training split, made in several blocks, and what was printed meanwhile (on
    file descriptors, too).
    """
    folder = tmp_path_factory.mktemp("encoded")
    rows = [
        *pairs(100),
        {"chosen": hh("Long" * 30, last="Yes."), "rejected": hh("Long" * 30, last="No.")},
        {"chosen": hh("Q?", last="z" * 90), "rejected": hh("Q?", last="No.")},
    ]
    task = files(folder, rows, heldout=0.01)
    said = logging.getLogger("ray.data")
    with pytest.MonkeyPatch.context() as patch:
        demonstrations = encode_demonstrations(task, "train", str(tiny_model), 64, folder / "cache")
        patch.setattr(encode, "BLOCK_BYTES", 9000)  # so that there are several
        found = {
            "demonstrations": demonstrations,
            "comparisons": encode_comparisons(task, "train", str(tiny_model), 64, folder / "cache"),
        }
    terminal = [handler for handler in said.handlers if isinstance(handler, logging.StreamHandler)]
    return task, folder / "cache", found, str(terminal)


@pytest.mark.slow
def test_rows_keep_their_order_over_many_blocks(
    encoded: tuple[Any, Path, dict[str, EncodedTable], str], tiny_model: Path
) -> None:
    task, _, found, terminal = encoded
    table = pq.read_table(found["comparisons"].path, partitioning=None)
    expected = task.comparisons("train")
    texts = spoken(table, tiny_model)
    assert len(texts) == len(expected) > 90
    for comparison, row in zip(expected, texts, strict=True):
        for reply, text in zip(comparison.replies, row, strict=True):
            assert text.removesuffix("<|endoftext|>") in comparison.prompt + reply
    assert table["sample_id"].to_pylist() == list(range(len(expected)))
    assert [(field.name, field.type) for field in table.schema] == [
        (field.name, field.type) for field in Comparisons.schema
    ]
    assert terminal == "[]"


@pytest.mark.slow
def test_the_account_is_of_the_table(encoded: tuple[Any, Path, dict[str, EncodedTable], str]) -> None:
    task, _, found, _ = encoded
    demonstrations = Experience.read(found["demonstrations"].path).table
    account, lengths = found["demonstrations"], ragged.lengths(demonstrations["tokens"])
    rows = task.demonstrations("train")
    [too_long] = [number for number, row in enumerate(rows) if "z" * 90 in row.response]
    assert (account.rows, account.tokens, account.excluded, account.cut_replies) == (
        len(rows) - 1,
        lengths.sum(),
        (too_long,),
        0,
    )
    assert (
        account.truncated == 1
        and account.quantiles[0] == lengths.min()
        and account.quantiles[-1] == lengths.max() == 64
    )
    compared = found["comparisons"]
    assert (compared.rows, compared.truncated, compared.cut_replies, compared.excluded) == (len(rows), 2, 1, ())


@pytest.mark.slow
def test_what_is_in_the_cache_is_not_tokenised_again(
    encoded: tuple[Any, Path, dict[str, EncodedTable], str], tiny_model: Path, no_ray_data: None
) -> None:
    """And whatever a table depends on is part of its name, so anything else is."""
    task, cache, found, _ = encoded
    assert encode_demonstrations(task, "train", str(tiny_model), 64, cache) == found["demonstrations"]
    assert encode_comparisons(task, "train", str(tiny_model), 64, cache) == found["comparisons"]
    pairs_again = task.comparisons("train")
    assert encode_pairs(pairs_again, str(tiny_model), 64, cache, shorter=task.shorter) == found["comparisons"]
    for split, context, shortens in (("heldout", 64, True), ("train", 63, True), ("train", 64, False)):
        with pytest.raises((AssertionError, ValueError), match=r"Ray Data was asked|both sides"):
            encode_pairs(
                task.comparisons(split), str(tiny_model), context, cache, shorter=task.shorter, shortens=shortens
            )
    with pytest.raises(AssertionError, match="Ray Data was asked"):
        encode_pairs(pairs_again[::-1], str(tiny_model), 64, cache, shorter=task.shorter)


@pytest.mark.slow
def test_what_is_small_is_tokenised_here_and_comes_out_the_same(
    encoded: tuple[Any, Path, dict[str, EncodedTable], str],
    tiny_model: Path,
    no_ray_data: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    task, _, found, _ = encoded
    monkeypatch.setattr(encode, "HERE_BYTES", 1_000_000)
    here = encode_comparisons(task, "train", str(tiny_model), 64, tmp_path)
    assert replace(here, path=found["comparisons"].path) == found["comparisons"]
    assert pq.read_table(here.path).equals(pq.read_table(found["comparisons"].path))


@pytest.mark.slow
def test_a_context_in_which_nothing_fits_is_told(
    encoded: tuple[Any, Path, dict[str, EncodedTable], str], tiny_model: Path
) -> None:
    task, cache, *_ = encoded
    with pytest.raises(
        ValueError,
        match=r"^model\.context: must hold at least one of the demonstrations, got 3 tokens, and none of \d+ fits; "
        r"raise it$",
    ):
        encode_demonstrations(task, "train", str(tiny_model), 3, cache)


@pytest.mark.slow
def test_what_fails_on_the_way_names_its_phase(tiny_model: Path, ray_session: Session) -> None:
    texts = comparison_texts([Comparison(prompt="a", replies=("b", "c"))], lambda prompt: ())
    broken = partial(encode_block, comparisons=True, tokenizer_path="/nowhere", context=9, shortens=True)
    with pytest.raises(RunError, match=r"^data failed during 'tokenising': (.|\n)*/nowhere") as caught:
        encode._on_ray_data(texts, broken)
    assert caught.value.fault is Fault.USER_ERROR


class Clerk:
    """An actor that prepares data, as a stage does it."""

    def encode(self, comparisons: list[Comparison], path: str, cache: Path) -> EncodedTable:
        return encode_pairs(comparisons, path, 64, cache)


@pytest.mark.slow
def test_an_actor_may_encode(
    encoded: tuple[Any, Path, dict[str, EncodedTable], str], tiny_model: Path, tmp_path: Path
) -> None:
    import ray

    task, *_ = encoded
    rows = task.comparisons("train")[:5]
    found = ray.get(
        ray.remote(num_cpus=0)(Clerk).remote().encode.remote(rows, str(tiny_model), tmp_path / "cache"), timeout=240
    )
    assert found == encode_pairs(rows, str(tiny_model), 64, tmp_path / "cache")
    assert (found.rows, found.path.parent) == (5, tmp_path / "cache")
