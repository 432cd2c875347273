"""What a model's folder says of its use: every end of a reply that it names, and a line for each thing that nobody
follows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from actors.models.tokenizer import load_tokenizer
from actors.models.usage import ends_of, not_followed, not_followed_of_judge


def told(folder: Path, **files: dict[str, Any] | None) -> str:
    """A tiny model whose JSON files say this, too; None: there is no such file."""
    tiny_models.save_gpt2(folder)
    for name, settings in files.items():
        path = folder / f"{name}.json"
        if settings is None:
            path.unlink()
        else:
            merged = json.loads(path.read_text()) | settings
            path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return str(folder)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (256,)),
        ({"generation_config": {"eos_token_id": [256, 257]}}, (256, 257)),
        ({"generation_config": {"eos_token_id": [9, 7]}}, (7, 9, 256)),
        ({"generation_config": {"eos_token_id": 9}, "config": {"eos_token_id": 5}}, (5, 9, 256)),
        # the family's default, 50256, is nobody's word
        (
            {"generation_config": {"eos_token_id": 9}, "config": {"eos_token_id": None}},
            (9, 256),
        ),
        ({"generation_config": None, "config": {"eos_token_id": [5, 6]}}, (5, 6, 256)),
        # here `generate` takes the default
        (
            {"generation_config": None, "config": {"eos_token_id": None}},
            (256, 50256),
        ),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 5}}, (5, 256)),
    ],
)
def test_every_end_that_the_folder_names_ends_a_reply(
    files: dict[str, dict[str, Any] | None], ends: tuple[int, ...], tmp_path: Path
) -> None:
    path = told(tmp_path, **files)
    assert ends_of(path, load_tokenizer(path)) == ends


def test_a_folder_that_asks_for_nothing_has_no_lines(tmp_path: Path) -> None:
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": [3], "temperature": 1.0, "max_length": 50}
    assert not_followed(told(tmp_path, generation_config=neutral), lays_out="task 'walks'") == []


def test_what_is_not_followed_has_a_line_each(tmp_path: Path) -> None:
    generation = {
        "repetition_penalty": 1.1,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    path = told(
        tmp_path,
        generation_config=generation,
        config={"auto_map": {"AutoModelForCausalLM": "mine.Mine"}},
        tokenizer_config={"chat_template": "{{ messages }}", "model_max_length": 40},
    )
    before, model_lines = f"model {path}: ", not_followed(path, lays_out="task 'walks'")
    assert [line.removeprefix(before) for line in model_lines] == [
        "generation_config.json asks for repetition_penalty = 1.1: ignored: replies are sampled from the model's "
        "unchanged distribution",
        "generation_config.json asks for temperature = 0.6, top_p = 0.9: the recipe's `sampling` is used instead",
        "its chat template is not used, since task 'walks' lays its text out itself",
        "config.json asks for code of its own (auto_map): not run; transformers' own class of the family is used",
        "its tokenizer gives 40 tokens as the longest text: not followed, since the model takes 96",
    ]
    assert all(line.startswith(before) for line in model_lines)
    assert not any("template" in line for line in not_followed(path))
    assert [line.split(": ")[1] for line in not_followed_of_judge(path)] == [
        line.split(": ")[1] for line in model_lines[3:]
    ]
