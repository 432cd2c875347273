"""Packed linear layers are the layers they replace: same parameters, same products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_models
from actors.device import packs_bfloat16
from actors.engine import packed_weights as packed
from actors.engine.packed_weights import PackedLinear, pack_linears
from actors.models.causal_lm import load_causal_lm


def conv1d(inputs: int, outputs: int) -> Any:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


UNPACKED = pytest.mark.skipif(
    not packs_bfloat16(),
    reason="oneDNN packs no bfloat16 weights on this CPU (no AVX-512), and the program asks it for none",
)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=UNPACKED)], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("build", [nn.Linear, conv1d, lambda i, o: nn.Linear(i, o, bias=False)])
@torch.inference_mode()
def test_products_equal_those_of_the_layer(build: Any, gelu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        layer = build(48, 80).requires_grad_(False).to(dtype)
    for shape in ((8, 1, 48), (3, 48), (2, 130, 48)):
        rows = torch.randn(shape).to(dtype)
        expected = layer.float()(rows.float())
        expected = nn.functional.gelu(expected, approximate="tanh") if gelu else expected
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            PackedLinear(layer.to(dtype), gelu=gelu)(rows).float(), expected, atol=tolerance, rtol=tolerance
        )


def test_a_changed_weight_is_packed_again() -> None:
    layer = nn.Linear(16, 16)
    one, rows = PackedLinear(layer), torch.randn(8, 16)
    with torch.no_grad():
        before = one(rows)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(one(rows), 2 * before)


@pytest.mark.parametrize("save", [tiny_models.save_gpt2, tiny_models.save_llama, tiny_models.save_qwen2])
def test_a_packed_model_is_the_model(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 0)
    plain, model = (load_causal_lm(str(save(tmp_path)), torch.float32) for _ in range(2))
    pack_linears(model)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    named, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    assert named.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in named.items())
    ids = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logprobs = [torch.log_softmax(m(ids).logits, -1) for m in (model, plain)]
    torch.testing.assert_close(*logprobs, atol=1e-5, rtol=0)


def test_small_float32_layers_stay_as_they_are(tmp_path: Path) -> None:
    model = load_causal_lm(str(tiny_models.save_gpt2(tmp_path)), torch.float32)
    pack_linears(model)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


@pytest.mark.parametrize("packs", [False, pytest.param(True, marks=UNPACKED)])
def test_bfloat16_layers_are_packed_only_where_the_cpu_can(
    packs: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "packs_bfloat16", lambda: packs)
    model, ids = load_causal_lm(str(tiny_model), torch.bfloat16), torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        pack_linears(model)
        after = model(ids).logits
    assert any(isinstance(m, PackedLinear) for m in model.modules()) == packs
    torch.testing.assert_close(after, before, atol=0.02, rtol=0.02)
