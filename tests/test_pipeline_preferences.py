"""Comparisons made by a rule from sampled replies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.config import RewardConfig, RolloutConfig, SamplingConfig
from actors.experience import Prompts
from pipeline.preparation.sampled_comparisons import SCHEMA, Comparer, rank, read_comparisons
from pipeline.tasks.task import Comparison


def length(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A rule that tells most replies apart."""
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize(
    ("replies", "scores", "ranked"),
    [
        (["a", "b", "c"], [0.1, 0.3, 0.2], [("b", 0.3), ("c", 0.2), ("a", 0.1)]),
        (["a", "b", "c"], [0.1, 0.1, 0.2], [("c", 0.2), ("a", 0.1)]),
        (["a", "b"], [math.nan, 0.2], [("b", 0.2)]),
        ([" ", "b"], [0.5, 0.2], [("b", 0.2)]),
        (["a", "b"], [0.0, 0.0], [("a", 0.0)]),
    ],
)
def test_a_ranking_holds_what_the_rule_tells_apart(
    replies: list[str], scores: list[float], ranked: list[tuple[str, float]]
) -> None:
    assert rank(replies, scores) == ranked


def comparer(model: Path) -> Comparer:
    rule = RewardConfig(function="test_pipeline_preferences:length")
    return Comparer(
        path=str(model), rollout=RolloutConfig(slots=8), sampling=SamplingConfig(max_new_tokens=6), reward=rule, seed=3
    )


def test_replies_are_ranked_by_the_rule_and_the_same_however_the_prompts_are_cut(tiny_model: Path) -> None:
    prompts = Prompts.of(
        {
            "group_id": [7, 8, 9],
            "tokens": pa.array([[65, 66], [67], [68, 69, 70]], pa.list_(pa.int32())),
            "metadata": ["{}"] * 3,
        }
    ).table
    made, table = comparer(tiny_model).compare(prompts, "train", 4, 0, 0)
    assert table.schema == SCHEMA
    assert (made.prompts, made.comparisons, made.failed) == (3, table.num_rows, 0)
    assert table.num_rows > 1
    for row in table.to_pylist():
        assert row["scores"] == sorted(row["scores"], reverse=True) == [len(reply) for reply in row["replies"]]
        assert 2 <= len(set(row["replies"])) == len(row["replies"]) <= 4
    other = comparer(tiny_model)
    parts = [other.compare(prompts.slice(start, size), "train", 4, 0, 0)[1] for start, size in ((0, 1), (1, 2))]
    assert pa.concat_tables(parts).equals(table)


def test_what_is_written_is_read_by_split(tmp_path: Path) -> None:
    rows = [
        {"split": "train", "prompt": "p", "replies": ["a", "b"], "scores": [1.0, 0.0]},
        {"split": "heldout", "prompt": "q", "replies": ["c", "d", "e"], "scores": [3.0, 2.0, 1.0]},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "made.parquet")
    assert read_comparisons(tmp_path / "made.parquet") == {
        "train": [Comparison(prompt="p", replies=("a", "b"))],
        "heldout": [Comparison(prompt="q", replies=("c", "d", "e"))],
    }
