"""Suppressed tokens are never generated, and everybody who computes the policy's distribution agrees on that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from actors.config import RolloutConfig, SamplingConfig
from actors.engine.protocol import Request
from actors.engine.torch_engine import TorchEngine
from actors.models.causal_lm import PolicyModel, TokenInputs, check_causal_lm, load_causal_lm
from actors.models.export import save_model
from actors.models.suppressed import NEVER, suppress, suppressed_tokens
from actors.models.tokenizer import load_tokenizer
from actors.models.usage import not_followed

NEVER_SAID = list(range(32, 128))
MODELS = {"gpt2": tiny_models.save_gpt2, "llama": tiny_models.save_llama}


def suppressing(folder: Path, tokens: Any, family: str = "gpt2", **settings: Any) -> str:
    """A tiny model whose folder suppresses these tokens."""
    file = MODELS[family](folder, **settings) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"suppress_tokens": tokens}))
    return str(folder)


def generate(path: str, sampling: SamplingConfig) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(prompt, tokens, log-probs) of each sample."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size=int(rng.integers(1, 20))).astype(np.int32) for _ in range(21)]
    requests = [Request(sample_id=i, group_id=i, prompt=prompt) for i, prompt in enumerate(prompts)]
    engine = TorchEngine(path, RolloutConfig(slots=8), torch.device("cpu"))
    completions = engine.generate(requests, sampling, seed=3)
    return [(prompt, c.tokens, c.logprobs) for prompt, c in zip(prompts, completions, strict=True)]


def inputs_of(prompt: np.ndarray, tokens: np.ndarray) -> TokenInputs:
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
    targets = ids[len(prompt) :]
    states = torch.arange(len(prompt) - 1, len(ids) - 1)
    return TokenInputs(input_ids=ids[None], states=states, targets=targets)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampled_log_probs_are_those_of_the_learner_and_of_the_distribution_without_the_tokens(
    family: str, temperature: float, tmp_path: Path
) -> None:
    path = suppressing(tmp_path, NEVER_SAID, family)
    causal_lm = load_causal_lm(path, torch.float32)
    policy = PolicyModel(causal_lm, temperature)
    kept = torch.tensor([token for token in range(tiny_models.WORDS) if token not in NEVER_SAID])
    for prompt, tokens, sampled in generate(path, SamplingConfig(max_new_tokens=12, temperature=temperature)):
        assert not set(tokens.tolist()) & set(NEVER_SAID)
        inputs = inputs_of(prompt, tokens)
        with torch.no_grad():
            logprobs, entropy = policy(inputs, entropy="value")
            logits = causal_lm(inputs.input_ids).logits[0, inputs.states][:, kept] / temperature
        of_kept = torch.log_softmax(logits, -1)
        wanted = of_kept.gather(-1, torch.searchsorted(kept, inputs.targets)[:, None])[:, 0]
        np.testing.assert_allclose(sampled, logprobs, atol=2e-5)
        np.testing.assert_allclose(logprobs, wanted, atol=2e-5)
        np.testing.assert_allclose(entropy, -(of_kept.exp() * of_kept).sum(-1), atol=2e-5)


def test_without_the_field_nothing_changes(tmp_path: Path) -> None:
    plain, empty = str(tiny_models.save_gpt2(tmp_path / "plain")), suppressing(tmp_path / "empty", [])
    for path in (plain, empty):
        assert suppressed_tokens(load_causal_lm(path, torch.float32)) is None
    logits = torch.randn(2, 5)
    assert suppress(logits, None) is logits
    policies = [PolicyModel(load_causal_lm(path, torch.float32), 1.0) for path in (plain, empty)]
    assert list(policies[0].state_dict()) == list(policies[1].state_dict())
    assert not list(policies[0].buffers())


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_entropy_and_gradients_are_finite_and_suppressed_tokens_get_none(scale: float, tmp_path: Path) -> None:
    """scale: of the loss; a gradient as large as the suppressed logits would overflow with it."""
    path = suppressing(tmp_path, NEVER_SAID, "llama")
    policy = PolicyModel(load_causal_lm(path, torch.float32), 0.9)
    prompt, tokens = np.arange(5), np.array([200, 7, 201, 9])
    logprobs, entropy = policy(inputs_of(prompt, tokens), entropy="gradient")
    assert torch.isfinite(entropy).all() and (entropy > 0).all()
    (scale * (logprobs.sum() + entropy.sum())).backward()
    gradient = policy.head.weight.grad
    assert torch.isfinite(gradient).all()
    assert (gradient[NEVER_SAID] == 0).all()
    assert gradient.abs().sum(1).gt(0).sum() == tiny_models.WORDS - len(NEVER_SAID)


def test_suppressed_tokens_are_exported_and_generate_follows_them(tmp_path: Path) -> None:
    path = suppressing(tmp_path / "model", NEVER_SAID)
    model: Any = load_causal_lm(path, torch.float32)
    save_model(model, load_tokenizer(path), tmp_path / "policy")
    exported: Any = load_causal_lm(str(tmp_path / "policy"), torch.float32)
    assert exported.generation_config.suppress_tokens == NEVER_SAID
    for prompt, tokens, _ in generate(str(tmp_path / "policy"), SamplingConfig(max_new_tokens=12, temperature=0)):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        found = exported.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        np.testing.assert_array_equal(found[0, len(prompt) :], tokens)
    assert not_followed(path) == []


@pytest.mark.parametrize("top", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 250}, {"top_p": 0.999, "temperature": 0.01}])
def test_top_k_and_top_p_choose_among_the_other_tokens(top: dict[str, Any], tmp_path: Path) -> None:
    for _, tokens, logprobs in generate(suppressing(tmp_path, NEVER_SAID), SamplingConfig(max_new_tokens=12, **top)):
        assert not set(tokens.tolist()) & set(NEVER_SAID)
        assert np.isfinite(logprobs).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 257], r"got 257 in '.*', whose tokens are 0 to 256; take it off the list"),
        ([-1], r"got -1 in "),
        (["a"], r"got 'a' in "),
        ([True], r"got True in "),
        ([5, 256], r"got 256 in '.*', which ends a reply; take it off the list"),
    ],
)
def test_tokens_that_cannot_be_suppressed_are_refused_by_name(tokens: Any, message: str, tmp_path: Path) -> None:
    path = suppressing(tmp_path, tokens)
    with pytest.raises(ValueError, match=rf"model.path: must have tokens that do not end a reply .*{message}"):
        load_causal_lm(path, torch.float32)
    with pytest.raises(ValueError, match=rf"evaluation.model: must have tokens that do not end a reply .*{message}"):
        check_causal_lm(path, "evaluation.model")


def test_an_end_of_the_tokenizer_alone_cannot_be_suppressed(tmp_path: Path) -> None:
    path = suppressing(tmp_path, [256])
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 5}))
    with pytest.raises(ValueError, match="got 256 in "):
        load_causal_lm(path, torch.float32)


def test_a_suppressed_token_cannot_be_learned(tmp_path: Path) -> None:
    policy = PolicyModel(load_causal_lm(suppressing(tmp_path, [40]), torch.float32), 1.0)
    with pytest.raises(ValueError, match="no reply with a token that the model suppresses, got token 40"):
        policy(inputs_of(np.arange(5), np.array([200, 40])))
    policy(inputs_of(np.array([40]), np.array([200])))  # in a prompt it may be


def test_it_is_the_most_negative_finite_number() -> None:
    logits = torch.tensor([[1.0, torch.inf, torch.nan, 2.0]])
    assert suppress(logits, torch.tensor([1, 2])).tolist() == [[1.0, NEVER, NEVER, 2.0]]
    assert np.finfo(np.float32).min == NEVER
