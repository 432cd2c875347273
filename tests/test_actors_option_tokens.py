"""A model with control tokens: everything that it did before it still does, and the new tokens are never generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from actors.models.causal_lm import load_causal_lm
from actors.models.option_tokens import add_option_tokens, option_ids, option_token
from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer

NAMES = ("comfort", "ask-back", "joke_2")
TEXTS = ["hello there", "Süß, 1 < 2 | 3 > 2", "<|option:other|> and <|endoftext|>", "  two  spaces\n", ""]
PIECES = tiny_models.piece_tokenizer(special=("<user>",))
MODELS: dict[str, Callable[[Path], Path]] = {
    "gpt2": tiny_models.save_gpt2,
    "gpt2 padded": lambda folder: tiny_models.save_gpt2(folder, vocabulary=320),
    "gpt2 padded for one": lambda folder: tiny_models.save_gpt2(folder, vocabulary=tiny_models.WORDS + 1),
    "llama": tiny_models.save_llama,
    "llama padded": lambda folder: tiny_models.save_llama(folder, vocabulary=300),
    "llama pieces": lambda folder: tiny_models.save_llama(folder, tokenizer=PIECES),
    "qwen2": tiny_models.save_qwen2,
}


@pytest.fixture(params=MODELS)
def before(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MODELS[request.param](tmp_path / "before")


def tables_of(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


def test_old_tokens_stay_and_new_ones_have_the_mean_of_the_old(before: Path, tmp_path: Path) -> None:
    add_option_tokens(str(before), tmp_path / "after", NAMES)
    old, new = (load_tokenizer(str(folder)) for folder in (before, tmp_path / "after"))
    words, ids = len(old), option_ids(new, NAMES)
    assert ids == tuple(range(words, words + 3))
    assert new.get_vocab() == old.get_vocab() | dict(zip(map(option_token, NAMES), ids, strict=True))
    assert (new.eos_token_id, new.bos_token_id, new.pad_token_id) == (
        old.eos_token_id,
        old.bos_token_id,
        old.pad_token_id,
    )
    models: list[Any] = [load_causal_lm(str(folder), torch.float32) for folder in (before, tmp_path / "after")]
    is_tied = models[0].get_input_embeddings().weight is models[0].get_output_embeddings().weight
    assert is_tied == (models[1].get_input_embeddings().weight is models[1].get_output_embeddings().weight)
    for had, has in zip(*map(tables_of, models), strict=True):
        assert len(has) == max(len(had), words + 3)
        assert torch.equal(has[:words], had[:words])
        assert torch.equal(has[list(ids)], had[:words].double().mean(0).float().expand(3, -1))
        assert torch.equal(has[words + 3 :], had[words + 3 :]), "padding stays"
    tokens = torch.arange(20)[None] * 7 % words
    had, has = (model.base_model(tokens).last_hidden_state for model in models)
    assert torch.equal(had, has)
    # a product with more columns may be summed in another order, as the CPU's library likes
    had, has = (model(tokens).logits[..., :words] for model in models)
    torch.testing.assert_close(has, had, rtol=1e-5, atol=1e-5)
    assert models[1].generation_config.suppress_tokens == list(ids)


def test_texts_have_the_same_ids_and_a_control_token_is_one_special_token(before: Path, tmp_path: Path) -> None:
    add_option_tokens(str(before), tmp_path / "after", NAMES)
    old, new = (TextCodec(load_tokenizer(str(folder))) for folder in (before, tmp_path / "after"))
    for encode in ("encode_prompts", "encode_replies", "encode_continuations"):
        assert getattr(new, encode)(TEXTS) == getattr(old, encode)(TEXTS)
    [ids] = new.encode_continuations([f"hello{option_token('joke_2')}"])
    assert ids == [*new.encode_continuations(["hello"])[0], option_ids(new.tokenizer, NAMES)[2]]
    said = new.encode_replies([" good", option_token("comfort")])
    assert len(said[1]) > 1, "a reply cannot say it"
    assert new.decode_replies([[option_ids(new.tokenizer, NAMES)[0], *said[0]]]) == new.decode_replies([said[0]])


def test_generate_never_says_a_control_token(before: Path, tmp_path: Path) -> None:
    add_option_tokens(str(before), tmp_path / "after", NAMES)
    model: Any = load_causal_lm(str(tmp_path / "after"), torch.float32)
    ids = list(option_ids(load_tokenizer(str(tmp_path / "after")), NAMES))
    start = torch.tensor([[7, 8]])
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        state = model.base_model(start).last_hidden_state[0, -1]
        head[ids] = 100 * state / state.norm()
        assert int(model(start).logits[0, -1].argmax()) in ids
    out = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=1, min_new_tokens=1, do_sample=False
    )
    assert int(out[0, 2]) not in ids


def test_a_model_that_has_the_tokens_only_suppresses_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    add_option_tokens(str(tiny_models.save_llama(tmp_path / "model")), first, NAMES)
    file = first / "generation_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"suppress_tokens": [5], "repetition_penalty": 1.5}))
    add_option_tokens(str(first), second, NAMES)
    ids = option_ids(load_tokenizer(str(second)), NAMES)
    again = json.loads((second / "generation_config.json").read_text())
    assert again["suppress_tokens"] == [5, *ids]
    assert again["repetition_penalty"] == 1.5
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()


def test_tokens_that_a_task_s_tokenizer_has_as_words_become_special(tmp_path: Path) -> None:
    """A tokenizer built with the tokens in its vocabulary splits them, unless they are added as special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "a", "b", *map(option_token, NAMES)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    with pytest.raises(ValueError, match="tokenizer: must have a token of its own for the option 'comfort', got"):
        option_ids(made, NAMES)
    path = tiny_models.save_llama(tmp_path / "model", tokenizer=made)
    add_option_tokens(str(path), tmp_path / "after", NAMES)
    assert option_ids(load_tokenizer(str(tmp_path / "after")), NAMES) == (3, 4, 5)
    assert (tmp_path / "after" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_further_options_leave_the_first_ones_as_they_are(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    add_option_tokens(str(tiny_models.save_gpt2(tmp_path / "model")), first, NAMES[:1])
    add_option_tokens(str(first), second, NAMES)
    ids = option_ids(load_tokenizer(str(second)), NAMES)
    assert ids == (257, 258, 259)
    models = [load_causal_lm(str(folder), torch.float32) for folder in (first, second)]
    assert torch.equal(tables_of(models[0])[0], tables_of(models[1])[0][:258])
    assert models[1].generation_config.suppress_tokens == [257, 258, 259]  # type: ignore[union-attr]


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tiny_models.save_llama(tmp_path / "model")
    load_causal_lm(str(path), torch.bfloat16).save_pretrained(path)
    add_option_tokens(str(path), tmp_path / "after", NAMES)
    assert {tensor.dtype for tensor in load_file(tmp_path / "after" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "got none; name the options"),
        (["ask", ""], "got ''; rename it"),
        (["ask", "joke", "ask"], "got 'ask' twice"),
        (["ask back"], "got 'ask back'; rename it"),
        (["ask|>"], "rename it"),
        (["süß"], "rename it"),
        (["ask\n"], "rename it"),
        (["-"], "rename it"),
    ],
)
def test_names_that_would_not_survive_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    path = tiny_models.save_gpt2(tmp_path / "model")
    with pytest.raises(
        ValueError, match=rf"options: must be one or more different names .*{message.replace('|', '.')}"
    ):
        add_option_tokens(str(path), tmp_path / "after", names)
    assert not (tmp_path / "after").exists()


def test_a_tokenizer_with_gaps_whose_next_id_is_taken_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "a": 1, "b": 4}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<end>")), eos_token="<end>"
    )
    path = tiny_models.save_gpt2(tmp_path / "model")
    made.save_pretrained(path)
    with pytest.raises(ValueError, match="must have a tokenizer whose ids have no gaps"):
        add_option_tokens(str(path), tmp_path / "after", NAMES)


def test_an_option_without_a_token_and_the_model_s_own_folder_are_refused(tmp_path: Path) -> None:
    path = tiny_models.save_gpt2(tmp_path / "model")
    with pytest.raises(ValueError, match=r"option 'joke', got '<\|option:joke\|>' as \[.*; add it "):
        option_ids(load_tokenizer(str(path)), ["joke"])
    with pytest.raises(ValueError, match=r"folder: must be another one than the model's"):
        add_option_tokens(str(path), path / ".." / "model", NAMES)
