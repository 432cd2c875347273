"""Whatever is wrong with a file of preferences: a row is left out, counted under its kind and named by its line; a file
as a whole is refused in words.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_files import files, hh, pair, pairs, write
from pipeline.data import reader
from pipeline.data.config import ColumnsConfig, DataConfig
from pipeline.data.files import Files
from pipeline.data.load import load
from pipeline.data.problems import DUPLICATE, PROBLEMS
from pipeline.encoding.data_report import excluded, report

YES, NO = hh("Hi?", last="Yes."), hh("Hi?", last="No.")
USER = {"role": "user", "content": "Hi?"}


def said(text: Any, role: Any = "assistant") -> dict[str, Any]:
    return {"role": role, "content": text}


def chat(chosen: Any, rejected: Any = "No.") -> dict[str, Any]:
    return {"prompt": [USER], "chosen": [said(chosen)], "rejected": [said(rejected)]}


def ranked(*replies: Any) -> dict[str, Any]:
    return {"prompt": "Hi?", "ranking": list(replies)}


TOOL_CALL: dict[str, Any] = {
    "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
    "rejected": [said("No.")],
}
TOOL_CALL_ROW = {"prompt": [USER], **TOOL_CALL}

# A row among good ones, in the form of those: (the row, the kind it is counted under, what is said of it).
TRANSCRIPTS: dict[str, tuple[Any, str, str]] = {
    "broken JSON": ('{"chosen": ', "broken JSON", "Expecting value at character 11 of the line"),
    "half a line": ('{"chosen": "\\n\\nHuman: H', "broken JSON", "Unterminated string"),
    "nested beyond measure": ("[" * 100_000, "broken JSON", "nested too deeply"),
    "a list": ("[1, 2]", "not an object", "a list"),
    "a number": ("3", "not an object", "a int"),
    "null itself": ("null", "not an object", "a NoneType"),
    "latin-1": (b'{"chosen": "\n\nHuman: caf\xe9"}'.replace(b"\n", b""), "not UTF-8", "byte 23 of the line is 0xe9"),
    "a column is missing": ({"chosen": YES}, "missing column", "no 'rejected' among ['chosen']"),
    "a column is null": ({"chosen": YES, "rejected": None}, "null", "column 'rejected'"),
    "a column is a number": ({"chosen": YES, "rejected": 3}, "not text", "'reply' is a int"),
    "a column is a list": ({"chosen": YES, "rejected": [NO]}, "not text", "'reply' is a list"),
    "no marker at all": ({"chosen": "Yes.", "rejected": NO}, "no turns", ""),
    "no assistant turn": ({"chosen": "\n\nHuman: Hi?", "rejected": NO}, "no assistant turn", ""),
    "begins with a reply": (
        {"chosen": "\n\nAssistant: Hm." + YES, "rejected": "\n\nAssistant: Hm." + NO},
        "first turn not human",
        "",
    ),
    "begins with nobody's text": (
        {"chosen": "Title" + YES, "rejected": NO},
        "first turn not human",
        "text stands before the first Human:",
    ),
    "ends with a question": ({"chosen": YES + "\n\nHuman: So?", "rejected": NO}, "last turn human", ""),
    "differs too early": (
        {"chosen": hh("A?", last="Yes."), "rejected": NO},
        "no common prompt",
        "the first 0 turns are the same, of 2 and 2",
    ),
    "goes on after it differs": (
        {"chosen": hh("Hi?", "Ho.", "So?", last="Yes."), "rejected": NO},
        "no common prompt",
        "the first 1 turns are the same, of 4 and 2",
    ),
    "an identical pair": ({"chosen": YES, "rejected": YES}, "identical pair", ""),
    "identical but for spaces": ({"chosen": YES, "rejected": YES + " \n"}, "identical pair", ""),
    "an empty reply": ({"chosen": hh("Hi?", last=""), "rejected": NO}, "empty reply", "number 1 of 2, the best first"),
    "a blank reply": (
        {"chosen": YES, "rejected": hh("Hi?", last=" \n\t ")},
        "empty reply",
        "number 2 of 2, the best first",
    ),
    "an empty question": ({"chosen": hh(" ", last="Yes."), "rejected": hh(" ", last="No.")}, "empty prompt", ""),
    "a reply of a megabyte": (
        {"chosen": hh("Hi?", last="yes " * 250_000), "rejected": NO},
        "too many characters",
        "'reply' has 1000025, at most 100000 may be",
    ),
    "a NUL character": ({"chosen": YES, "rejected": NO + "\x00"}, "NUL character", "in 'reply'"),
    "half a surrogate pair": (
        json.dumps({"chosen": YES, "rejected": NO + "\ud83d"}),
        "broken unicode",
        "character 29 of 'reply'",
    ),
    "a margin that is not finite": (
        json.dumps({"chosen": YES, "rejected": NO, "margin": float("nan")}),
        "bad margin",
        "it is nan",
    ),
    "a margin in words": ({"chosen": YES, "rejected": NO, "margin": "much"}, "bad margin", "it is 'much'"),
    "a margin below 0": ({"chosen": YES, "rejected": NO, "margin": -1}, "bad margin", "it is -1"),
    "a margin of 10^400": (
        json.dumps({"chosen": YES, "rejected": NO, "margin": 10**400}),
        "bad margin",
        "it is an integer of 1329 bits, must be from 0",
    ),
    "a margin no float32 holds": (
        {"chosen": YES, "rejected": NO, "margin": 1e39},
        "bad margin",
        "it is 1e+39, must be from 0 to 1,000,000",
    ),
    "a number of 5,000 digits": (
        f'{{"chosen": {json.dumps(YES)}, "rejected": {json.dumps(NO)}, "id": {"9" * 5000}}}',
        "broken JSON",
        "Exceeds the limit",
    ),
    "a margin that is true": ({"chosen": YES, "rejected": NO, "margin": True}, "bad margin", "it is True"),
    "a repetition": (pair(0), DUPLICATE, "of line 1 of "),
}
MESSAGES: dict[str, tuple[Any, str, str]] = {
    "an unknown role": (
        {**chat("Yes."), "prompt": [said("Hi?", "narrator")]},
        "unknown role",
        "message 0 has the role 'narrator', must be one of system, user, assistant",
    ),
    "a role that is a number": (
        {**chat("Yes."), "prompt": [said("Hi?", 1)]},
        "unknown role",
        "message 0 has the role 1",
    ),
    "a message without content": (
        {**chat("Yes."), "prompt": [{"role": "user"}]},
        "broken message",
        "message 0 must be an object with role and content",
    ),
    "a message that is text": ({**chat("Yes."), "prompt": ["Hi?"]}, "broken message", "message 0"),
    "content that is null": (chat(None), "null", "the content of message 0"),
    "content that is a number": (chat(3), "not text", "the content of message 0 is a int"),
    "a tool's call": (TOOL_CALL_ROW, "tool use", "message 0"),
    "a call as ever": (
        {**chat("Yes."), "chosen": [{**said(None), "function_call": {"name": "f"}}]},
        "tool use",
        "message 0",
    ),
    "a call beside words": (
        {**chat("Yes."), "chosen": [{**said("Wait."), "tool_calls": [{"id": "1"}]}]},
        "tool use",
        "message 0",
    ),
    "a tool's answer": ({**chat("Yes."), "prompt": [USER, said("4", "tool"), USER]}, "tool use", "message 1"),
    "an observation of ShareGPT": (
        {**chat("Yes."), "prompt": [{"from": "observation", "value": "4"}]},
        "tool use",
        "message 0",
    ),
    "an image": (
        {**chat("Yes."), "prompt": [said([{"type": "image_url", "image_url": {}}], "user")]},
        "other media",
        "a part of message 0 is of the type",
    ),
    "a part without text": (chat([{"type": "text"}]), "not text", "a part of message 0 has no text"),
    "a part that is a number": (chat([3]), "not text", "a part of message 0 is a int"),
    "a part that is long": (
        chat([{"type": "text", "text": "a" * 100_001}]),
        "too many characters",
        "'reply' has 100001",
    ),
    "a developer's message in the middle": (
        {**chat("Yes."), "prompt": [USER, said("Be good.", "developer"), USER]},
        "turns out of order",
        "",
    ),
    "a system message in the middle": (
        {**chat("Yes."), "prompt": [USER, said("Be good.", "system"), USER]},
        "turns out of order",
        "a system message must be the first",
    ),
    "a prompt that begins with a reply": ({**chat("Yes."), "prompt": [said("Hm."), USER]}, "first turn not human", ""),
    "a prompt that ends with a reply": ({**chat("Yes."), "prompt": [USER, said("Hm.")]}, "last turn assistant", ""),
    "an empty prompt": ({**chat("Yes."), "prompt": []}, "first turn not human", ""),
    "no message at all": ({"chosen": [], "rejected": []}, "no assistant turn", ""),
    "the same replies": (chat("Yes.", "Yes."), "identical pair", ""),
    "another conversation than the prompt's": (
        {"prompt": [USER], "chosen": [said("A?", "user"), said("Yes.")], "rejected": [said("No.")]},
        "no common prompt",
        "the reply's conversation does not begin with the prompt",
    ),
    "a person where the reply should be": (
        {"prompt": [USER], "chosen": [USER, said("Hm."), said("So?", "user")], "rejected": [said("No.")]},
        "last turn human",
        "",
    ),
}
RANKINGS: dict[str, tuple[Any, str, str]] = {
    "a ranking of one": (ranked("Yes."), "ranking of one", "it has 1"),
    "a ranking of none": (ranked(), "ranking of one", "it has 0"),
    "a ranking that is text": (
        {"prompt": "Hi?", "ranking": "Yes."},
        "not text",
        "column 'ranking' must be a list of replies, is a str",
    ),
    "equal replies": (ranked("Yes.", "No.", "Yes."), "equal replies", ""),
    "an empty one among them": (ranked("Yes.", " "), "empty reply", "number 2 of 2, the best first"),
    "a null among them": (ranked("Yes.", None), "null", "a reply"),
    "a number among them": (ranked("Yes.", 1), "not text", "'reply' is a int"),
    "no prompt": ({"ranking": ["Yes.", "No."]}, "missing column", "no 'prompt' among ['ranking']"),
    "a null prompt": ({"prompt": None, "ranking": ["Yes.", "No."]}, "null", "column 'prompt'"),
}
GOOD: dict[str, list[Any]] = {
    "transcript": pairs(40),
    "messages": [{**chat("Yes."), "prompt": [said(f"Question {number}?", "user")]} for number in range(40)],
    "columns": [{**ranked("Yes.", "No.", "Perhaps."), "prompt": f"Question {number}?"} for number in range(40)],
}
ROWS = [
    (form, name, *row)
    for form, rows in (("transcript", TRANSCRIPTS), ("messages", MESSAGES), ("columns", RANKINGS))
    for name, row in rows.items()
]


@pytest.mark.parametrize(
    ("form", "row", "kind", "detail"),
    [(form, *row) for form, _, *row in ROWS],
    ids=[f"{form}: {name}" for form, name, *_ in ROWS],
)
def test_a_bad_row_is_left_out_counted_and_named(form: str, row: Any, kind: str, detail: str, tmp_path: Path) -> None:
    """Row 21 of 41 is bad; the others are kept, in order, and its account stands in the report and in the list of what
    was left out.
    """
    good = GOOD[form]
    task = files(tmp_path, [*good[:20], row, *good[20:]])
    loaded = load("comparisons", task.data.comparisons, task.data)
    assert loaded.form == form
    assert [exchange.line for exchange in loaded.exchanges] == [line for line in range(1, 42) if line != 21]
    [problem] = loaded.problems
    assert (problem.source, problem.line, problem.kind) == (task.data.comparisons, 21, kind)
    assert problem.detail.startswith(detail) and len(problem.detail) <= 200 + len(str(tmp_path))
    [source] = report(task)["sources"]
    assert (source["rows"], source["kept"]) == (41, 40)
    assert source["excluded"][kind]["count"] == 1
    assert source["excluded"][kind]["rows"] == [[task.data.comparisons, 21]]
    assert [(row["line"], row["problem"]) for row in excluded(task)] == [(21, kind)]


def test_every_kind_of_problem_is_shown_here_or_named_below() -> None:
    shown = {kind for *_, kind, _ in ROWS}
    assert shown <= {*PROBLEMS, DUPLICATE}
    assert {*PROBLEMS} - shown == {"line too long", "refused by template", "broken CSV"}


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE", 300)
    path = write(tmp_path / "long.jsonl", [pair(0), pair(1, chosen="é" * 2000), pair(2)])
    loaded = load("comparisons", path, DataConfig(max_excluded=0.5))
    assert [exchange.line for exchange in loaded.exchanges] == [1, 3]
    assert [(p.line, p.kind, p.detail) for p in loaded.problems] == [(2, "line too long", "more than 300 bytes")]


# A file as a whole.


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def torn(path: Path, cut: int) -> str:
    """The beginning of a gzip of lines that do not compress into nothing."""
    import random

    letters = random.Random(0)
    rows = [pair(number, chosen="".join(letters.choices("abcdefghij ", k=400))) for number in range(100)]
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    path.write_bytes(whole[: len(whole) * cut // 100])
    return str(path)


def raw(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def damaged(path: Path) -> str:
    """A Parquet file with a page overwritten."""
    parquet(path, {"chosen": [f"{YES}{n}" for n in range(5000)], "rejected": [f"{NO}{n}" for n in range(5000)]})
    content = bytearray(path.read_bytes())
    content[50:4000] = b"\xff" * 3950
    return raw(path, bytes(content))


def many_bad(path: Path) -> str:
    return write(path, [*pairs(8), {"chosen": YES}, '{"chosen"', '{"rejected"'])


NOT_HERE = "must be an existing file, a pattern that fits some, a URL or the name of a Hugging Face data set, got"
SOURCES: dict[str, tuple[Callable[[Path], str], str]] = {
    "no such file": (lambda at: f"{at}/nothing.jsonl", f"data.comparisons: {NOT_HERE} 'AT/nothing.jsonl'"),
    "no such files": (lambda at: f"{at}/*.parquet", f"data.comparisons: {NOT_HERE} 'AT/*.parquet'"),
    "a folder": (str, "data.comparisons: must be files, got the folder 'AT'; name them, such as AT/*.jsonl"),
    "another kind of file": (
        lambda at: raw(at / "a.tsv", b"chosen\trejected\n"),
        "data.comparisons: must be files that end in .parquet, .jsonl, .jsonl.gz, .json, .json.gz, .csv, .csv.gz, got "
        "'AT/a.tsv'",
    ),
    "CSV without rows": (
        lambda at: raw(at / "a.csv", b"chosen,rejected\n"),
        "AT/a.csv: must have at least one row, got an empty file",
    ),
    "an empty CSV": (lambda at: raw(at / "a.csv", b""), "AT/a.csv: must have at least one row, got an empty file"),
    "CSV with other columns": (
        lambda at: raw(at / "a.csv", b"question;answer\n1;2\n"),
        "AT/a.csv: must have the columns 'chosen' and 'rejected' or 'ranking', got ['question;answer']; map their "
        "names under data.columns",
    ),
    "CSV with a name twice": (
        lambda at: raw(at / "a.csv", b"chosen,rejected,chosen\n"),
        "AT/a.csv: must have a first line of different names, got ['chosen', 'rejected', 'chosen']",
    ),
    "CSV that breaks off": (
        lambda at: raw(at / "a.csv", b'prompt,chosen,rejected\nHi?,Yes,"No'),
        "data.comparisons: 'AT/a.csv' must have at least one usable row, got none of 1: 1 x broken CSV (line 2: "
        "unexpected end of data)",
    ),
    "a JSON array that breaks off": (
        lambda at: raw(at / "a.json", json.dumps(pairs(3), indent=1).encode()[:-9]),
        "AT/a.json: must be one list of JSON objects, or one object a line, but breaks off or is damaged at line ",
    ),
    "a JSON array that is nested beyond measure": (
        lambda at: raw(at / "a.json", b"[" * 100_000),
        "AT/a.json: must be one list of JSON objects, or one object a line, but is nested too deeply",
    ),
    "a JSON array in another encoding": (
        lambda at: raw(at / "a.json", b'[{"chosen": "caf\xe9"}]'),
        "AT/a.json: must be UTF-8, but byte 17 is 0xe9; convert it",
    ),
    "an empty JSON array": (
        lambda at: raw(at / "a.json", b"[]"),
        "AT/a.json: must have at least one row, got an empty file",
    ),
    "tool calls alone": (
        lambda at: write(at / "a.jsonl", [TOOL_CALL] * 3),
        "data.comparisons: 'AT/a.jsonl' must have at least one usable row, got none of 3: 3 x tool use (line 1, 2, 3: "
        "message 0)",
    ),
    "an empty file": (lambda at: raw(at / "a.jsonl", b""), "AT/a.jsonl: must have at least one row, got an empty file"),
    "blank lines alone": (
        lambda at: raw(at / "a.jsonl", b"\n  \n\n"),
        "AT/a.jsonl: must have at least one row, got an empty file",
    ),
    "an empty gzip": (
        lambda at: raw(at / "a.jsonl.gz", gzip.compress(b"")),
        "AT/a.jsonl.gz: must have at least one row, got an empty file",
    ),
    "a Parquet file without rows": (
        lambda at: parquet(at / "a.parquet", {"chosen": [], "rejected": []}),
        "AT/a.parquet: must have at least one row, got an empty file",
    ),
    "a truncated gzip": (
        lambda at: torn(at / "a.jsonl.gz", 50),
        "AT/a.jsonl.gz: must be a whole gzip file, but it breaks off or is damaged after line ",
    ),
    "a gzip that is none": (
        lambda at: raw(at / "a.jsonl.gz", b'{"chosen": 1}\n'),
        "AT/a.jsonl.gz: must be gzip, as its name says, but does not begin as one; take .gz off its name if it is "
        "plain",
    ),
    "UTF-16": (
        lambda at: raw(at / "a.jsonl", json.dumps(pair(0)).encode("utf-16")),
        "AT/a.jsonl: must be UTF-8, got UTF-16; convert it, such as by `iconv -f utf-16 -t utf-8`",
    ),
    "a list over several lines": (
        lambda at: raw(at / "a.jsonl", json.dumps(pairs(3), indent=1).encode()),
        "AT/a.jsonl: must have one JSON object a line, got a list over several lines; write each of its entries on a "
        "line, or call it .json",
    ),
    "Parquet of another schema": (
        lambda at: parquet(at / "a.parquet", {"text": ["a"], "label": [1]}),
        "AT/a.parquet: must have the columns 'chosen' and 'rejected' or 'ranking', got ['text', 'label']; map their "
        "names under data.columns",
    ),
    "Parquet that is none": (
        lambda at: raw(at / "a.parquet", b"PAR1 and then something else"),
        "AT/a.parquet: must be a whole Parquet file, but cannot be read after row 0: ",
    ),
    "Parquet that breaks off": (
        lambda at: raw(
            at / "b.parquet", Path(parquet(at / "a.parquet", {"chosen": [YES], "rejected": [NO]})).read_bytes()[:-9]
        ),
        "AT/b.parquet: must be a whole Parquet file, but cannot be read after row 0: ",
    ),
    "Parquet that is damaged": (
        lambda at: damaged(at / "a.parquet"),
        "AT/a.parquet: must be a whole Parquet file, but cannot be read after row ",
    ),
    "Parquet columns of numbers": (
        lambda at: parquet(at / "a.parquet", {"prompt": ["a", "b"], "chosen": [1, 2], "rejected": [3, 4]}),
        "data.comparisons: 'AT/a.parquet' must have at least one usable row, got none of 2: 2 x not text (line 1, 2: "
        "'reply' is a int)",
    ),
    "no usable row": (
        lambda at: write(at / "a.jsonl", [{"text": "a"}] * 5),
        "data.comparisons: 'AT/a.jsonl' must have at least one usable row, got none of 5: 5 x missing column (line 1, "
        "2, 3, ...: no 'chosen' among ['text'])",
    ),
    "too many bad rows": (
        lambda at: many_bad(at / "a.jsonl"),
        "data.max_excluded: at most 0.1 of the rows of 'AT/a.jsonl' may be faulty, got 3 of 11, read as transcript: "
        "2 x broken JSON (line 10, 11: Expecting ':' delimiter at character 10 of the line); "
        "1 x missing column (line 9: no 'rejected' among ['chosen']); mend them, map data.columns, or raise the limit",
    ),
    "a data set of the hub, offline": (
        lambda at: "Anthropic/hh-rlhf",
        "data.comparisons: the data set 'Anthropic/hh-rlhf' must be read from the Hugging Face hub, which cannot be "
        "reached or does not give it (",
    ),
    "a file on the hub, offline": (
        lambda at: "hf://datasets/Anthropic/hh-rlhf/harmless-base/test.jsonl.gz",
        "data.comparisons: the data set 'hf://datasets/Anthropic/hh-rlhf/harmless-base/test.jsonl.gz' "
        "must be read from the Hugging Face hub, which cannot be reached or does not give it (",
    ),
    "storage nobody knows": (
        lambda at: "nowhere://a/b.jsonl",
        "data.comparisons: 'nowhere://a/b.jsonl' cannot be read (OSError: Protocol not known: nowhere",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_bad_source_is_refused_in_words(name: str, tmp_path: Path) -> None:
    make, message = SOURCES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('AT', str(tmp_path)))}") as caught:
        Files(DataConfig(comparisons=make(tmp_path))).comparisons("train")
    assert "\n" not in str(caught.value)


def test_a_torn_gzip_names_the_line_it_reached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="after line ") as caught:
        load("comparisons", torn(tmp_path / "a.jsonl.gz", 50), DataConfig())
    [reached] = re.findall(r"after line (\d+)", str(caught.value))
    assert 30 < int(reached) < 70  # of 100


def test_one_side_of_the_split_is_empty(tmp_path: Path) -> None:
    task = files(tmp_path, [pair(0, rejected=f"No {number}.") for number in range(3)])
    split, other = ("train", "heldout") if task.all_rows("comparisons")[0].split == "train" else ("heldout", "train")
    assert len(task.comparisons(split)) == 3
    with pytest.raises(
        ValueError,
        match=rf"^data.heldout: must leave comparisons on both sides, got none of 3 for {other} with 0.3; .* begin in "
        r"1 ways",
    ):
        task.comparisons(other)


def test_what_is_neither_given_nor_to_be_derived(tmp_path: Path) -> None:
    task = Files(
        DataConfig(prompts=write(tmp_path / "a.jsonl", [{"prompt": f"Question {number}?"} for number in range(40)]))
    )
    assert len(task.prompts("train")) + len(task.prompts("heldout")) == 40
    with pytest.raises(
        ValueError, match=r"^data.demonstrations: must name a source, got none, and there is nothing to derive it from"
    ):
        task.demonstrations("train")


def test_a_byte_order_mark_and_foreign_line_ends_are_no_fault(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).replace("\\n", "\\r\\n").encode() for row in pairs(5))
    loaded = load("comparisons", raw(tmp_path / "a.jsonl", content), DataConfig())
    plain = load("comparisons", write(tmp_path / "b.jsonl", pairs(5)), DataConfig())
    assert [(row.prompt, row.replies) for row in loaded.exchanges] == [
        (row.prompt, row.replies) for row in plain.exchanges
    ]
    assert loaded.problems == ()


def test_a_null_margin_is_none_and_an_optional_null_is_as_good_as_absent(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {
            **{name: [pair(0)[name], pair(1)[name]] for name in ("chosen", "rejected")},
            "margin": [None, 0.5],
            "prompt": [None, None],
        },
    )
    loaded = load("comparisons", path, DataConfig(columns=ColumnsConfig()))
    assert [row.margin for row in loaded.exchanges] == [0.0, 0.5]
    assert [len(row.prompt) for row in loaded.exchanges] == [1, 1]
