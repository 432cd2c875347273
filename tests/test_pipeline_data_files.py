"""Files of preferences as a task: what transcripts, messages and columns say, how they are split and laid out, and what
the report tells of them.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer
from data_files import files, hh, pair, pairs, write
from pipeline.config.rules import check
from pipeline.config.run_config import RunConfig
from pipeline.data import messages, transcript
from pipeline.data.config import ColumnsConfig, DataConfig, TemplateConfig
from pipeline.data.files import Files
from pipeline.data.load import load
from pipeline.data.problems import RowError
from pipeline.data.registry import load_task
from pipeline.data.sources import absolute, hub_url, is_hub
from pipeline.data.template import Layout, shorter
from pipeline.data.turns import Turn, Turns, joined, shared_prompt
from pipeline.encoding.data_report import TokenAccount, report, write_report
from pipeline.encoding.fit import fit_prompts
from pipeline.encoding.prompts import run_prompts
from pipeline.tasks.task import SPLITS, Comparison, Demonstration, Task, comparisons_of, demonstrations_of, prompts_of
from pipeline.tasks.walks import RandomWalks

HH_FILE = os.environ.get("RAYLIGN_HH_RLHF", "")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% "
    "endif %}"
)


def turns(*texts: str) -> Turns:
    """Texts in turn, a person's first."""
    return tuple(Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts))  # type: ignore[arg-type]


def everything(task: Files) -> list[Comparison]:
    return [
        Comparison(prompt=row.prompt, replies=row.replies, margin=row.exchange.margin)
        for row in task.all_rows("comparisons")
    ]


# Transcripts.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Ho", turns("Hi", "Ho")),
        ("\n\nHuman:  Hi \n\nAssistant:Ho", turns(" Hi ", "Ho")),  # one space belongs to the marker
        ("Human: Hi\n\nAssistant:", turns("Hi", "")),
        ("\n\n\n\nHuman: Hi\n\n\n\nAssistant: Ho", turns("Hi\n\n", "Ho")),
        ("\r\n\r\nHuman: Hi\r\n\r\nAssistant: Ho", turns("Hi", "Ho")),
        ("\n\nHuman: a\nAssistant: b\n\nAssistant: c", turns("a\nAssistant: b", "c")),  # no paragraph begins there
        ("\n\nHuman: Hi\n\nAssistant: Human: no", turns("Hi", "Human: no")),
        ("\n\nHuman: 1\n\n2\n\nAssistant: 3", turns("1\n\n2", "3")),
    ],
)
def test_a_transcript_is_read_as_it_is(text: str, expected: Turns) -> None:
    assert transcript.parse(text) == expected


text_without_markers = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: "\r" not in text and "Human:" not in text and "Assistant:" not in text
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), text_without_markers), min_size=1, max_size=6))
def test_rendering_and_parsing_a_transcript_is_the_identity(parts: list[tuple[Any, str]]) -> None:
    said = tuple(Turn(role, text) for role, text in parts)
    markers = {"user": transcript.HUMAN, "assistant": transcript.ASSISTANT}
    assert transcript.parse("".join(f"{markers[turn.role]} {turn.text}" for turn in said)) == said


def test_turns_of_one_speaker_are_one_turn() -> None:
    said = (*turns("Hi ", " Ho"), Turn("assistant", " So."), Turn("assistant", " "))
    assert joined(said) == turns("Hi", "Ho\n\nSo.")


def test_what_conversations_share_is_the_prompt() -> None:
    assert shared_prompt([turns("Hi", "Ho", "So?", "Yes"), turns("Hi", "Ho", "So?", "No")]) == (
        turns("Hi", "Ho", "So?"),
        ("Yes", "No"),
    )
    with pytest.raises(RowError, match="no common prompt"):
        shared_prompt([turns("Hi", "Ho"), turns("Hi", "No", "So?", "Yes")])


def test_anthropics_files_are_read_as_they_are(tmp_path: Path) -> None:
    """Golden rows with the oddities of the real ones: a reply in two turns, one that speaks for the human, two that
    share a prompt, a contradiction.
    """
    two = {"chosen": hh("a?", "b", "c?", last="d\n\nAssistant: e"), "rejected": hh("a?", "b", "c?", last="Human: f")}
    again = {"chosen": two["rejected"], "rejected": two["chosen"]}
    task = files(tmp_path, [two, pair(1), pair(1, rejected="Hm."), again], name="odd.jsonl.gz")
    prompt = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    rows = everything(task)
    assert rows[0] == Comparison(prompt=prompt, replies=(" d\n\ne", " Human: f"))
    assert rows[3].replies == rows[0].replies[::-1]
    assert [row.replies[1] for row in rows[1:3]] == [" No, never.", " Hm."]
    [source] = report(task)["sources"]
    assert {
        name: (entry["count"], [line for _, line in entry["rows"]]) for name, entry in source["remarks"].items()
    } == {
        "joined turns": (2, [1, 4]),
        "role marker in a reply": (2, [1, 4]),
        "contradiction": (1, [4]),
    }
    assert report(task)["comparisons"]["same_prompt"] == 4


@pytest.mark.skipif(
    not Path(HH_FILE).is_file(),
    reason="needs RAYLIGN_HH_RLHF, the path of harmless-base/test.jsonl.gz of Anthropic's hh-rlhf (2,312 pairs)",
)
def test_the_real_file_of_anthropic(tmp_path: Path) -> None:
    task = Files(DataConfig(comparisons=HH_FILE))
    line = write_report(task, tmp_path)
    record = json.loads((tmp_path / "data-report.json").read_text())
    [source] = record["sources"]
    assert (source["form"], source["rows"], source["kept"]) == ("transcript", 2312, 2308)
    assert {
        kind: (entry["count"], [place for _, place in entry["rows"]]) for kind, entry in source["excluded"].items()
    } == {"empty reply": (4, [87, 517, 926, 1104])}
    assert {remark: entry["count"] for remark, entry in source["remarks"].items()} == {
        "role marker in a reply": 36,
        "joined turns": 9,
    }
    assert record["prompts"]["distinct"] == 2306
    assert len((tmp_path / "data-excluded.jsonl").read_text().splitlines()) == 4
    assert line.startswith("data: 2312 rows read, 4 faulty and 0 repeated left out; 2076 + 232 comparisons")
    for comparison in everything(task):  # what was read is what stands there, but for space around turns
        assert comparison.prompt.startswith("\n\nHuman: ") and comparison.prompt.endswith("\n\nAssistant:")
        assert len(set(comparison.replies)) == 2


# Messages and columns.

HI, HO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [HI], "chosen": [YES], "rejected": [NO]},
        {"chosen": [HI, YES], "rejected": [HI, NO]},
        {"prompt": [HI], "chosen": [HI, YES], "rejected": [HI, NO]},
        {"prompt": [HI], "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": [{"role": "human", "content": " Hi\n"}], "chosen": [YES], "rejected": [NO]},
        {"prompt": [HI], "ranking": [[YES], [NO]]},
        {"prompt": [HI], "ranking": ["Yes", "No"]},
        {"prompt": "\n\nHuman: Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes", "rejected": " No"},
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant:",
            "chosen": "\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No",
        },
    ],
)
def test_all_forms_of_a_conversation_say_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    assert everything(files(tmp_path, [row])) == [
        Comparison(prompt="\n\nHuman: Hi\n\nAssistant:", replies=(" Yes", " No"))
    ]


def test_plain_columns_are_taken_to_the_letter(tmp_path: Path) -> None:
    task = files(tmp_path, [{"prompt": " Once ", "ranking": [" a ", "b", "c"], "margin": 2}])
    assert everything(task) == [Comparison(prompt=" Once ", replies=(" a ", "b", "c"), margin=2.0)]
    assert task.layout("Twice") == "Twice"


def test_the_first_words_of_a_running_text_are_its_prompt(tmp_path: Path) -> None:
    source = write(
        tmp_path / "reviews.jsonl", [{"text": "  One two\nthree  four, five."}, {"text": "Too short"}, {"text": 7}]
    )
    found = load("demonstrations", source, DataConfig(prompt_words=3, max_excluded=1))
    assert [(row.prompt[0].text, row.replies) for row in found.exchanges] == [("One two\nthree", ("  four, five.",))]
    assert [(problem.line, problem.kind) for problem in found.problems] == [(2, "empty reply"), (3, "not text")]
    assert [
        row.prompt[0].text for row in load("prompts", source, DataConfig(prompt_words=3, max_excluded=1)).exchanges
    ] == ["One two\nthree"]


def test_columns_are_mapped(tmp_path: Path) -> None:
    columns = ColumnsConfig(prompt="question", chosen="good", rejected="bad", margin="delta")
    task = files(tmp_path, [{"question": "Q", "good": "A", "bad": "B", "delta": 0.25, "chosen": 3}], columns=columns)
    assert everything(task) == [Comparison(prompt="Q", replies=("A", "B"), margin=0.25)]


def test_parquet_is_read_by_its_columns(tmp_path: Path) -> None:
    rows = [pair(number % 144) | {"id": number} for number in range(2000)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=300)
    found = load("comparisons", str(tmp_path / "pairs.parquet"), DataConfig())
    plain = load("comparisons", write(tmp_path / "pairs.jsonl", rows), DataConfig())
    assert [(row.line, row.replies) for row in found.exchanges] == [(row.line, row.replies) for row in plain.exchanges]
    assert len(found.exchanges) == 144  # pairs repeat themselves
    assert {problem.kind for problem in found.problems} == {"duplicate"}


def test_parquet_of_messages(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"prompt": [HI], "chosen": [YES], "rejected": [NO]}]), tmp_path / "chats.parquet"
    )
    assert everything(Files(DataConfig(comparisons=str(tmp_path / "chats.parquet")))) == [
        Comparison(prompt="\n\nHuman: Hi\n\nAssistant:", replies=(" Yes", " No"))
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [HI, HO, HI, YES]},
            Demonstration(prompt="\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hi\n\nAssistant:", response=" Yes"),
        ),
        ({"prompt": [HI], "response": "Yes"}, Demonstration(prompt="\n\nHuman: Hi\n\nAssistant:", response=" Yes")),
        (
            {"chosen": hh("Hi", last="Yes"), "rejected": hh("Hi", last="No")},
            Demonstration(prompt="\n\nHuman: Hi\n\nAssistant:", response=" Yes"),
        ),
        ({"response": hh("Hi", last="Yes")}, Demonstration(prompt="\n\nHuman: Hi\n\nAssistant:", response=" Yes")),
        ({"prompt": "Hi", "response": " Yes"}, Demonstration(prompt="Hi", response=" Yes")),
    ],
)
def test_demonstrations_of_every_form(row: dict[str, Any], expected: Demonstration, tmp_path: Path) -> None:
    task = Files(DataConfig(demonstrations=write(tmp_path / "a.jsonl", [row])))
    assert [
        Demonstration(prompt=found.prompt, response=found.replies[0]) for found in task.all_rows("demonstrations")
    ] == [expected]
    assert [found.prompt for found in task.all_rows("prompts")] == [expected.prompt]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": hh("Hi", last="")},
        {"prompt": "\n\nHuman: Hi"},
        {"prompt": [HI]},
        {"messages": [HI]},
        {"messages": [HI, YES]},
        {"chosen": [HI, YES]},
        {"chosen": hh("Hi", last="Yes"), "rejected": hh("Hi", last="No")},
    ],
)
def test_prompts_of_every_form(row: dict[str, Any], tmp_path: Path) -> None:
    task = Files(DataConfig(prompts=write(tmp_path / "a.jsonl", [row])))
    assert [(found.prompt, found.replies) for found in task.all_rows("prompts")] == [
        ("\n\nHuman: Hi\n\nAssistant:", ())
    ]


# The task.


def test_the_task_is_whole(tmp_path: Path) -> None:
    rows = [*pairs(60), pair(3, rejected="Never.")]
    task = load_task("files", DataConfig(comparisons=write(tmp_path / "pairs.jsonl", rows), heldout=0.3))
    assert isinstance(task, Task) and (task.name, task.reward) == ("files", "")
    total = 0
    for split in SPLITS:
        comparisons, prompts, demonstrations = (
            comparisons_of(task, split),
            prompts_of(task, split),
            demonstrations_of(task, split),
        )
        assert len({prompt.text for prompt in prompts}) == len(prompts) > 5
        assert (
            {prompt.text for prompt in prompts}
            == {comparison.prompt for comparison in comparisons}
            == {d.prompt for d in demonstrations}
        )
        assert {d.response for d in demonstrations} == {" Yes."}
        for prompt in prompts:
            assert prompt.metadata["source"] == str(tmp_path / "pairs.jsonl")
            assert prompt.text in rows[prompt.metadata["line"] - 1]["chosen"]
        total += len(comparisons)
    assert total == 61
    task.build_tokenizer(tmp_path / "tokenizer", 300)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    text = "\n\nHuman: é\n\nAssistant:"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_task_without_comparisons_says_so() -> None:
    with pytest.raises(
        ValueError,
        match=r"^task: must have comparisons to learn a reward model from, got 'walks' without; give it a method "
        r"comparisons\(split\)$",
    ):
        comparisons_of(RandomWalks(), "train")


def test_nothing_is_read_before_it_is_asked_for() -> None:
    task = load_task("files", DataConfig(comparisons="nowhere/at-all"))
    with pytest.raises(
        ValueError, match=r"^data\.comparisons: the data set 'nowhere/at-all' must be read from the Hugging Face hub"
    ):
        prompts_of(task, "train")


def test_the_split_depends_on_how_a_conversation_begins_alone(tmp_path: Path) -> None:
    """Rows that are added, left out or turned round move no other; one conversation at several lengths and with several
    replies is on one side.
    """
    rows = pairs(144)
    longer = [
        {key: hh(row["chosen"][9:].split("\n\n")[0].upper(), "Hm", "And?", last=key) for key in ("chosen", "rejected")}
        for row in rows
    ]
    side = {row.exchange.prompt[0].text: row.split for row in files(tmp_path, rows).all_rows("comparisons")}
    assert 25 <= list(side.values()).count("heldout") <= 62  # 0.3 of 144 is 43, and 3 standard deviations 17
    other = files(tmp_path, [*longer, *rows[::-2]], name="other.jsonl").all_rows("comparisons")
    by_words = {text.lower(): split for text, split in side.items()}
    assert [by_words[row.exchange.prompt[0].text.lower()] for row in other] == [row.split for row in other]
    assert sum(row.split == "heldout" for row in other) > 20


def test_several_files_by_a_pattern_and_the_first_rows_of_each(tmp_path: Path) -> None:
    for name, rows in (("b", pairs(40)[20:]), ("a", pairs(20))):
        write(tmp_path / f"{name}.jsonl", rows)
    found = load("comparisons", f"{tmp_path}/*.jsonl", DataConfig(max_rows=5))
    assert [(Path(row.source).name, row.line) for row in found.exchanges] == [
        (name, line) for name in ("a.jsonl", "b.jsonl") for line in range(1, 6)
    ]


# Sources that are not on this machine.


def test_a_url_is_read_through_fsspec() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/preferences/pairs.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in pairs(3)))
    found = load("comparisons", "memory://preferences/pairs.jsonl", DataConfig())
    assert [(row.source, row.line) for row in found.exchanges] == [
        ("memory://preferences/pairs.jsonl", line) for line in (1, 2, 3)
    ]


class FakeHub(MemoryFileSystem):
    """The hub's filesystem, where nothing is far away."""

    protocol = "hf"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("hf://"))

    store: dict[str, Any] = {}  # noqa: RUF012 - as in its base, a class attribute
    pseudo_dirs = [""]  # noqa: RUF012


def test_a_data_set_of_the_hub_is_read_as_parquet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # fsspec's own attribute `registry` is another thing
    monkeypatch.setitem(import_module("fsspec.registry")._registry, "hf", FakeHub)
    monkeypatch.chdir(tmp_path)
    folder = hub_url("Anthropic/hh-rlhf").removeprefix("hf://").rpartition("/")[0]
    assert folder == "datasets/Anthropic/hh-rlhf@refs%2Fconvert%2Fparquet/default/train"
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(pairs(20)[10 * number : 10 * number + 10]), tmp_path / "part")
        FakeHub().pipe(f"/{folder}/000{number}.parquet", (tmp_path / "part").read_bytes())
    found = load("comparisons", "Anthropic/hh-rlhf", DataConfig())
    assert [(row.source[-12:], row.line) for row in found.exchanges] == [
        (f"000{number}.parquet", row) for number in range(2) for row in range(1, 11)
    ]
    with pytest.raises(
        ValueError,
        match=r"found none for 'Anthropic/hh-rlhf:helpful/test'; name its configuration and split as "
        r"owner/name:config/split",
    ):
        load("comparisons", "Anthropic/hh-rlhf:helpful/test", DataConfig())


def test_which_names_are_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "data").mkdir()
    names = ["Anthropic/hh-rlhf", "a/b:c/d", "a/b.jsonl", "a/b/c", "my/data", "hf://datasets/a/b/c.jsonl", "a", "a/*"]
    assert [name for name in names if is_hub(name)] == ["Anthropic/hh-rlhf", "a/b:c/d"]
    assert hub_url("a/b:c/d") == "hf://datasets/a/b@refs%2Fconvert%2Fparquet/c/d/*.parquet"
    full = absolute(DataConfig(comparisons="a.jsonl", demonstrations="a/b", prompts="s3://a/b.jsonl"))
    assert (full.comparisons, full.demonstrations, full.prompts) == (str(tmp_path / "a.jsonl"), "a/b", "s3://a/b.jsonl")


# Layout.


def test_roles_are_as_the_recipe_says(tmp_path: Path) -> None:
    template = TemplateConfig(kind="roles", system="S: ", user="U: ", assistant="A:  ", end="\n")
    system = {"role": "system", "content": "Be good"}
    task = files(tmp_path, [{"prompt": [system, HI, HO, HI], "chosen": [YES], "rejected": [NO]}], template=template)
    assert everything(task) == [Comparison(prompt="S: Be good\nU: Hi\nA:  Ho\nU: Hi\nA:", replies=("  Yes", "  No"))]
    assert task.layout("Hey") == "U: Hey\nA:"


def chat_model(folder: Path, tiny_model: Path, template: str) -> str:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_chat_template_is_used_where_the_tokenizer_has_one(tmp_path: Path, tiny_model: Path) -> None:
    data = DataConfig(
        comparisons=write(tmp_path / "a.jsonl", [{"prompt": [HI, HO, HI], "chosen": [YES], "rejected": [NO]}])
    )
    task = Files(data, chat_model(tmp_path / "chat", tiny_model, CHAT))
    assert everything(task) == [
        Comparison(prompt="<user>Hi</><assistant>Ho</><user>Hi</><assistant>", replies=("Yes", "No"))
    ]
    assert task.layout("Hey") == "<user>Hey</><assistant>"
    assert list(task.shorter(everything(task)[0].prompt)) == ["<user>Hi</><assistant>"]
    without = Files(data, str(tiny_model))
    assert without.layout("Hey") == "\n\nHuman: Hey\n\nAssistant:"
    with pytest.raises(
        ValueError,
        match=r"^data\.template\.kind: must be roles where the model has no chat template, got chat with '.*', whose "
        r"tokenizer has none",
    ):
        Files(data.model_copy(update={"template": TemplateConfig(kind="chat")}), str(tiny_model)).layout("Hey")


def test_what_a_chat_template_refuses_is_a_problem_like_any_other(tmp_path: Path, tiny_model: Path) -> None:
    model = chat_model(
        tmp_path / "chat",
        tiny_model,
        "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + CHAT,
    )
    rows = [
        {"prompt": [{"role": "user", "content": f"Hi {number}"}], "chosen": [YES], "rejected": [NO]}
        for number in range(20)
    ]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": [HI, HO, HI], "chosen": [YES], "rejected": [NO]}])
    task = Files(DataConfig(comparisons=path), model)
    assert len(everything(task)) == 20
    assert [(p.line, p.kind, p.detail) for p in task.loaded["comparisons"].problems] == [
        (21, "refused by template", "one at a time")
    ]


def test_plain_prompts_beside_dialogues_are_laid_out_as_these_are(tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    task = files(tmp_path, pairs(3), prompts=prompts)
    assert [row.prompt for row in task.all_rows("prompts")] == ["\n\nHuman: Hi\n\nAssistant:"]
    with pytest.raises(
        ValueError, match=r"^data\.template\.kind: must be chat or roles for transcripts and messages, got plain"
    ):
        files(tmp_path, pairs(3), template=TemplateConfig(kind="plain")).layout("Hi")


def test_a_prompt_gets_shorter_by_its_oldest_exchange() -> None:
    said = (Turn("system", "s"), *turns("a", "b", "c", "d", "e"))
    steps = []
    rest: Turns | None = said
    while rest := shorter(rest):
        steps.append("".join(turn.text for turn in rest))
    assert steps == ["scde", "se"]
    layout = Layout(kind="roles", template=TemplateConfig())
    assert (
        layout.prompt(said)
        == "\n\nSystem: s\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:"
    )
    assert messages.parse(messages.dump(said)) == said


def test_prompts_are_made_to_fit(tmp_path: Path, tiny_model: Path) -> None:
    """One byte is one token: prompts of 19 and more characters, where 40 may be."""
    questions = [hh(last="aa"), hh(last="b" * 60), hh("x" * 40, "y", last="cc"), hh("d" * 40, "y", last="aa")]
    rows = [{"prompt": text} for text in questions]
    tokenizer = load_tokenizer(str(tiny_model))
    limits = {"max_prompt_tokens": 40, "context": 64, "max_new_tokens": 10}
    task = Files(DataConfig(prompts=write(tmp_path / "a.jsonl", rows)))
    prompts = [
        prompt
        for split in SPLITS
        for prompt in (task.prompts(split) if any(row.split == split for row in task.all_rows("prompts")) else [])
    ]
    prompts.sort(key=lambda prompt: prompt.metadata["line"])
    fitted = fit_prompts(task, prompts, TextCodec(tokenizer), **limits)
    assert [(prompt.text[9:11], prompt.metadata["line"]) for prompt in fitted.prompts] == [("aa", 1), ("cc", 3)]
    assert (fitted.whole, fitted.shortened, fitted.merged, fitted.excluded) == (1, 1, (3,), (1,))
    strict = Files(task.data.model_copy(update={"too_long": "exclude"}))
    assert strict.all_rows("prompts")
    assert fit_prompts(strict, prompts, TextCodec(tokenizer), **limits).excluded == (1, 2, 3)
    with pytest.raises(
        ValueError,
        match=r"^batch\.max_prompt_tokens: must let at least one prompt through, got 5 .* the shortest has 23 tokens; "
        r"raise it$",
    ):
        fit_prompts(task, prompts, TextCodec(tokenizer), **(limits | {"max_prompt_tokens": 5}))
    walks = RandomWalks()
    assert list(fit_prompts(walks, walks.prompts("train"), TextCodec(tokenizer), **limits).prompts) == walks.prompts(
        "train"
    )


def test_a_run_asks_what_fits(tmp_path: Path, tiny_model: Path) -> None:
    """The prompts of a run in the model's tokens: drawn from what fits, and the account of the rest."""
    rows = [*pairs(60), {key: hh("x" * 60, "y", "Then?", last=key) for key in ("chosen", "rejected")}]
    data = DataConfig(comparisons=write(tmp_path / "pairs.jsonl", rows), heldout=0.3)
    config = recipe(
        data=data, model={"path": str(tiny_model)}, batch={"max_prompt_tokens": 50}, sampling={"max_new_tokens": 8}
    )
    task = load_task(config.task, config.data, config.model.path)
    found = run_prompts(task, config.model.path, config.batch, config.sampling, config.seed)
    assert sum(fitted.whole + fitted.shortened + len(fitted.excluded) for fitted in found.fitted.values()) == 61
    assert sum(fitted.shortened for fitted in found.fitted.values()) == 1
    for split, stream in (("train", found.train), ("heldout", found.heldout)):
        drawn = stream.draw(range(len(stream))).table
        assert len(stream) == len(found.fitted[split].prompts) > 5  # type: ignore[index]
        assert max(map(len, drawn["tokens"].to_pylist())) <= 50
        places = {json.loads(metadata)["line"] for metadata in drawn["metadata"].to_pylist()}
        assert places == {prompt.metadata["line"] for prompt in found.fitted[split].prompts}  # type: ignore[index]


# The report.


def test_the_report_counts_everything_and_lists_what_was_left_out(tmp_path: Path, tiny_model: Path) -> None:
    rows = [*pairs(30), pair(2), '{"chosen"', pair(31, chosen="A longer reply | with\nlines")]
    task = files(tmp_path, rows)
    tokenizer = load_tokenizer(str(tiny_model))
    fitted = {
        split: fit_prompts(
            task, task.prompts(split), TextCodec(tokenizer), max_prompt_tokens=46, context=64, max_new_tokens=8
        )
        for split in SPLITS
    }
    line = write_report(task, tmp_path / "run", TokenAccount(fitted=fitted))
    record = json.loads((tmp_path / "run" / "data-report.json").read_text())
    sides = [len(task.comparisons(split)) for split in SPLITS]
    assert sum(sides) == 31
    assert line == (
        f"data: 33 rows read, 1 faulty and 1 repeated left out; {sides[0]} + {sides[1]} comparisons, {sides[0]} + "
        f"{sides[1]} demonstrations, "
        f"{sides[0]} + {sides[1]} prompts (training + held out)"
    )
    assert record["comparisons"]["best"] == [4, 4, 4, 4, 27]
    assert record["comparisons"]["better_is_longer"] == pytest.approx(1 / 31)
    left = [json.loads(text) for text in (tmp_path / "run" / "data-excluded.jsonl").read_text().splitlines()]
    short = sum(entry["excluded"] for entry in record["asked"].values())
    assert [(row["line"], row["problem"]) for row in left[:2]] == [(31, "duplicate"), (32, "broken JSON")]
    assert [row["problem"] for row in left[2:]] == ["too many tokens"] * short and 0 < short < 31
    text = (tmp_path / "run" / "data-report.md").read_text()
    assert "| left out | broken JSON | 1 | the line is no JSON | 32 |" in text
    assert "The better reply is the longer one in 3.2% of the comparisons" in text


# What a recipe may say.


def recipe(**sections: Any) -> RunConfig:
    base = {"task": "files", "steps": 2, "model": {"path": "gpt2"}, "reward": {"function": "a:b"}}
    return RunConfig.model_validate(base | sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "data: must name at least one source when task is files, got none"),
        (
            {"task": "walks", "data": {"heldout": 0.2}},
            "data: must be left out unless task is files, got settings for task 'walks'",
        ),
        (
            {"data": {"comparisons": "a"}, "reward": {}},
            "reward: must have a function or a model when task is files, or [reward_model] epochs to train one, or "
            "environment.name, got none",
        ),
        (
            {"data": {"prompts": "a"}, "finetune": {"epochs": 1}},
            "data.demonstrations: must be given to fine-tune, got prompts alone",
        ),
        (
            {"data": {"comparisons": "a", "format": "messages", "template": {"kind": "plain"}}},
            "data.template.kind: must be chat or roles for messages, got plain",
        ),
        (
            {"data": {"comparisons": "a", "template": {"kind": "chat"}}, "model": {}, "finetune": {"epochs": 1}},
            "data.template.kind: must be roles when model.path is empty",
        ),
        (
            {"data": {"comparisons": "a", "columns": {"chosen": "rejected"}}},
            "data.columns: must be different names, none empty, got ",
        ),
    ],
)
def test_a_recipe_whose_data_do_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^data|^reward") as caught:
        check(recipe(**sections))
    assert str(caught.value).startswith(message)


def test_a_recipe_of_files_goes_together() -> None:
    config = recipe(data={"comparisons": "Anthropic/hh-rlhf", "prompts": "a.jsonl"}, finetune={"epochs": 1})
    assert check(config) is config
