"""The tables that cross process boundaries: their columns, what they refuse, and that they never copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from actors.experience import Comparisons, Experience, Prompts, Rollouts, Scores, TokenLogprobs, TokenValues
from cluster.session import Session

KINDS = (Prompts, Rollouts, Scores, TokenLogprobs, TokenValues, Experience)
ROLLOUT = {
    "sample_id": "int64",
    "group_id": "int64",
    "tokens": "list<item: int32>",
    "action_mask": "list<item: bool>",
    "logprobs": "list<item: float>",
    "versions": "list<item: int32>",
    "turn_starts": "list<item: int32>",
    "option": "list<item: int16>",
    "option_logprobs": "list<item: float>",
    "option_features": "list<item: float>",
    "options_offered": "list<item: bool>",
    "last_features": "list<item: float>",
    "finish": "string",
    "metadata": "string",
}
EXAMPLE: dict[str, object] = {  # one row of any column
    "int64": 7,
    "float": 0.5,
    "string": "stop",
    "list<item: int32>": [1, 2, 3],
    "list<item: int16>": [0],
    "list<item: float>": [0.0, -1.5, -0.25],
    "list<item: bool>": [False, True, True],
}

Kind = type[Any]


def columns(kind: Kind, rows: int = 2) -> dict[str, object]:
    return {field.name: [EXAMPLE[str(field.type)]] * rows for field in kind.schema}


def addresses(table: pa.Table) -> set[int]:
    """Where the table's buffers begin in memory; a list column's offsets and values each have one of their own."""
    return {
        buffer.address
        for column in table.columns
        for chunk in column.chunks
        for buffer in chunk.buffers()
        if buffer is not None
    }


def declared(kind: Kind) -> dict[str, str]:
    return {field.name: str(field.type) for field in kind.schema}


def test_the_declared_columns() -> None:
    assert declared(Prompts) == {"group_id": "int64", "tokens": "list<item: int32>", "metadata": "string"}
    assert declared(Rollouts) == ROLLOUT
    assert declared(Scores) == {
        "sample_id": "int64",
        "reward": "float",
        "turn_rewards": "list<item: float>",
        "status": "string",
        "detail": "string",
    }
    assert declared(TokenLogprobs) == {"sample_id": "int64", "logprobs": "list<item: float>"}
    assert declared(TokenValues) == {"sample_id": "int64", "values": "list<item: float>"}
    per_token = ("proximal_logprobs", "reference_logprobs", "values", "advantages", "returns")
    assert declared(Experience) == ROLLOUT | {
        "reward": "float",
        "turn_rewards": "list<item: float>",
        "turn_advantages": "list<item: float>",
        "turn_log_q": "list<item: float>",
    } | dict.fromkeys(per_token, "list<item: float>")


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_is_required_and_no_other_is_taken(kind: Kind) -> None:
    good = columns(kind)
    assert len(kind.of(good)) == 2
    for field in kind.schema:
        rest = {name: column for name, column in good.items() if name != field.name}
        if field.name in kind.may_be_empty:
            assert kind.of(rest).table[field.name].to_pylist() == [[], []]
            continue
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: column '{field.name}' is missing; it must have \['"):
            kind.of(rest)
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: column '{field.name}' is missing"):
            kind(kind.of(good).table.drop_columns([field.name]))
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: column 'extra' is not declared"):
        kind.of(good | {"extra": [1, 2]})
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: column 'extra' is not declared"):
        kind(kind.of(good).table.append_column("extra", pa.array([1, 2])))


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_refuses_another_type_and_nulls(kind: Kind) -> None:
    good = kind.of(columns(kind)).table
    for number, field in enumerate(kind.schema):
        column = f"{kind.__name__}.{field.name}"
        wrong = pa.array([b"x", b"y"], pa.binary())
        with pytest.raises(ValueError, match=rf"^{column}: must be {field.type}, got binary"):
            kind(good.set_column(number, field.name, wrong))
        with pytest.raises(ValueError, match=rf"^{column}: must be {field.type}, got binary"):
            kind.of(columns(kind) | {field.name: wrong})
        with pytest.raises(ValueError, match=rf"^{column}: must be {field.type}, got values that do not fit"):
            kind.of(columns(kind) | {field.name: [{"no": "such"}, {"thing": "!"}]})
        null = pa.array([None, EXAMPLE[str(field.type)]], field.type)
        with pytest.raises(ValueError, match=rf"^{column}: must have no nulls, got 1"):
            kind(good.set_column(number, field.name, null))
        if pa.types.is_list(field.type):
            inside = pa.chunked_array(
                [pa.array([EXAMPLE[str(field.type)]], field.type), pa.array([[None, None]], field.type)]
            )
            with pytest.raises(ValueError, match=rf"^{column}: must have no nulls, got 2"):
                kind(good.set_column(number, field.name, inside))


def test_a_null_outside_a_slice_is_none_of_its_business() -> None:
    tokens = pa.array([[None], [1], [2, 3], [None]], pa.list_(pa.int32())).slice(1, 2)
    assert len(Prompts.of({"group_id": [0, 1], "tokens": tokens, "metadata": ["{}", "{}"]})) == 2


def test_a_nan_is_a_number_not_a_null() -> None:
    failed = Scores.of(
        {"sample_id": [1], "reward": [float("nan")], "turn_rewards": [[]], "status": ["timeout"], "detail": ["1 s"]}
    )
    assert np.isnan(failed.table["reward"].to_numpy()).tolist() == [True]


@pytest.mark.parametrize("name", ["tokens", "sample_id"])
def test_narrower_and_wider_integers_are_another_type(name: str) -> None:
    """An int64 token or an int32 id would be read as another number, or cost twice the bytes, somewhere else."""
    good = Rollouts.of(columns(Rollouts)).table
    other = {"tokens": pa.list_(pa.int64()), "sample_id": pa.int32()}[name]
    with pytest.raises(ValueError, match=rf"^Rollouts\.{name}: must be .*, got "):
        Rollouts(good.set_column(good.column_names.index(name), name, good[name].cast(other)))


def test_a_number_too_large_for_its_column_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Prompts\.tokens: must be list<item: int32>, got values that do not fit"):
        Prompts.of({"group_id": [0], "tokens": [[2**31]], "metadata": ["{}"]})


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^Prompts\.tokens: must have 2 rows, as group_id has, got 1"):
        Prompts.of({"group_id": [0, 1], "tokens": [[1]], "metadata": ["{}", "{}"]})


def test_the_order_of_columns_is_fixed_and_none_is_doubled() -> None:
    table = Prompts.of(columns(Prompts)).table
    with pytest.raises(
        ValueError,
        match=r"^Prompts: columns must be \['group_id', 'tokens', 'metadata'\], each once and in this order, got "
        r"\['tokens'",
    ):
        Prompts(table.select(["tokens", "group_id", "metadata"]))
    with pytest.raises(ValueError, match="each once and in this order"):
        Prompts(table.append_column("tokens", table["tokens"]))
    assert Prompts.of(dict(reversed(columns(Prompts).items()))).table.equals(table)


def test_columns_come_as_lists_numpy_arrays_or_arrow_arrays() -> None:
    tokens = [[1, 2], [3]]
    ways = [
        {"group_id": [4, 5], "tokens": tokens, "metadata": ["a", "b"]},
        {
            "group_id": np.array([4, 5]),
            "tokens": [np.array(row) for row in tokens],
            "metadata": np.array(["a", "b"], object),
        },
        {
            "group_id": pa.array([4, 5]),
            "tokens": pa.chunked_array([[tokens[0]], [tokens[1]]], pa.list_(pa.int32())),
            "metadata": pa.array(["a", "b"]),
        },
    ]
    first, *others = (Prompts.of(way).table for way in ways)
    assert all(first.equals(other) for other in others)


def test_nullability_alone_does_not_keep_two_tables_apart() -> None:
    """Arrow marks columns as nullable unless told otherwise; such a table has no nulls and is taken, without a copy."""
    plain = pa.table({field.name: pa.array([EXAMPLE[str(field.type)]], field.type) for field in Rollouts.schema})
    taken = Rollouts(plain)
    assert taken.table.schema == Rollouts.schema
    assert addresses(taken.table) == addresses(plain)
    assert len(Rollouts.concat([Rollouts.of(columns(Rollouts)), taken])) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_slice_and_concat_copy_nothing(kind: Kind) -> None:
    a, b = kind.of(columns(kind, rows=5)), kind.of(columns(kind, rows=3))
    part = a.slice(1, 3)
    assert part.table.to_pylist() == a.table.to_pylist()[1:4]
    assert addresses(part.table) == addresses(a.table)
    both = kind.concat([part, b])
    assert type(both) is kind
    assert both.table.to_pylist() == part.table.to_pylist() + b.table.to_pylist()
    assert addresses(both.table) == addresses(a.table) | addresses(b.table)
    assert len(a.slice(2)) == 3
    assert len(a.slice(9)) == 0


@pytest.mark.slow
def test_ray_sends_only_the_rows_of_a_slice(ray_session: Session) -> None:
    rows, length = 100_000, 20
    values = pa.array(np.zeros(rows * length, np.float32))
    column = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * length), values)
    table = TokenLogprobs.of({"sample_id": np.arange(rows), "logprobs": column})
    part = table.slice(500, 10)
    whole, sent = (_size(ray.put(t.table)) for t in (table, part))
    assert whole >= values.nbytes
    assert sent < 4096  # 10 rows are 1,000 bytes; the rest is their schema
    received = ray.get(ray.put(part.table))
    assert TokenLogprobs(received).table.equals(part.table)


def _size(ref: ray.ObjectRef) -> int:
    """Bytes of an object in the store."""
    return int(ray.experimental.get_object_locations([ref])[ref]["object_size"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 100])
def test_parquet_round_trip(kind: Kind, rows: int, tmp_path: Path) -> None:
    path = tmp_path / "experience" / "step=3" / "experience.parquet"  # a partition's folder does not become a column
    table = kind.of(columns(kind, rows))
    table.write(path)
    back = kind.read(path)
    assert back.table.schema == kind.schema
    assert back.table.equals(table.table)


def test_parquet_of_sliced_and_concatenated_tables(tmp_path: Path) -> None:
    a = Scores.of(
        {
            "sample_id": [0, 1, 2],
            "reward": [0, 1, 2],
            "turn_rewards": [[], [1], [1, 1]],
            "status": ["ok"] * 3,
            "detail": [""] * 3,
        }
    )
    mixed = Scores.concat([a.slice(2), a.slice(0, 2)])
    mixed.write(tmp_path / "x.parquet")
    assert Scores.read(tmp_path / "x.parquet").table["sample_id"].to_pylist() == [2, 0, 1]


def test_a_file_of_another_schema_is_refused_by_file_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    Prompts.of(columns(Prompts)).write(path)
    with pytest.raises(ValueError, match=rf"^{path}: Rollouts: column 'sample_id' is missing"):
        Rollouts.read(path)
    good = TokenValues.of(columns(TokenValues)).table
    pq.write_table(good.append_column("note", pa.array(["a", "b"])), path)
    with pytest.raises(ValueError, match=rf"^{path}: TokenValues: column 'note' is not declared"):
        TokenValues.read(path)
    pq.write_table(pa.table({"sample_id": [0, 1], "values": pa.array([[1.0], [2.0]])}), path)
    with pytest.raises(
        ValueError, match=rf"^{path}: TokenValues\.values: must be list<item: float>, got list<.*: double>"
    ):
        TokenValues.read(path)
    pq.write_table(pa.table({"sample_id": [0, 1], "values": pa.array([[1.0], [None]], pa.list_(pa.float32()))}), path)
    with pytest.raises(ValueError, match=rf"^{path}: TokenValues\.values: must have no nulls, got 1"):
        TokenValues.read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_tables(kind: Kind) -> None:
    none = kind.concat([])
    assert len(none) == 0
    assert none.table.schema == kind.schema
    some = kind.of(columns(kind))
    assert kind.concat([none, some, none]).table.equals(some.table)
    assert len(none.slice(0, 5)) == 0
    assert len(kind.of({field.name: [] for field in kind.schema})) == 0


PAIR = {"sample_id": [7], "tokens": [[11, 12, 40, 2, 11, 50, 2]], "segment_starts": [[0, 4]], "margin": [0.5]}
MARKED = [[False, False, False, True, False, False, True]]


def test_comparisons_by_hand() -> None:
    table = Comparisons.of(PAIR | {"action_mask": MARKED}).table
    assert {field.name: str(field.type) for field in table.schema} == {
        "sample_id": "int64",
        "tokens": "list<item: int32>",
        "action_mask": "list<item: bool>",
        "segment_starts": "list<item: int32>",
        "margin": "float",
    }
    made = Comparisons.of_texts([[[11, 12, 40, 2], [11, 50, 2]], [[1, 2], [3, 2], [4, 5, 2]]], [0.5, 0]).table
    assert made.drop(["sample_id"])[:1].to_pylist() == table.drop(["sample_id"]).to_pylist()
    assert made["segment_starts"].to_pylist() == [[0, 4], [0, 2, 4]]
    assert made["sample_id"].to_pylist() == [0, 1]


def test_comparisons_are_kept_by_slices_files_and_empty_tables(tmp_path: Path) -> None:
    table = Comparisons.of_texts([[[i, i, 2], [i, 2]] for i in range(3, 9)])
    assert table.slice(2, 3).table.to_pylist() == table.table.to_pylist()[2:5]
    assert Comparisons.concat([table.slice(4), table.slice(0, 1)]).table["tokens"].to_pylist()[0] == [7, 7, 2, 7, 2]
    table.write(tmp_path / "c.parquet")
    assert Comparisons.read(tmp_path / "c.parquet").table.equals(table.table)
    assert len(Comparisons.concat([])) == len(Comparisons.of_texts([])) == len(table.slice(6)) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"segment_starts": [[0]]}, r"segment_starts: must begin at least two texts, got \[0\] in row 1"),
        ({"segment_starts": [[]]}, r"segment_starts: must begin at least two texts, got \[\] in row 1"),
        ({"segment_starts": [[1, 4]]}, r"segment_starts: must begin with 0, got \[1, 4\] in row 1"),
        (
            {"segment_starts": [[0, 1]]},
            r"segment_starts: must ascend within tokens, each text of at least two tokens, got \[0, 1\] in row 1",
        ),
        ({"segment_starts": [[0, 6]]}, r"segment_starts: must ascend within tokens"),
        ({"segment_starts": [[0, 9]]}, r"segment_starts: must ascend within tokens"),
        ({"segment_starts": [[0, 4, 2]]}, r"segment_starts: must ascend within tokens"),
        ({"action_mask": [[False, True]]}, r"action_mask: must be aligned with tokens"),
        ({"action_mask": [[False] * 7]}, r"action_mask: must mark each text's last token alone"),
        (
            {"action_mask": [[False, False, True, True, False, False, True]]},
            r"action_mask: must mark each text's last token alone",
        ),
        ({"margin": [float("nan")]}, r"margin: must be finite, got nan in row 1"),
        ({"margin": [float("inf")]}, r"margin: must be finite, got inf in row 1"),
    ],
)
def test_comparisons_that_are_none_are_refused_by_column_and_row(wrong: dict[str, Any], message: str) -> None:
    good = PAIR | {"action_mask": MARKED}
    with pytest.raises(ValueError, match=rf"^Comparisons\.{message}"):
        Comparisons.of({name: [*value, *wrong.get(name, value)] for name, value in good.items()})
