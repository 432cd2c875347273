"""The loss of comparisons by hand, and the reward model's head: drawn, kept, refused, brought to scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from actors.models.causal_lm import TokenInputs
from actors.models.reward_model import Preference, RewardModel, load_classifier, load_reward_model
from actors.objective import ComparisonBatch
from test_actors_model import save

LOG2 = math.log(2)


def compared(*sizes: int, margin: list[float] | None = None) -> ComparisonBatch:
    row = [i for i, size in enumerate(sizes) for _ in range(size)]
    return ComparisonBatch(row=torch.tensor(row), rows=len(sizes), margin=torch.tensor(margin or [0.0] * len(sizes)))


def loss_of(rewards: list[float] | Tensor, batch: ComparisonBatch) -> list[float]:
    return Preference().reward_loss(torch.as_tensor(rewards), batch)[0].tolist()  # type: ignore[no-any-return]


def test_pairs_by_hand() -> None:
    assert loss_of([1.0, 0.0], compared(2)) == pytest.approx([0.3132617]), "log(1 + 1/e)"
    assert loss_of([0.0, 0.0], compared(2)) == pytest.approx([LOG2])
    assert loss_of([1.0, 0.0], compared(2, margin=[1.0])) == pytest.approx([LOG2]), (
        "the margin is what is asked of the difference"
    )
    assert loss_of([0.0, 1.0], compared(2)) == pytest.approx([1.3132617])
    assert loss_of([1.0, 0.0, 5.0, 5.0, 0.0, 1.0], compared(2, 2, 2)) == pytest.approx([0.3132617, LOG2, 1.3132617])


def test_a_ranking_is_the_mean_of_its_pairs() -> None:
    one, two = 0.3132617, math.log1p(math.exp(-2))
    assert loss_of([2.0, 1.0, 0.0], compared(3)) == pytest.approx([(one + two + one) / 3])
    assert loss_of([2.0, 1.0, 0.0], compared(3, margin=[1.0])) == pytest.approx([(LOG2 + one + one) / 3]), (
        "of the best's two pairs alone"
    )
    mixed = loss_of([1.0, 0.0, 2.0, 1.0, 0.0], compared(2, 3))
    assert mixed == pytest.approx([one, (one + two + one) / 3]), "a ranking of three counts as much as a pair"


def test_far_apart_rewards_neither_overflow_nor_vanish() -> None:
    rewards = torch.tensor([-1e4, 1e4, 1e4, -1e4], requires_grad=True)
    loss, _ = Preference().reward_loss(rewards, compared(2, 2))
    assert loss.tolist() == [2e4, 0.0]
    loss.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_the_gradient_by_finite_differences() -> None:
    batch = compared(2, 4, 3, margin=[0.3, -0.2, 0.0])
    batch = ComparisonBatch(row=batch.row, rows=batch.rows, margin=batch.margin.double())
    rewards = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: Preference().reward_loss(r, batch)[0], (rewards,))


def test_only_differences_matter_and_only_in_order() -> None:
    rewards, batch = torch.tensor([0.3, -1.0, 2.0]), compared(3)
    assert loss_of(rewards + 7, batch) == pytest.approx(loss_of(rewards, batch), abs=1e-6)
    assert loss_of(rewards[[0, 2, 1]], batch) != pytest.approx(loss_of(rewards, batch), abs=0.1)
    assert (
        min(
            loss_of(rewards[list(order)], batch)[0] for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 1, 0)]
        )
        > loss_of(rewards[[2, 0, 1]], batch)[0]
    )


def test_statistics_by_hand() -> None:
    _, found = Preference().reward_loss(
        torch.tensor([1.0, 0.0, 0.0, 2.0, 3.0, 3.0, 1.0, 1.0, 0.0]), compared(2, 2, 2, 3)
    )
    assert found["accuracy"].tolist() == pytest.approx([1.0, 0.0, 0.5, (0.5 + 1 + 1) / 3]), "a tie is half right"
    assert found["margin"].tolist() == pytest.approx([1.0, -2.0, 0.0, 2 / 3])


def test_a_new_head_is_drawn_by_the_seed_alone(tmp_path: Path) -> None:
    path = str(tiny_models.save_gpt2(tmp_path, width=512))
    torch.manual_seed(1)
    first = load_reward_model(path, torch.float32, seed=5).head.weight
    torch.manual_seed(2)
    assert torch.equal(first, load_reward_model(path, torch.float32, seed=5).head.weight)
    assert not torch.equal(first, load_reward_model(path, torch.float32, seed=6).head.weight)
    drawn = first.detach() * math.sqrt(512 + 1)
    assert float(drawn.std()) == pytest.approx(1, abs=0.1)
    assert abs(float(drawn.mean())) < 0.15


def test_a_classifiers_head_is_kept(tmp_path: Path) -> None:
    model = load_reward_model(str(tiny_models.save_llama(tmp_path / "lm")), torch.float32, seed=5)
    model.classifier.save_pretrained(tmp_path / "rm")
    again = load_reward_model(str(tmp_path / "rm"), torch.float32, seed=6)
    assert torch.equal(again.head.weight, model.head.weight)
    assert not again.classifier.training


def rewards_of(model: RewardModel, ids: Tensor) -> Tensor:
    states = torch.arange(ids.numel())
    return model(TokenInputs(input_ids=ids, states=states, targets=states)).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "shifted"),
    [("gpt2", True), ("opt", True), ("falcon", True), ("llama", False), ("qwen2", False), ("mistral", False)],
)
def test_rewards_are_brought_to_scale_in_the_weights(family: str, shifted: bool, tmp_path: Path) -> None:
    model = load_reward_model(save(family, tmp_path), torch.float32, seed=0)
    ids = torch.arange(30).reshape(5, 6)
    before = rewards_of(model, ids)
    mean, std = float(before.mean()), float(before.std(correction=0))
    model.standardise(mean, std)
    torch.testing.assert_close(rewards_of(model, ids), (before - mean * shifted) / std, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "why"), [("bert", "whose head has a bias"), ("bloom", None)])
def test_a_family_whose_classifier_is_another_is_refused_by_name(family: str, why: str | None, tmp_path: Path) -> None:
    path = save(family, tmp_path)
    why = rf".*\(family bert\), {why}; choose a model" if why else r"runs with sdpa attention, got .*Bloom"
    with pytest.raises(ValueError, match=rf"^model\.path: must be .*{why}"):
        load_classifier(path, torch.float32)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    path = tiny_models.save_gpt2(tmp_path / "lm")
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).save_pretrained(tmp_path / "rm")
    with pytest.raises(
        ValueError, match=r"^model\.path: must be .*, got .*: it has 3 labels; train it with num_labels=1"
    ):
        load_classifier(str(tmp_path / "rm"), torch.float32)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_models.save_gpt2(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors.pop("transformer.h.1.ln_2.weight")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack 'transformer\.h\.1\.ln_2\.weight'"):
        load_classifier(str(path), torch.float32)


def test_a_logit_that_is_not_the_heads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2ForSequenceClassification

    inner = GPT2ForSequenceClassification.forward

    def capped(self: Any, *arguments: Any, **options: Any) -> Any:
        found = inner(self, *arguments, **options)
        found.logits = torch.tanh(found.logits)
        return found

    monkeypatch.setattr(GPT2ForSequenceClassification, "forward", capped)
    with pytest.raises(ValueError, match=r"\(family gpt2\), whose logit differs from that by"):
        load_classifier(str(tiny_models.save_gpt2(tmp_path)), torch.float32)
