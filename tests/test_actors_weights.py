"""Weights to bytes and back, to the bit, and every way it can go wrong."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from actors import weights as weights_module
from actors.config import Dtype
from actors.models.causal_lm import load_causal_lm
from actors.weights import Weights, copy_parameters, pack
from actors.weights_file import read_weights, write_weights
from cluster.storage import Folder
from learner_helpers import save_tiny_model


class Small(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(7, 5)
        self.b = nn.Parameter(torch.randn(3, 2, 2))
        self.scalar = nn.Parameter(torch.randn(()))
        self.a.weight.data[0, 0] = float("nan")  # a checksum must not depend on comparing numbers


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(
        p.detach().numpy().tobytes() == q.detach().numpy().tobytes()
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def over_the_wire(weights: Weights) -> Weights:
    """As Ray's object store delivers it: out-of-band buffers that are read-only."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(weights, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 4096, "the bytes themselves travel out of band"
    received = pickle.loads(data, buffers=[memoryview(bytes(b.raw())) for b in buffers])
    assert not any(bucket.flags.writeable for bucket in received.buckets)
    return received  # type: ignore[no-any-return]


def load(weights: Weights, model: torch.nn.Module) -> None:
    """As a rollout worker does."""
    weights.verify()
    copy_parameters(model, weights.tensors())


@pytest.mark.parametrize("bucket_bytes", [1, 128, 1 << 20])
def test_float32_round_trip_to_the_bit_in_any_buckets(bucket_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "BUCKET_BYTES", bucket_bytes)
    source, target = Small(0), Small(1)
    weights = pack(source.named_parameters(), "float32", 7)
    assert weights.version == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(over_the_wire(weights), target)
    assert same_bits(source, target)
    assert pack(target.named_parameters(), "float32", 8).checksum == weights.checksum, (
        "the same weights have the same checksum in any version"
    )


def test_bfloat16_is_rounded_once_and_then_exact() -> None:
    source, rounded, again = Small(0), Small(1), Small(2).bfloat16()
    weights = pack(source.named_parameters(), "bfloat16", 1)
    assert sum(b.nbytes for b in weights.buckets) < 64 * 5 + 2 * sum(p.numel() for p in source.parameters())
    load(over_the_wire(weights), rounded)
    load(over_the_wire(weights), again)
    for p, q, r in zip(source.parameters(), rounded.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.detach().bfloat16().view(torch.int16), r.detach().view(torch.int16))
        assert torch.equal(q.detach().bfloat16().view(torch.int16), r.detach().view(torch.int16))
    assert pack(again.named_parameters(), "bfloat16", 1).checksum == weights.checksum


def test_one_flipped_bit_is_found_and_the_model_left_alone() -> None:
    weights, target = pack(Small(0).named_parameters(), "float32", 3), Small(1)
    weights.buckets[0][5] ^= 1
    with pytest.raises(ValueError, match=f"version 3 must have checksum {weights.checksum}, got"):
        load(weights, target)
    assert same_bits(target, Small(1))


def test_a_manifest_that_lies_about_names_is_found() -> None:
    weights = pack(Small(0).named_parameters(), "float32", 3)
    names = ("a.bias", "a.weight", *weights.manifest.names[2:])
    swapped = dataclasses.replace(weights, manifest=dataclasses.replace(weights.manifest, names=names))
    with pytest.raises(ValueError, match="checksum"):
        load(swapped, Small(1))


def test_missing_unknown_and_misshapen_parameters_are_named() -> None:
    named = dict(Small(0).named_parameters())
    with pytest.raises(ValueError, match=r"must hold the model's \d parameters, 'scalar' is missing"):
        load(pack([(n, p) for n, p in named.items() if n != "scalar"], "float32", 1), Small(1))
    with pytest.raises(ValueError, match=r"'extra' is unknown to the model"):
        load(pack([*named.items(), ("extra", torch.zeros(1))], "float32", 1), Small(1))
    target = Small(1)
    with pytest.raises(ValueError, match=r"'b' must have shape \(3, 2, 2\), got \(12,\)"):
        load(pack((named | {"b": named["b"].detach().reshape(-1)}).items(), "float32", 1), target)
    assert same_bits(target, Small(1))


def test_tied_parameters_appear_once_and_untied_heads_twice(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    tied = pack(load_causal_lm(path, torch.float32).named_parameters(), "float32", 1)
    untied = pack(load_causal_lm(path, torch.float32, untie_head=True).named_parameters(), "float32", 1)
    assert "lm_head.weight" not in tied.manifest.names
    assert {*untied.manifest.names} - {*tied.manifest.names} == {"lm_head.weight"}
    assert tied.manifest.shapes[tied.manifest.names.index("transformer.wte.weight")] == (96, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_version_in_a_file_comes_back_to_the_bit_with_the_managers_head(tmp_path: Path, dtype: Dtype) -> None:
    written = pack(Small(0).named_parameters(), dtype, 7)
    head = {"policy_weight": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]}
    file = write_weights(Folder(tmp_path), written, head)
    assert file.name == "version-7.safetensors"
    read, found = read_weights(Folder(tmp_path), file.name, 7)
    assert (read.version, read.manifest) == (written.version, written.manifest)
    assert [bucket.tobytes() for bucket in read.buckets] == [bucket.tobytes() for bucket in written.buckets]
    assert found is not None and found["policy_weight"].tolist() == head["policy_weight"].tolist()


def test_a_version_in_a_file_may_have_no_head_and_must_have_its_bytes(tmp_path: Path) -> None:
    file = write_weights(Folder(tmp_path), pack(Small(0).named_parameters(), "float32", 7), None)
    assert read_weights(Folder(tmp_path), file.name, 7)[1] is None
    data = bytearray((tmp_path / file.name).read_bytes())
    data[-70] ^= 1
    (tmp_path / file.name).write_bytes(data)
    with pytest.raises(ValueError, match="version 7 must have checksum"):
        read_weights(Folder(tmp_path), file.name, 7)
