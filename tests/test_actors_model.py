"""Loading a causal LM: families whose logits are head(trunk(tokens)) are taken, every other is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.slots import ATTENTION, register_attention
from actors.models.causal_lm import PolicyModel, TokenInputs, context_of, load_causal_lm

WIDE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "is_decoder": True,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "cohere": WIDE,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gemma2": WIDE | {"initializer_range": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "granite": WIDE | {"logits_scaling": 8.0},
    "llama": WIDE,
    "mistral": WIDE,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "qwen2": WIDE | {"tie_word_embeddings": True},
}
HEAD = (
    r"^model\.path: must be a causal language model whose logits are its output head of its final hidden states, got "
    r".* \(family {}\), {}; choose a model"
)


def save(family: str, folder: Path, **changes: Any) -> str:
    """A random causal LM with weights large enough for logits of a visible size."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](
        **{"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | FAMILIES[family] | changes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("untie_head", [False, True], ids=["", "untied"])
def test_what_is_taken_has_the_log_probs_of_its_own_logits(
    family: str, dtype: torch.dtype, untie_head: bool, tmp_path: Path
) -> None:
    model = load_causal_lm(save(family, tmp_path), dtype, untie_head=untie_head)
    assert model.config._attn_implementation == "sdpa" and not model.training
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        want = torch.log_softmax(model(ids).logits[0, :4].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        got, _ = PolicyModel(model, 1.0)(TokenInputs(input_ids=ids, states=torch.arange(4), targets=ids[0, 1:]))
    torch.testing.assert_close(got, want, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "bert"])
def test_a_family_that_changes_its_logits_is_refused(family: str, attention: str, tmp_path: Path) -> None:
    register_attention()
    path = save(family, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=HEAD.format(family, r"whose logits differ from that by up to [0-9.e+-]+")):
            load_causal_lm(path, dtype, attention=attention)


def test_a_soft_cap_is_seen_where_it_hardly_shows(tmp_path: Path) -> None:
    """Logits of 0.3 and a cap of 30: a gap of 1e-5, which training would widen."""
    model: Any = load_causal_lm(
        save("gemma2", tmp_path, initializer_range=0.004, final_logit_softcapping=None), torch.float32
    )
    with torch.no_grad():
        assert model(torch.arange(4)[None]).logits.abs().max() < 0.6
    with pytest.raises(ValueError, match="family gemma2"):
        load_causal_lm(save("gemma2", tmp_path, initializer_range=0.004), torch.float32)


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_a_family_without_sdpa_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^model\.path: must be .* a causal language model that runs with sdpa attention, got .*: "
        r"(Bloom|GPTNeo)ForCausalLM",
    ):
        load_causal_lm(save(family, tmp_path), torch.float32, attention=ATTENTION)


def test_a_config_without_a_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^model\.path: must have max_position_embeddings in its config, got .* \(family bloom\); choose",
    ):
        context_of(save("bloom", tmp_path))
    assert context_of(save("gpt2", tmp_path)) == 64


def test_an_attention_of_one_s_own_is_set_after_the_check(tmp_path: Path) -> None:
    register_attention()
    model = load_causal_lm(save("llama", tmp_path), torch.float32, attention=ATTENTION)
    assert (
        model.config._attn_implementation
        == model.base_model.layers[0].self_attn.config._attn_implementation
        == ATTENTION
    )
    with pytest.raises(
        ValueError,
        match=r"^model\.path: must be of a family whose attention can be replaced, got .* \(family falcon\); choose",
    ):
        load_causal_lm(save("falcon", tmp_path), torch.float32, attention=ATTENTION)


def test_weights_that_are_not_finite_are_not_taken_for_another_family(tmp_path: Path) -> None:
    model = load_causal_lm(save("gpt2", tmp_path), torch.float32)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path)
    load_causal_lm(str(tmp_path), torch.float32)
