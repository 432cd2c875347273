"""Rows in every kind of file, messages in every dialect, and what a row says beside its prompt."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_files import pair, pairs, write
from pipeline.config.recipe import load as load_recipe
from pipeline.data import reader
from pipeline.data.config import ColumnsConfig, DataConfig
from pipeline.data.files import Files
from pipeline.data.load import load
from pipeline.data.problems import MEDIA, TOOLS
from pipeline.data.turns import Turn
from pipeline.encoding.data_report import report, summary
from pipeline.encoding.prompt_stream import PromptStream
from pipeline.tasks.task import SPLITS, PromptText

BOM = b"\xef\xbb\xbf"
SUMS = [{"prompt": f"What is {number} + 1?", "answer": number + 1, "id": f"sum-{number}"} for number in range(30)]


def as_csv(rows: list[dict[str, Any]], **options: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def prompts(path: Path, **settings: Any) -> list[PromptText]:
    task = Files(DataConfig(prompts=str(path), **({"heldout": 0.3} | settings)))
    return sorted(
        (prompt for split in SPLITS for prompt in task.prompts(split)), key=lambda prompt: prompt.metadata["line"]
    )


# ---- kinds of files ----

WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "lines.json": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: b"\n " + json.dumps(rows, indent=2).encode(),
    "a.csv": as_csv,
    "unix.csv": lambda rows: as_csv(rows, lineterminator="\n", quoting=csv.QUOTE_ALL),
}


@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "with a byte order mark"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "gzip"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_rows(name: str, packed: bool, bom: bytes, tmp_path: Path) -> None:
    content = bom + WRITERS[name](pairs(4))
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    found = load("comparisons", str(path), DataConfig())
    expected = load("comparisons", write(tmp_path / "expected.jsonl", pairs(4)), DataConfig())
    assert [(row.prompt, row.replies) for row in found.exchanges] == [
        (row.prompt, row.replies) for row in expected.exchanges
    ]
    assert found.problems == ()


def test_a_row_of_csv_is_known_by_the_line_where_it_begins(tmp_path: Path) -> None:
    content = (
        b'prompt,chosen,rejected,margin\r\n"Hi,\r\n\r\n""you""?",Yes,No,0.5\r\n\r\nHi?,Yes\r\n'
        b'Ho?,caf\xe9,No,\r\nHe?,"a"b,No,1\r\nHa?,Yes,,\r\nHu?,Yes,No,\r\n'
    )
    (tmp_path / "a.csv").write_bytes(content)
    loaded = load("comparisons", str(tmp_path / "a.csv"), DataConfig(max_excluded=1))
    assert [(row.line, row.prompt[0].text, row.margin) for row in loaded.exchanges] == [
        (2, 'Hi,\r\n\r\n"you"?', 0.5),
        (10, "Hu?", 0.0),
    ]
    assert [(problem.line, problem.kind) for problem in loaded.problems] == [
        (6, "broken CSV"),
        (7, "not UTF-8"),
        (8, "broken CSV"),
        (9, "null"),
    ]
    assert loaded.problems[0].detail == "2 cells, the first line has 4"


def test_lists_in_csv_are_json(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi?", "ranking": json.dumps(["Yes", "Perhaps", "No"])},
        {"prompt": "Ho?", "ranking": "['a', 'b']"},
    ]
    (tmp_path / "a.csv").write_bytes(as_csv(rows))
    loaded = load("comparisons", str(tmp_path / "a.csv"), DataConfig(max_excluded=1))
    assert [row.replies for row in loaded.exchanges] == [("Yes", "Perhaps", "No")]
    assert loaded.problems[0].detail == "column 'ranking' must be a list of replies, is a str"
    (tmp_path / "b.csv").write_bytes(as_csv([{"messages": json.dumps([said("Hi?", "user"), said("Ho.")])}]))
    assert load("demonstrations", str(tmp_path / "b.csv"), DataConfig()).exchanges[0].replies == ("Ho.",)


def test_an_array_on_one_line_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE", 300)
    (tmp_path / "a.json").write_text(json.dumps(pairs(20)))
    assert len(load("comparisons", str(tmp_path / "a.json"), DataConfig()).exchanges) == 20


def test_entries_of_a_json_array_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([pair(0), 3, pair(1)], indent=1))
    loaded = load("comparisons", str(tmp_path / "a.json"), DataConfig(max_excluded=0.5))
    assert [row.line for row in loaded.exchanges] == [1, 3]
    assert [(problem.line, problem.kind) for problem in loaded.problems] == [(2, "not an object")]
    assert len(load("comparisons", str(tmp_path / "a.json"), DataConfig(max_rows=1)).exchanges) == 1


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(BOM + b'task = "walks"\nsteps = 3\n')
    assert load_recipe(tmp_path / "a.toml", checked=False).steps == 3


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"3",
        b'{"version": "1.0"}',
        b"\x00\xff",
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": 3, "merges": []}}',
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(content: bytes, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from actors.models.tokenizer import load_tokenizer
    from actors.reward.worker import _classifier_tokenizer

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(content)
    for load_it, field in ((load_tokenizer, "model.path"), (_classifier_tokenizer, "reward.model")):
        with pytest.raises(
            ValueError, match=rf"^{field}: must (have|be a folder or hub name with) a tokenizer"
        ) as caught:
            load_it(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff\xfe", b'{"model_type": 3}', b"\xef\xbb\xbf{}"])
def test_a_damaged_configuration_is_refused_in_one_line(content: bytes, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from actors.models.causal_lm import context_of
    from actors.reward.worker import check_classifier

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    for ask, rule in (
        (context_of, r"^model\.path: must be a folder"),
        (check_classifier, r"^reward\.model: must be a folder"),
    ):
        with pytest.raises(ValueError, match=rule) as caught:
            ask(str(folder))
        assert "\n" not in str(caught.value)


# ---- dialects of messages ----


def said(content: Any, role: Any = "assistant") -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


DIALECTS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [said("Be kind.", "system"), said("Hi?", "user"), said("Ho.")]},
    "a developer": {"messages": [said("Be kind.", "developer"), said("Hi?", "user"), said("Ho.")]},
    "parts": {
        "messages": [said(parts("Be kind."), "system"), said(parts("H", "i?"), "user"), said([*parts("Ho"), "."])]
    },
    "names in capitals": {"messages": [said("Be kind.", "System"), said("Hi?", "Human"), said("Ho.", "Assistant")]},
    "ShareGPT": {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hi?"},
            {"from": "gpt", "value": "Ho."},
        ]
    },
    "ShareGPT in our column": {
        "messages": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hi?"},
            {"from": "gpt", "value": "Ho."},
        ]
    },
    "nulls beside": {
        "messages": [
            said("Be kind.", "system"),
            said("Hi?", "user"),
            {**said("Ho."), "tool_calls": None, "from": None, "value": None},
        ]
    },
}


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name in DIALECTS for file in ("a.jsonl", "a.parquet") if (name, file) != ("parts", "a.parquet")],
)
def test_every_dialect_says_the_same(name: str, file: str, tmp_path: Path) -> None:
    """Parts of which some are plain text have no place in a column of Parquet, which has one type."""
    path = tmp_path / file
    if file == "a.parquet":
        pq.write_table(pa.Table.from_pylist([DIALECTS[name]]), path)
    else:
        write(path, [DIALECTS[name]])
    [row] = load("demonstrations", str(path), DataConfig()).exchanges
    assert (row.prompt, row.replies) == ((Turn("system", "Be kind."), Turn("user", "Hi?")), ("Ho.",))
    assert load("prompts", str(path), DataConfig()).exchanges[0].prompt == row.prompt


def test_rows_that_no_text_can_hold_are_counted_and_stop_nothing(tmp_path: Path) -> None:
    """However many they are: there is nothing to mend in them."""
    good = [{"prompt": [said(f"Question {number}?", "user")], "response": "Yes."} for number in range(30)]
    call = {
        "prompt": [said("Hi?", "user")],
        "response": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
    }
    image = {"prompt": [said([{"type": "image_url", "image_url": {"url": "x"}}], "user")], "response": "Yes."}
    task = Files(
        DataConfig(
            demonstrations=write(tmp_path / "a.jsonl", [*good, *[call] * 25, *[image] * 5]), heldout=0.3, max_excluded=0
        )
    )
    assert len(task.all_rows("demonstrations")) == 30
    record = report(task)
    assert {kind: entry["count"] for kind, entry in record["sources"][0]["excluded"].items()} == {TOOLS: 25, MEDIA: 5}
    assert summary(record).startswith(
        "data: 60 rows read, 0 faulty, 25 with tool use, 5 with other media and 0 repeated left out; "
    )


# ---- what a row says beside its prompt ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_the_right_answer_reaches_the_reward(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(SUMS), path)
    else:
        path.write_bytes(WRITERS[name](SUMS))
    found = prompts(path)
    assert [prompt.text for prompt in found] == [row["prompt"] for row in SUMS]
    expected = [(str(row["answer"]) if name == "a.csv" else row["answer"], row["id"]) for row in SUMS]
    assert [(prompt.metadata["answer"], prompt.metadata["id"]) for prompt in found] == expected
    assert [prompt.metadata["line"] for prompt in found] == list(range(2, 32) if name == "a.csv" else range(1, 31))
    assert "prompt" not in found[0].metadata


@pytest.mark.parametrize(
    ("row", "kind", "columns", "expected"),
    [
        ({"prompt": "Q?", "response": "A.", "answer": 3}, "demonstrations", {}, {"response": "A.", "answer": 3}),
        ({"q": "Q?", "answer": "A."}, "demonstrations", {"prompt": "q", "response": "answer"}, {"answer": "A."}),
        ({"messages": [said("Q?", "user"), said("A.")], "answer": 3}, "demonstrations", {}, {"answer": 3}),
        ({"text": "a b c d e f g h i j", "answer": 3}, "demonstrations", {}, {"answer": 3}),
        ({**pair(0), "answer": 3}, "comparisons", {}, {"answer": 3}),
        ({"prompt": "Q?", "chosen": "A.", "rejected": "B."}, "comparisons", {}, {"chosen": "A.", "rejected": "B."}),
        (
            {"prompt": "Q?", "metadata": {"answer": 3, "x": [1]}, "answer": 4, "id": 5},
            "prompts",
            {},
            {"answer": 3, "x": [1], "id": 5},
        ),
        ({"prompt": "Q?", "metadata": "text"}, "prompts", {}, {"metadata": "text"}),
        ({"prompt": "Q?", "extra": {"answer": 3}}, "prompts", {"metadata": "extra"}, {"answer": 3}),
        ({"prompt": "Q?", "source": "a book", "line": 7}, "prompts", {}, {"source": "a book", "line": 7}),
    ],
)
def test_all_columns_but_those_of_the_prompt_are_handed_on(
    row: dict[str, Any], kind: Any, columns: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    data: dict[str, Any] = {kind: path}
    task = Files(DataConfig(**data, columns=ColumnsConfig(**columns)))
    [split] = {laid.split for laid in task.all_rows("prompts")}
    [prompt] = task.prompts(split)
    assert prompt.metadata == {"source": path, "line": 1} | expected


def test_what_is_no_json_is_handed_on_in_one_way(tmp_path: Path) -> None:
    day = date(2026, 2, 3)
    values: dict[str, Any] = {
        "when": datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC),
        "day": day,
        "hour": time(4, 5),
        "took": timedelta(seconds=1.5),
        "price": Decimal("0.10"),
        "raw": b"\xff\x00",
        "nan": float("nan"),
        "nested": {"day": day, "list": [1.5, None]},
        "none": None,
        "yes": True,
    }
    table = pa.Table.from_pylist([{"prompt": "Q?", **values}])
    table = table.append_column("far", pa.array([400_000_000_000], pa.int64()).view(pa.timestamp("s")))
    pq.write_table(table, tmp_path / "a.parquet")
    [row] = load("prompts", str(tmp_path / "a.parquet"), DataConfig()).exchanges
    found = json.loads(row.metadata)
    assert {name: value for name, value in found.items() if name != "when"} == {
        "day": "2026-02-03",
        "hour": "04:05:00",
        "took": 1.5,
        "price": "0.10",
        "raw": "/wA=",
        "nan": None,
        "nested": {"day": "2026-02-03", "list": [1.5, None]},
        "none": None,
        "yes": True,
    }
    assert found["when"].startswith("2026-02-03T04:05:06")
    assert row.remarks == ("column left out",), "the year 14,645 is none that Python knows"


def test_a_very_long_column_is_left_out_and_its_row_is_not(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number}?", "essay": "a" * (5 + 20 * (number == 3))} for number in range(9)]
    found = load("prompts", write(tmp_path / "a.jsonl", rows), DataConfig(max_characters=20))
    assert [json.loads(row.metadata) for row in found.exchanges] == [
        {} if number == 3 else {"essay": "aaaaa"} for number in range(9)
    ]
    assert [row.line for row in found.exchanges if row.remarks] == [4]


def test_metadata_goes_with_its_prompt_and_a_repeated_prompt_says_what_is_lost(tmp_path: Path) -> None:
    from actors.models.text import TextCodec
    from tiny_models import byte_tokenizer

    rows = [*SUMS, {**SUMS[4], "answer": 99}, SUMS[5]]
    path = write(tmp_path / "a.jsonl", rows)
    found = prompts(Path(path))
    stream = PromptStream(
        found, TextCodec(byte_tokenizer()), seed=0, max_prompt_tokens=64, context=96, max_new_tokens=8
    )
    table = stream.draw(range(30)).table
    assert sorted(json.loads(text)["answer"] for text in table["metadata"].to_pylist()) == list(range(1, 31))
    repeated = load("prompts", path, DataConfig()).problems
    assert [problem.detail for problem in repeated] == [
        f"of line 5 of {path}, whose other columns differ from this row's and are used",
        f"of line 6 of {path}",
    ]
