"""Data as TRL, OpenRLHF and verl write it, recognised by its columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_files import write
from pipeline.data.config import ColumnsConfig, DataConfig, Kind
from pipeline.data.files import Files
from pipeline.data.load import load
from pipeline.data.turns import Turn
from pipeline.encoding.data_report import report, summary
from pipeline.tasks.task import SPLITS, DataError

ASKED, SAID = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}
WORSE = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    ("kind", "row", "replies", "recognised"),
    [
        ("comparisons", {"prompt": "Hi?", "chosen": "Ho.", "rejected": "No."}, ("Ho.", "No."), ""),
        ("comparisons", {"prompt": [ASKED], "chosen": [SAID], "rejected": [WORSE]}, ("Ho.", "No."), ""),
        ("comparisons", {"chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]}, ("Ho.", "No."), ""),
        ("demonstrations", {"messages": [ASKED, SAID]}, ("Ho.",), ""),
        ("demonstrations", {"prompt": "Hi?", "completion": "Ho."}, ("Ho.",), "response in 'completion' (TRL)"),
        ("demonstrations", {"prompt": [ASKED], "completion": [SAID]}, ("Ho.",), "response in 'completion' (TRL)"),
        (
            "demonstrations",
            {"input": "Hi?", "output": "Ho."},
            ("Ho.",),
            "prompt in 'input', response in 'output' (OpenRLHF)",
        ),
        (
            "demonstrations",
            {"instruction": "Hi?", "output": "Ho."},
            ("Ho.",),
            "prompt in 'instruction', response in 'output' (Alpaca and OpenRLHF)",
        ),
        (
            "comparisons",
            {"input": "Hi?", "chosen": "Ho.", "rejected": "No."},
            ("Ho.", "No."),
            "prompt in 'input' (OpenRLHF)",
        ),
        ("prompts", {"input": "Hi?"}, (), "prompt in 'input' (OpenRLHF)"),
        ("prompts", {"context_messages": [ASKED]}, (), "prompt in 'context_messages' (OpenRLHF)"),
        ("prompts", {"prompt": [ASKED], "completion": [SAID], "output": "other"}, (), ""),
        ("prompts", {"chosen": [ASKED, SAID], "rejected": [ASKED, WORSE], "input": "other"}, (), ""),
        ("comparisons", {"chosen": [ASKED, SAID], "rejected": [ASKED, WORSE], "input": "other"}, ("Ho.", "No."), ""),
        ("demonstrations", {"prompt": "Hi?", "response": "Ho.", "output": "other"}, ("Ho.",), ""),
        ("prompts", {"prompt": "Hi?", "input": "other", "instruction": "other"}, (), ""),
    ],
)
def test_rows_are_recognised_by_their_columns(
    kind: Kind, row: dict[str, Any], replies: tuple[str, ...], recognised: str, tmp_path: Path
) -> None:
    loaded = load(kind, write(tmp_path / "a.jsonl", [row]), DataConfig())
    [exchange] = loaded.exchanges
    assert [turn.text for turn in exchange.prompt] == ["Hi?"]
    assert exchange.replies == replies
    assert loaded.recognised == recognised
    assert not loaded.problems


def test_verls_parquet_gives_the_reward_function_its_ground_truth(tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
            "extra_info": {"index": number, "split": "train"},
        }
        for number in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    task = Files(DataConfig(prompts=str(tmp_path / "train.parquet"), heldout=0.3))
    prompts = [prompt for split in SPLITS for prompt in task.prompts(split)]
    assert len(prompts) == 20
    for prompt in prompts:
        number = prompt.metadata["extra_info"]["index"]
        assert f"What is {number} + 1?" in prompt.text
        assert prompt.metadata["reward_model"] == {"style": "rule", "ground_truth": str(number + 1)}
        assert prompt.metadata["data_source"] == "openai/gsm8k"
    assert summary(report(task)).endswith(
        "; prompts recognised: verl's rows, with data_source and reward_model for the reward function"
    )


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        (
            "demonstrations",
            {"prompt": "Hi?", "completion": "Ho.", "output": "Ha."},
            r"data\.columns\.response: must say which column .* has 'completion' and 'output' and no 'response'",
        ),
        (
            "demonstrations",
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            r"data\.columns\.prompt: must say which column .* has 'input' and 'instruction' and no 'prompt'",
        ),
        (
            "demonstrations",
            {"prompt": "Hi?", "completion": "Ho.", "label": False},
            r"data\.columns\.response: must be set where replies are good or bad.*unpaired preferences",
        ),
    ],
)
def test_columns_of_two_meanings_are_an_error_that_names_the_setting(
    kind: Kind, row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=words):
        load(kind, source, DataConfig())


def test_the_setting_decides(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1, 2", "output": "3", "label": True}])
    columns = ColumnsConfig(prompt="instruction", response="output")
    [exchange] = load("demonstrations", source, DataConfig(columns=columns)).exchanges
    assert exchange.prompt == (Turn("user", "Add."),)
    assert '"input": "1, 2"' in exchange.metadata


def test_every_row_is_counted_whatever_its_columns(tmp_path: Path) -> None:
    """The form of most rows is not asked here: a row without the recognised columns is left out by name."""
    rows = [{"input": f"Is it {number}?", "output": "Yes."} for number in range(8)]
    rows += [{"input": "Is it nine?"}, {"input": "Is it ten?", "output": None}]
    loaded = load("demonstrations", write(tmp_path / "a.jsonl", rows), DataConfig(max_excluded=0.5))
    assert len(loaded.exchanges) == 8
    assert [(problem.line, problem.kind) for problem in loaded.problems] == [(9, "missing column"), (10, "null")]
    assert sum(loaded.read.values()) == 10


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_files_that_name_their_columns_once_are_recognised_too(name: str, tmp_path: Path) -> None:
    if name.endswith("csv"):
        (tmp_path / name).write_text("input,output\nHi?,Ho.\n")
    else:
        pq.write_table(pa.table({"input": ["Hi?"], "output": ["Ho."]}), tmp_path / name)
    [exchange] = load("demonstrations", str(tmp_path / name), DataConfig()).exchanges
    assert exchange.replies == ("Ho.",)
    assert exchange.metadata == '{"output": "Ho."}', "what the prompt is read from is none"
