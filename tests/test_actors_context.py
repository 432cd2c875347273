"""How long a text a model takes: the same answer for engine, learner, judge and the checks before a run, and right at
its very end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from actors.config import LearnerConfig, RolloutConfig
from actors.engine.torch_engine import TorchEngine
from actors.models.causal_lm import PolicyModel, TokenInputs, context_of, load_causal_lm
from actors.models.context import longest_text
from actors.reward.worker import ClassifierReward
from learner_helpers import TRAINEES
from test_actors_model import FAMILIES, save

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "learned": ("gpt2", FAMILIES["gpt2"], 64),
    "learned, with rows to spare": ("opt", FAMILIES["opt"] | {"max_position_embeddings": 48}, 48),
    "learned, an encoder": ("bert", TINY | {"max_position_embeddings": 512}, 512),
    "learned after padding": ("roberta", TINY | {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
    "learned after padding, of another family": (
        "mpnet",
        TINY | {"max_position_embeddings": 514, "pad_token_id": 1},
        512,
    ),
    "rotary": ("llama", FAMILIES["llama"] | {"max_position_embeddings": 128}, 128),
    "rotary in a window": (
        "mistral",
        FAMILIES["mistral"] | {"max_position_embeddings": 128, "sliding_window": 32},
        128,
    ),
    "rotary that changes": (
        "phi3",
        FAMILIES["llama"]
        | {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE,
            "pad_token_id": 0,
        },
        40,
    ),
    "alibi": ("bloom", FAMILIES["bloom"], None),
    "a state": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, None),
}


@pytest.mark.parametrize(("family", "settings", "longest"), CASES.values(), ids=CASES)
def test_the_longest_text_of_each_kind_of_positions(family: str, settings: dict[str, Any], longest: int | None) -> None:
    from transformers import CONFIG_MAPPING

    assert longest_text(CONFIG_MAPPING[family](**settings)) == longest


def test_everyone_gives_the_same_answer(tmp_path: Path) -> None:
    path = save("mistral", tmp_path, max_position_embeddings=128, sliding_window=32)
    tiny_models.byte_tokenizer().save_pretrained(tmp_path)
    assert context_of(path) == 128
    assert TorchEngine(path, RolloutConfig(), torch.device("cpu")).context == 128
    assert TRAINEES["policy"].load(path, LearnerConfig(), seed=0)[1] == 128


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_a_policy_that_does_not_say_is_refused_in_a_line(family: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[family](**TINY).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"^model\.path: must have max_position_embeddings in its config, got .* \(family {family}\); choose "
        r"[^\n]*$",
    ):
        context_of(str(tmp_path))


def judge(folder: Path, family: str, **settings: Any) -> ClassifierReward:
    """A classifier of bytes with one output, which reads `<s>` and `</s>` around every text."""
    from tokenizers import processors
    from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    template = {
        "single": "<s> $A <|endoftext|>",
        "special_tokens": [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|endoftext|>")],
    }
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**template)
    tokenizer.save_pretrained(folder)
    config = CONFIG_MAPPING[family](
        **TINY | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | settings
    )
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return ClassifierReward(str(folder))


@pytest.mark.parametrize("length", [20, 21, 22, 23, 24, 60])
def test_a_roberta_scores_at_its_end_and_beyond(length: int, tmp_path: Path) -> None:
    """Padding is number 258, so 283 positions have place for 283 - 259 = 24 tokens: 22 bytes between two
    special ones.
    """
    reward = judge(tmp_path, "roberta", max_position_embeddings=283)
    assert (reward.tokenizer.pad_token_id, longest_text(reward.model.config)) == (258, 24)
    text = "".join(chr(97 + number % 26) for number in range(length))
    assert reward([text], ["!"], [{}]) == pytest.approx(reward([""], [(text + "!")[-22:]], [{}]), rel=1e-5)
    together = reward([text, ""], ["!", "short"], [{}] * 2)
    assert together[1] == pytest.approx(reward([""], ["short"], [{}])[0], rel=1e-5)


def test_a_judge_without_an_end_of_its_own_reads_everything(tmp_path: Path) -> None:
    reward = judge(tmp_path, "bloom", n_layer=1, n_head=2)
    assert reward(["z" + "a" * 300], ["!"], [{}]) != reward(["a" * 301], ["!"], [{}])


def test_a_learner_sees_a_sliding_window_too(tmp_path: Path) -> None:
    """What is 32 tokens back is not seen by one layer, so the last log-probs are those of the text without its
    beginning.
    """
    path = save("mistral", tmp_path, max_position_embeddings=128, sliding_window=8, num_hidden_layers=1)
    model = PolicyModel(load_causal_lm(path, torch.float32), 1.0)
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[1, 20:] = ids[0, 20:]
    states = torch.tensor([38, 40 + 38])
    with torch.no_grad():
        logprobs, _ = model(TokenInputs(input_ids=ids, states=states, targets=ids[:, 39]))
    assert float(logprobs[0]) == pytest.approx(float(logprobs[1]), abs=1e-5)
    assert not torch.equal(ids[0], ids[1])
