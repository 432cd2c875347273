"""A manager that begins as the demonstrations choose: the optimum, and the way from texts to the first head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import tiny_models
from actors.config import ManagerConfig
from actors.manager import cloning
from actors.manager.cloning import clone_head, demonstrated
from actors.manager.manager import Manager
from actors.manager.option_head import OptionHead, load_head
from actors.manager.reports import ManagerSpec
from actors.models.option_names import TRAINED_HEAD, option_token
from actors.models.option_tokens import add_option_tokens, learned_options, option_ids
from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer
from pipeline.encoding.blocks import encode_block, with_option
from pipeline.encoding.encode import demonstration_texts
from pipeline.preparation.manager_start import check_options_shown, imitate_options
from pipeline.tasks.task import Demonstration, PromptText, Split

NAMES = ("soft", "loud")


class Spoken:
    """Says in capital letters what was said to it so, and softly the rest, but for one in eight."""

    name = "spoken"
    reward = ""

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        raise NotImplementedError

    def demonstrations(self, split: Split) -> list[Demonstration]:
        found = []
        for number in range(64):
            text = f"well {number}"
            is_loud = number % 2 == 1
            option = "loud" if is_loud != (number % 8 == 0) else "soft"
            found.append(
                Demonstration(prompt=(text.upper() if is_loud else text) + option_token(option), response=" yes")
            )
        return found

    def prompts(self, split: Split) -> list[PromptText]:
        return [PromptText(text="well", metadata={})]

    def layout(self, line: str) -> str:
        return line


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model with control tokens, which it suppresses, as a run makes it."""
    add_option_tokens(str(tiny_models.save_gpt2(tmp_path / "plain")), tmp_path / "model", NAMES)
    return str(tmp_path / "model")


def test_the_head_is_at_the_optimum_of_the_ridge_regression_on_the_features_of_rollouts(model: str) -> None:
    """The gradient of a strictly convex loss vanishes in one place only; features are those of the unpadded model."""
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 250, rng.integers(1, 9)).tolist() for _ in range(70)]
    options = rng.integers(0, 3, 70).tolist()
    head = clone_head(model, contexts, options, 3)
    trunk = cloning.load_causal_lm(model, torch.float32).base_model.eval()
    with torch.no_grad():
        features = torch.stack([trunk(torch.tensor([row])).last_hidden_state[0, -1] for row in contexts])
    weight, bias = (torch.tensor(head[name]).double().requires_grad_() for name in ("policy_weight", "policy_bias"))
    normed = functional.layer_norm(features.double(), features.shape[-1:], eps=1e-5)
    loss = functional.cross_entropy(normed @ weight.T + bias, torch.tensor(options)) + 1e-3 * weight.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4 and float(bias.grad.abs().max()) < 1e-4
    again = clone_head(model, contexts, options, 3)
    assert all((head[name] == again[name]).all() for name in head), "to the bit"
    with pytest.raises(ValueError, match="options: must each be demonstrated, got none of number 3"):
        clone_head(model, contexts, options, 4)


def test_a_manager_begins_with_what_the_demonstrations_choose(model: str) -> None:
    imitate_options(model, Spoken(), NAMES)
    assert json.loads((Path(model) / "config.json").read_text())[TRAINED_HEAD] == "option-head.safetensors"
    manager = Manager(spec=ManagerSpec(width=32, config=ManagerConfig(options=NAMES), seed=0, start=model))
    manager.connect()
    head = load_head(model, 2, 32)
    assert all((manager.weights()[name] == head[name]).all() for name in head)
    tokenizer = load_tokenizer(model)
    ids = TextCodec(tokenizer).encode_prompts([one.prompt for one in Spoken().demonstrations("train")])
    shown = demonstrated(ids, option_ids(tokenizer, NAMES))
    features = cloning._features(model, [row[:-1] for row in ids]).numpy()
    chosen = OptionHead(head).logits(features).argmax(1)
    assert (chosen == shown).mean() > 0.8, "better than the half that a coin would hit"


def test_an_option_that_is_never_shown_is_told_before_anything_starts() -> None:
    check_options_shown(Spoken(), NAMES)
    with pytest.raises(
        ValueError, match=r"manager\.start: must be uniform where an option is never shown, .*option:slow"
    ):
        check_options_shown(Spoken(), (*NAMES, "slow"))


def test_fine_tuning_learns_a_control_token_with_the_reply_unless_the_model_never_says_it(
    model: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(model)
    plain = tmp_path / "knows"
    shutil.copytree(model, plain)
    (plain / "generation_config.json").unlink()  # in which the tokens are suppressed
    soft, loud = option_ids(tokenizer, NAMES)
    assert learned_options(str(plain), tokenizer) == {soft, loud}
    assert learned_options(model, tokenizer) == frozenset()
    assert with_option([1, 2, loud], [3], frozenset({loud})) == ([1, 2], [loud, 3])
    assert with_option([1, 2, loud], [3], frozenset()) == ([1, 2, loud], [3])
    assert with_option([loud], [3], frozenset({loud})) == ([loud], [3]), "something must come before it"
    texts = demonstration_texts(
        [Demonstration(prompt=f"hello{option_token('loud')}", response=" HI")], lambda prompt: [prompt[2:]]
    ).append_column("number", [[0]])
    for folder, learns in ((str(plain), True), (model, False)):
        for context in (32, 8):  # the second shortens the prompt
            [row] = encode_block(
                texts, comparisons=False, tokenizer_path=folder, context=context, shortens=True
            ).to_pylist()
            at = row["tokens"].index(loud)
            assert row["tokens"].count(loud) == 1
            assert row["action_mask"] == [place >= at + (not learns) for place in range(len(row["tokens"]))]
            assert row["truncated"] == (context == 8)
