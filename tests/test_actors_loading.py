"""Weights are the file's: real files with one thing wrong each are refused by name, by every role that loads, and what
only looks wrong is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_models
from actors.config import LearnerConfig, ReferenceConfig, RolloutConfig
from actors.engine.torch_engine import TorchEngine
from actors.models.causal_lm import check_causal_lm, check_vocabulary, load_causal_lm
from actors.models.export import save_model
from actors.models.loading import check_names, load_exactly
from actors.models.reward_model import head_of, load_classifier, load_reward_model
from actors.models.tokenizer import load_tokenizer
from actors.reference import ReferenceWorker
from actors.reward.worker import ClassifierReward, check_classifier
from learner_helpers import TRAINEES

Weights = dict[str, Tensor]
RULE = "model.path: must be a model"
NORM = "transformer.ln_f.bias"


def rewritten(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """The folder, its weights changed."""
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})
    return folder


def gpt2(folder: Path, change: Callable[[Weights], Weights] = dict) -> str:
    return str(rewritten(tiny_models.save_gpt2(folder), change))


def classifier(folder: Path, change: Callable[[Weights], Weights] = dict) -> Path:
    """A GPT-2 with one output and a tokenizer."""
    load_reward_model(str(tiny_models.save_gpt2(folder)), torch.float32, seed=1).save(folder, str(folder), {})
    return rewritten(folder, change)


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new, 1): tensor for name, tensor in weights.items()}


def wrapped(weights: Weights) -> Weights:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def without_norm(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != NORM}


WRONG: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a wrapper's prefix": (
        wrapped,
        "its weights lack 'lm_head.weight' and 28 more; its weights have 'module.transformer.h.0.attn.c_attn.weight' "
        "and 25 more, for which the model has no "
        "place; save the model without the wrapper that put 'module.' before every name",
    ),
    "one is missing": (
        without_norm,
        f"its weights lack {NORM!r}; copy it again, or save it as the class that its config.json names",
    ),
    "a value head": (
        lambda weights: weights | {"v_head.summary.weight": torch.ones(1, 32)},
        "its weights have 'v_head.summary.weight', for which the model",
    ),
    "another shape": (
        lambda weights: weights | {NORM: torch.ones(5)},
        f"{NORM!r} has shape (5,) in its file and (32,) in the model",
    ),
    "another name": (
        renamed("ln_f", "norm"),
        "its weights lack 'transformer.ln_f.bias' and 1 more; its weights have 'transformer.norm.bias' and 1 more",
    ),
}


@pytest.mark.parametrize(("change", "problem"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_not_the_models_is_refused_by_name_whether_it_is_loaded_or_only_looked_at(
    change: Callable[[Weights], Weights], problem: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = gpt2(tmp_path, change)
    for look in (check_names, load_exactly):
        with pytest.raises(ValueError, match=r"^model\.path: must be a model, got ") as refused:
            look(AutoModelForCausalLM, path, RULE)  # type: ignore[operator]
        assert problem in str(refused.value)
        assert "\n" not in str(refused.value)


def buffers(weights: Weights) -> Weights:
    """What GPT-2's files on the hub hold besides: causal masks."""
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 96, 96) for layer in range(2)}
    return weights | masks | {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}


RIGHT: dict[str, Callable[[Weights], Weights]] = {
    "as it was saved": dict,
    "no prefix, as on the hub": lambda weights: renamed("transformer.", "")(buffers(weights)),
    "masks": buffers,
    "the tied head, too": lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()},
}


@pytest.mark.parametrize("change", RIGHT.values(), ids=RIGHT)
def test_what_is_the_same_model_in_other_words_is_taken(change: Callable[[Weights], Weights], tmp_path: Path) -> None:
    want = load_causal_lm(gpt2(tmp_path / "plain"), torch.float32)
    path = gpt2(tmp_path / "other", change)
    check_causal_lm(path)
    model: Any = load_causal_lm(path, torch.float32)
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in want.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_frequencies_of_an_old_llama_are_no_weights_and_a_head_that_is_missing_is_one(tmp_path: Path) -> None:
    old = rewritten(
        tiny_models.save_llama(tmp_path / "old"),
        lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    load_causal_lm(str(old), torch.float32)
    headless = rewritten(
        tiny_models.save_llama(tmp_path / "headless"),
        lambda w: {name: t for name, t in w.items() if name != "lm_head.weight"},
    )
    for load in (check_causal_lm, lambda path: load_causal_lm(path, torch.float32)):
        with pytest.raises(ValueError, match=r"its weights lack 'lm_head\.weight'"):
            load(str(headless))


def test_a_head_of_its_own_is_kept_where_the_config_says_tied(tmp_path: Path) -> None:
    path = gpt2(tmp_path / "one", lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1})
    model: Any = load_causal_lm(path, torch.float32)
    save_model(model, load_tokenizer(path), tmp_path / "two")
    for again in (model, load_causal_lm(str(tmp_path / "two"), torch.float32)):
        torch.testing.assert_close(again.lm_head.weight, again.transformer.wte.weight + 1)
        assert not again.config.tie_word_embeddings


LEARNER = LearnerConfig()
ROLES: dict[str, Callable[[str], object]] = {
    "rollout": lambda path: TorchEngine(path, RolloutConfig(), torch.device("cpu")),
    "reference": lambda path: ReferenceWorker(path=path, config=ReferenceConfig(), temperature=1.0),
    "policy": lambda path: TRAINEES["policy"].load(path, LEARNER, seed=0),
    "critic": lambda path: TRAINEES["critic"].load(path, LEARNER, seed=0),
    "reward model from a causal LM": lambda path: TRAINEES["reward"].load(path, LEARNER, seed=0),
    "the check before a run": check_causal_lm,
}
JUDGES: dict[str, Callable[[str], object]] = {
    "judge": ClassifierReward,
    "critic from a reward model": lambda path: TRAINEES["critic"].load(path, LEARNER, seed=0),
    "reward model from a classifier": lambda path: TRAINEES["reward"].load(path, LEARNER, seed=0),
    "the check before a run": check_classifier,
}


@pytest.mark.parametrize("load", ROLES.values(), ids=ROLES)
def test_every_role_refuses(load: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^model\.path: must be .* its weights lack {NORM!r}; copy it again"):
        load(gpt2(tmp_path, without_norm))


@pytest.mark.parametrize("load", JUDGES.values(), ids=JUDGES)
def test_a_head_of_another_name_is_no_head(load: Callable[[str], object], tmp_path: Path) -> None:
    path = str(classifier(tmp_path, renamed("score.", "value_head.")))
    with pytest.raises(
        ValueError,
        match=r"^(reward\.model|model\.path): must be .* its weights lack 'score\.weight'; its weights have "
        r"'value_head\.weight', for",
    ):
        load(path)


def test_a_head_that_the_file_has_is_never_drawn_anew(tmp_path: Path) -> None:
    """Though its config does not say that it is a classifier."""
    folder = classifier(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    want = load_file(folder / "model.safetensors")["score.weight"]
    assert torch.equal(load_reward_model(str(folder), torch.float32, seed=9).head.weight, want)


def test_an_output_head_of_its_own_has_no_place_in_a_reward_model(tmp_path: Path) -> None:
    path = tiny_models.save_llama(tmp_path)
    assert head_of(load_classifier(str(path), torch.float32)).weight.shape == (1, 32)
    rewritten(path, lambda weights: weights | {"lm_tail.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"its weights have 'lm_tail\.weight', for which the model has no place"):
        load_classifier(str(path), torch.float32)


def test_quantised_weights_and_adapters_are_refused(tmp_path: Path) -> None:
    path = Path(gpt2(tmp_path))
    (path / "adapter_config.json").write_text("{}")
    for load in (check_causal_lm, lambda path: load_causal_lm(path, torch.float32)):
        with pytest.raises(
            ValueError,
            match=r"it has an adapter beside it \(adapter_config\.json\), which would be ignored; merge the two",
        ):
            load(str(path))
    (path / "adapter_config.json").unlink()
    config = json.loads((path / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (path / "config.json").write_text(json.dumps(config))
    for load in (check_causal_lm, lambda path: load_causal_lm(path, torch.float32)):
        with pytest.raises(
            ValueError,
            match=r"its weights are quantised \(gptq\), which cannot be trained; take the ones it was made from",
        ):
            load(str(path))


def test_an_id_beyond_the_embeddings_is_refused_though_there_are_fewer_tokens(tmp_path: Path) -> None:
    """A tokenizer of 258 tokens, one of which has the number 300."""
    folder = classifier(tmp_path)
    inner = json.loads((folder / "tokenizer.json").read_text())
    inner["model"]["vocab"]["<far>"] = 300
    inner["added_tokens"].append(
        {
            "id": 300,
            "content": "<far>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.encode("<far>", add_special_tokens=False) == [300]
    message = (
        r"must have at least as many embeddings as its tokenizer has tokens, got 257 and 301 in .* \('<far>' is number "
        r"300\); give it its own"
    )
    with pytest.raises(ValueError, match=rf"^model\.path: {message}"):
        check_vocabulary(str(folder), tokenizer, "model.path")
    with pytest.raises(ValueError, match=rf"^reward\.model: {message}"):
        ClassifierReward(str(folder))
