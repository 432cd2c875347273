"""What a model's folder becomes when it is written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.causal_lm import load_causal_lm
from actors.models.export import check_saved, save_model, try_export
from actors.models.tokenizer import load_tokenizer
from tiny_models import save_gpt2, save_llama

# without do_sample, which transformers reads and refuses to write
SAMPLING = {
    "temperature": 0.6,
    "top_p": 0.9,
    "eos_token_id": [256, 255],
}


def with_settings(folder: Path, text: str) -> str:
    save_gpt2(folder, width=16)
    (folder / "generation_config.json").write_text(text)
    return str(folder)


def test_generation_settings_that_transformers_would_not_write_are_exported_as_they_are(tmp_path: Path) -> None:
    path = with_settings(tmp_path / "model", json.dumps(SAMPLING))
    model = load_causal_lm(path, torch.float32)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "refused")
    save_model(model, load_tokenizer(path), tmp_path / "policy")
    written = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert {key: written[key] for key in SAMPLING} == SAMPLING
    again = load_causal_lm(str(tmp_path / "policy"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.generation_config.eos_token_id == again.generation_config.eos_token_id == [256, 255]


def test_settings_in_order_are_written_byte_for_byte_as_transformers_writes_them(tmp_path: Path) -> None:
    path = with_settings(tmp_path / "model", json.dumps(SAMPLING | {"do_sample": True}))
    model = load_causal_lm(path, torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, load_tokenizer(path), tmp_path / "ours")
    for name in ("generation_config.json", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_trial_says_what_is_unusual_and_writes_no_weights(tmp_path: Path) -> None:
    path = with_settings(tmp_path / "model", json.dumps(SAMPLING))
    said = try_export(path, tmp_path / "scratch")
    assert (
        said
        == f"model.path: generation_config.json of {path} is exported as it is, though transformers would not write "
        "it: `temperature`, `top_p`"
    )
    assert {file.name for file in (tmp_path / "scratch").iterdir()} >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    assert not list((tmp_path / "scratch").glob("*.safetensors"))
    assert try_export(path, tmp_path / "reward", classifier=True) == "", "a classifier generates nothing"
    assert json.loads((tmp_path / "reward" / "config.json").read_text())["architectures"] == [
        "GPT2ForSequenceClassification"
    ]


@pytest.mark.parametrize("text", ['{"early_stopping": 7}', '{"num_return_sequences": 4}'])
def test_settings_that_no_run_could_read_are_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"model.path: must have a generation_config.json that transformers can read, got '.*model': .*; mend it "
        r"or remove it",
    ):
        try_export(with_settings(tmp_path / "model", text), tmp_path / "scratch")


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(ValueError, match="must be a model that can be written again as it was read"):
        try_export(with_settings(tmp_path / "model", "{}"), tmp_path / "scratch")


@pytest.mark.parametrize("save", [save_gpt2, save_llama])
def test_a_policy_that_is_not_saved_as_it_is_is_refused(save: Any, tmp_path: Path) -> None:
    """To the bit, tied and untied heads alike; and with its tokenizer."""
    path = str(save(tmp_path / "model"))
    model, tokenizer = load_causal_lm(path, torch.float32), load_tokenizer(path)
    save_model(model, tokenizer, tmp_path / "policy")
    check_saved(model, tokenizer, tmp_path / "policy")
    with torch.no_grad():
        last = list(model.named_parameters())[-1]
        last[1].view(-1)[-1] += 1e-6
    with pytest.raises(ValueError, match=rf"its '{last[0]}' is another one"):
        check_saved(model, tokenizer, tmp_path / "policy")
    save_model(model, tokenizer, tmp_path / "policy")
    tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="its words are others"):
        check_saved(model, tokenizer, tmp_path / "policy")
