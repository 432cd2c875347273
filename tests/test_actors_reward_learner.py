"""The learner of a reward model against a plain torch loop; what it judges, exports and gives a critic to
start from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

import tiny_models
from actors.config import LearnerConfig
from actors.experience import Comparisons
from actors.learner.learner import JudgeReport, UpdatePlan
from actors.learner.micro_batches import minibatches
from actors.learner.trainees.reward_model import RewardModelTrainee
from actors.models.reward_model import Preference, load_reward_model
from actors.models.tokenizer import load_tokenizer
from actors.reward.worker import ClassifierReward
from learner_helpers import (
    make_comparisons,
    make_experience,
    make_learner,
    pair,
    plan,
    rollouts_of,
    save_tiny_model,
    train_on,
)
from test_actors_learner import Oracle, assert_same, config


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def comparisons() -> pa.Table:
    return make_comparisons()


def texts_of(table: pa.Table) -> list[list[list[int]]]:
    """Of each comparison its texts as ids, ends of text included."""
    columns = zip(table["tokens"].to_pylist(), table["segment_starts"].to_pylist(), strict=True)
    return [
        [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)] for tokens, starts in columns
    ]


def oracle(path: str, settings: LearnerConfig, table: pa.Table, plan: UpdatePlan) -> Oracle:
    """One text at a time through the Hugging Face classifier, one loss a comparison, averaged over the minibatch."""
    classifier: Any = load_reward_model(path, torch.float32, seed=0).classifier
    optimizer = torch.optim.AdamW(
        classifier.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.adam_epsilon,
        weight_decay=0.0,
    )
    rankings, margins = texts_of(table), table["margin"].to_pylist()
    losses, norms = [], []
    for epoch in minibatches(
        len(table), epochs=plan.epochs, minibatches=plan.minibatches, seed=plan.seed, step=plan.step
    ):
        for rows in epoch:
            each = [
                oracle_row(
                    [classifier(input_ids=torch.tensor([text[:-1]])).logits[0, 0] for text in rankings[i]], margins[i]
                )
                for i in rows
            ]
            loss = torch.stack(each).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(classifier.parameters(), settings.max_grad_norm)))
            optimizer.step()
            losses.append(float(loss.detach()))
    return Oracle(losses, norms, {name: p.detach() for name, p in classifier.named_parameters()})


def oracle_row(rewards: list[Tensor], margin: float) -> Tensor:
    pairs = [(i, j) for i in range(len(rewards)) for j in range(i + 1, len(rewards))]
    return torch.stack(
        [torch.log1p(torch.exp(rewards[j] - rewards[i] + (margin if i == 0 else 0))) for i, j in pairs]
    ).mean()


@pytest.mark.parametrize(("stage", "ranks", "pack_tokens"), [(0, 1, 0), (2, 2, 0), (3, 2, 60), (1, 1, 60)])
def test_every_stage_rank_count_and_packing_does_what_the_plain_loop_does(
    stage: int, ranks: int, pack_tokens: int, path: str, comparisons: pa.Table
) -> None:
    settings = config(zero_stage=stage, micro_batch_size=2, pack_tokens=pack_tokens)
    want = oracle(path, settings, comparisons, plan())
    got = train_on(ranks, path, settings, [comparisons], [plan()], "reward")
    assert_same(got, want)
    assert (got.reports[0].samples, got.reports[0].action_tokens, got.reports[0].ratio_deviation) == (7, 14, 0.0)
    assert got.reports[0].statistics.keys() == {"accuracy", "margin"}


def scaled_on(texts: str | Path) -> RewardModelTrainee:
    """A reward model whose scale is set on the texts of this file; "": it is not set."""
    return RewardModelTrainee(objective=Preference(), scale_texts=str(texts))


def exported(
    rank: int, ranks: int, port: int, path: str, settings: LearnerConfig, table: pa.Table, texts: str, folder: str
) -> tuple[JudgeReport, pa.Table]:
    """What a trained learner says of the comparisons, after it has written its model."""
    learner = make_learner(path, settings, trainee=scaled_on(texts), rank=rank, ranks=ranks, port=port)
    learner.update(table, plan())
    learner.export(folder)
    return learner.judge(table), learner.infer(table)[1]


def given(tables: list[pa.Table], table: pa.Table) -> list[float]:
    """The learner's reward of every text, in the order of the table."""
    values = {
        i: row
        for part in tables
        for i, row in zip(part["sample_id"].to_pylist(), part["values"].to_pylist(), strict=True)
    }
    marks = zip(table["sample_id"].to_pylist(), table["action_mask"].to_pylist(), strict=True)
    return [value for i, mask in marks for value, marked in zip(values[i], mask, strict=True) if marked]


def judged_by(folder: Path, table: pa.Table) -> tuple[list[float], list[float]]:
    """Rewards of the texts by `ClassifierReward`, all in one right-padded batch, and by transformers' classifier alone,
    one at a time.
    """
    from transformers import AutoModelForSequenceClassification

    reward, texts = ClassifierReward(str(folder)), [text[:-1] for ranking in texts_of(table) for text in ranking]
    words = [reward.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in texts]
    assert reward.tokenizer(words)["input_ids"] == texts
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        alone = [float(classifier(input_ids=torch.tensor([ids])).logits) for ids in texts]
    return reward(words, [""] * len(words), [{}] * len(words)), alone


def test_what_is_exported_gives_the_learners_rewards(path: str, comparisons: pa.Table, tmp_path: Path) -> None:
    """A GPT-2 whose tokenizer has no padding: the end of text serves."""
    report, table = exported(0, 1, 0, path, config(zero_stage=0), comparisons, "", str(tmp_path))
    want = given([table], comparisons)
    batched, alone = judged_by(tmp_path, comparisons)
    assert batched == pytest.approx(want, abs=1e-5)
    assert alone == pytest.approx(want, abs=1e-5)
    rewards, rows = iter(want), zip(texts_of(comparisons), comparisons["margin"].to_pylist(), strict=True)
    losses = [float(oracle_row([torch.tensor(next(rewards)) for _ in ranking], margin)) for ranking, margin in rows]
    assert report.loss == pytest.approx(np.mean(losses), abs=1e-5)
    saved: Any = ClassifierReward(str(tmp_path)).model.config
    assert (saved.num_labels, saved.pad_token_id, saved.problem_type, saved.architectures) == (
        1,
        0,
        "regression",
        ["GPT2ForSequenceClassification"],
    )
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize("family", ["padded gpt2", "llama"])
def test_other_tokenizers_and_families_are_exported_as_truly(family: str, tiny_model: Path, tmp_path: Path) -> None:
    path = str(tiny_model if family == "padded gpt2" else tiny_models.save_llama(tmp_path / "lm"))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.pad_token_id is None) == (family == "llama")
    replies = [
        [tokenizer(prompt + reply)["input_ids"] for reply in (" yes", " no, never")]
        for prompt in ("Is it?", "Well", "Do you?")
    ]
    table = Comparisons.of_texts([[[*text, tokenizer.eos_token_id] for text in ranking] for ranking in replies]).table
    _, inferred = exported(0, 1, 0, path, config(), table, "", str(tmp_path / "rm"))
    batched, alone = judged_by(tmp_path / "rm", table)
    assert batched == pytest.approx(given([inferred], table), abs=1e-5)
    assert alone == pytest.approx(batched, abs=1e-5)
    assert ClassifierReward(str(tmp_path / "rm")).model.config.pad_token_id == (
        tokenizer.pad_token_id or tokenizer.eos_token_id
    )


def test_rewards_are_mean_0_and_std_1_on_given_texts_before_and_after(
    path: str, comparisons: pa.Table, tmp_path: Path
) -> None:
    """On two ranks at ZeRO 3, where no rank holds the model; judged alike by both."""
    texts = make_comparisons(9, seed=4)
    Comparisons(texts).write(tmp_path / "texts.parquet")
    begun = make_learner(path, config(), trainee=scaled_on(tmp_path / "texts.parquet")).infer(texts)[1]
    before = given([begun], texts)
    assert (np.mean(before), np.std(before)) == pytest.approx((0, 1), abs=1e-5)
    arguments = (path, config(zero_stage=3), comparisons, str(tmp_path / "texts.parquet"), str(tmp_path / "rm"))
    (first, mine), (second, others) = pair().run(exported, *arguments)
    assert (first.rows, first.loss, first.statistics) == (second.rows, second.loss, second.statistics)
    after, _ = judged_by(tmp_path / "rm", texts)
    assert (np.mean(after), np.std(after)) == pytest.approx((0, 1), abs=1e-4)
    raw, scaled = np.asarray(given([mine, others], comparisons)), np.asarray(judged_by(tmp_path / "rm", comparisons)[0])
    slope, shift = np.polyfit(raw, scaled, 1)
    assert slope > 0
    np.testing.assert_allclose(scaled, slope * raw + shift, atol=1e-4), "the same order, another scale"


def test_texts_without_a_scale_are_refused(path: str, tmp_path: Path) -> None:
    Comparisons.of_texts([[[5, 6, 0], [5, 6, 0]]]).write(tmp_path / "same.parquet")
    Comparisons.of_texts([]).write(tmp_path / "none.parquet")
    with pytest.raises(
        ValueError,
        match=r"^reward_model\.standardise: must have texts of finite and different rewards .*, got mean .* and "
        r"variance .* over .*same\.parquet",
    ):
        make_learner(path, config(), trainee=scaled_on(tmp_path / "same.parquet"))
    with pytest.raises(
        ValueError, match=r"^reward_model\.standardise: must have comparisons .*, got none in .*none\.parquet"
    ):
        make_learner(path, config(), trainee=scaled_on(tmp_path / "none.parquet"))


def test_it_learns_goes_on_from_a_commit_and_begins_from_what_it_exported(path: str, tmp_path: Path) -> None:
    table = make_comparisons(40, sizes=(2,), seed=1)
    learner = make_learner(path, config(zero_stage=1, micro_batch_size=16), trainee="reward")
    before = learner.judge(table)
    for step in range(4):
        learner.update(table, plan(step=step, epochs=3))
    after = learner.judge(table)
    assert after.statistics["accuracy"] > max(before.statistics["accuracy"], 0.9)
    assert after.loss < before.loss / 2
    name = learner.save(str(tmp_path / "commit")).file.name
    learner.export(str(tmp_path / "rm"))
    begun = make_learner(str(tmp_path / "rm"), config(), trainee="reward")
    assert begun.judge(table).loss == pytest.approx(after.loss, abs=1e-5), "a classifier's head is kept"
    begun.restore(str(tmp_path / "commit"), [name])
    assert begun.judge(table).loss == pytest.approx(after.loss, abs=1e-5)
    assert begun.save(str(tmp_path / "again")).file == learner.save(str(tmp_path / "commit")).file
    with pytest.raises(ValueError, match=r"must be a shard of the critic, got one of the reward"):
        make_learner(path, config(), trainee="critic").restore(str(tmp_path / "commit"), [name])


def test_a_critic_begins_with_the_rewards_of_a_reward_model(path: str, comparisons: pa.Table, tmp_path: Path) -> None:
    learner = make_learner(path, config(), trainee="reward")
    learner.update(comparisons, plan())
    learner.export(str(tmp_path))
    critic = make_learner(str(tmp_path), config(), trainee="critic")
    experience = make_experience(5)
    _, values = critic.infer(rollouts_of(experience))
    model = ClassifierReward(str(tmp_path)).model
    for tokens, mask, row in zip(
        *(t.to_pylist() for t in (experience["tokens"], experience["action_mask"], values["values"])), strict=True
    ):
        with torch.no_grad():
            want = [
                float(model(input_ids=torch.tensor([tokens[:t]])).logits) if chosen else 0.0
                for t, chosen in enumerate(mask)
            ]
        assert row == pytest.approx(want, abs=1e-5)
    assert critic.update(experience, plan()).updates == 4
