"""The learner with objectives that look at single tokens and at whole rollouts: one global gradient, however rows fall
on ranks and micro-batches.

The oracle is a plain torch loop that knows nothing of padding, ranks, micro-batches or DeepSpeed: one row at a time
through the Hugging Face model, and one loss over all of them, which tests/test_pipeline_losses.py holds against a slow
loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from actors.config import LearnerConfig
from actors.learner.learner import Learner, UpdatePlan
from actors.learner.trainees.policy import PolicyTrainee
from actors.models.causal_lm import PolicyModel, TokenInputs, load_causal_lm
from actors.objective import ActionTokens
from learner_helpers import (
    STAGES,
    Trained,
    make_experience,
    make_learner,
    pair,
    plan,
    replace,
    save_tiny_model,
    weights_of,
)
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce

RATE = 1e-3
# of a weight; float32 sums in another order, divided by Adam's epsilon where the true gradient is zero
TOLERANCE = RATE / 500
TEMPERATURE = 0.9
ROWS = 11
SIZES = (1, 3, ROWS)

OBJECTIVES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "token ratio": (PPO(), {"aggregation": "token_mean"}),
    "sequence ratio": (GRPO(ratio="sequence", clip_low=0.02, clip_high=0.05), {"aggregation": "sequence_mean"}),
    "sequence masking": (
        PPO(mask_low=0.9, mask_high=1.1, decoupled=True, importance_cap=1.2),
        {"aggregation": "token_mean"},
    ),
    "constant": (GRPO(std=False, dual_clip=3.0), {"aggregation": "constant", "constant": 14}),
    "bonus and penalty": (
        Reinforce(entropy_coef=0.5, kl_coef=0.2, kl_in="loss", kl_estimator="k3"),
        {"entropy_gradient": True, "kl_coef": 0.7},
    ),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def experience(path: str) -> pa.Table:
    """11 rollouts; the learner's own log-probs are proximal, and the sampler's differ from them, rollout by rollout."""
    table = make_experience(11)
    own = learner_of(path, PPO(), LearnerConfig(), 0, 1, 0).infer(table.select(rollout_names()))[1]
    proximal = dict(zip(own["sample_id"].to_pylist(), own["logprobs"].to_pylist(), strict=True))
    table = make_experience(11, proximal=proximal)
    apart = np.random.default_rng(3).normal(0, 0.15, 11)
    sampled = [
        [x + shift if x else 0.0 for x in row]
        for row, shift in zip(table["proximal_logprobs"].to_pylist(), apart, strict=True)
    ]
    return replace(table, "logprobs", sampled)


def rollout_names() -> list[str]:
    from actors.experience import Rollouts

    return list(Rollouts.schema.names)


def learner_of(path: str, objective: Algorithm, config: LearnerConfig, rank: int, ranks: int, port: int) -> Learner:
    trainee = PolicyTrainee(objective=objective, temperature=TEMPERATURE)
    return make_learner(path, config, trainee=trainee, rank=rank, ranks=ranks, port=port)


def train(
    rank: int,
    ranks: int,
    port: int,
    path: str,
    objective: Algorithm,
    config: LearnerConfig,
    table: pa.Table,
    how: UpdatePlan,
) -> Trained:
    learner = learner_of(path, objective, config, rank, ranks, port)
    report = learner.update(table, how)
    return Trained(reports=[report], weights=weights_of(learner) or {})


def run(ranks: int, *arguments: Any) -> Trained:
    if ranks == 1:
        return train(0, 1, 0, *arguments)
    first, second = pair().run(train, *arguments)
    assert first.reports[0].statistics == second.reports[0].statistics
    return first  # type: ignore[no-any-return]


def drift(table: pa.Table) -> list[list[float]]:
    """log of proximal over sampled at each action token of each rollout."""
    rows = zip(table["proximal_logprobs"].to_pylist(), table["logprobs"].to_pylist(), strict=True)
    return [[p - s for p, s in zip(*row, strict=True) if p] for row in rows]


def config(**options: Any) -> LearnerConfig:
    return LearnerConfig(learning_rate=RATE, schedule="constant", max_grad_norm=0.5, adam_epsilon=1e-5, **options)


def course(epochs: int = 2, **options: Any) -> UpdatePlan:
    return dataclasses.replace(plan(epochs=epochs, minibatches=1), **options)


class Course(NamedTuple):
    """What two updates with one objective did."""

    loss: float  # mean over the updates, as is
    grad_norm: float  # before clipping
    weights: dict[str, Tensor]


def plain_loop(path: str, objective: Algorithm, table: pa.Table, how: UpdatePlan) -> Course:
    """The definition of what the learner must do, one minibatch an epoch."""
    model, settings = load_causal_lm(path, torch.float32), config()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=settings.betas, eps=settings.adam_epsilon, weight_decay=0.0
    )
    rows = table.to_pylist()
    counts = torch.tensor([sum(row["action_mask"]) for row in rows])
    row = torch.arange(len(rows)).repeat_interleave(counts)
    names = ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns")
    columns = {
        name: torch.tensor([x for r in rows for x, chosen in zip(r[name], r["action_mask"], strict=True) if chosen])
        for name in names
    }
    batch = ActionTokens(row=row, rows=len(rows), kl_coef=how.kl_coef, **columns)
    weights = {
        "token_mean": 1 / len(row),
        "sequence_mean": 1 / (len(rows) * counts[row]),
        "constant": 1 / (len(rows) * how.constant),
    }[how.aggregation]
    losses, norms = [], []
    for _ in range(how.epochs):
        new, entropy = (
            torch.cat(column)
            for column in zip(*(plain_row(model, r["tokens"], r["action_mask"]) for r in rows), strict=True)
        )
        loss = (
            weights * objective.policy_loss(new, entropy if how.entropy_gradient else entropy.detach(), batch)[0]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return Course(np.mean(losses), np.mean(norms), {name: p.detach() for name, p in model.named_parameters()})


def plain_row(model: nn.Module, tokens: list[int], chosen: list[bool]) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy at each action token of one rollout."""
    ids = torch.tensor(tokens)
    logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0] / TEMPERATURE, -1)[:-1][torch.tensor(chosen)[1:]]
    return logprobs.gather(-1, ids[torch.tensor(chosen)][:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


Cut = tuple[str, int, str]  # objective, micro-batch size, order of rows


def cuts(
    rank: int, ranks: int, port: int, path: str, stage: int, orders: dict[str, pa.Table], start: str
) -> dict[Cut, Course]:
    """Every objective with every micro-batch size and order of rows, each from the commit `start`; weights on rank 0
    only.
    """
    out = {}
    for size in SIZES:
        learner = learner_of(path, PPO(), config(zero_stage=stage, micro_batch_size=size), rank, ranks, port)
        for (name, (objective, options)), (order, table) in itertools.product(OBJECTIVES.items(), orders.items()):
            learner.restore(start, ["rank-0.safetensors"])
            learner.trainee = PolicyTrainee(objective=objective, temperature=TEMPERATURE)
            report = learner.update(table, course(**options))
            assert (report.updates, report.skipped) == (2, 0)
            out[name, size, order] = Course(report.loss, report.grad_norm, weights_of(learner) or {})
    return out


@pytest.fixture(scope="module")
def wanted(path: str, experience: pa.Table) -> dict[str, Course]:
    return {
        name: plain_loop(path, objective, experience, course(**options))
        for name, (objective, options) in OBJECTIVES.items()
    }


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        pytest.param(stage, ranks, marks=[] if (stage, ranks) == (1, 2) else pytest.mark.slow)
        for stage in STAGES
        for ranks in (1, 2)
    ],
)
def test_the_gradient_is_the_plain_loops_for_every_cut(
    stage: int, ranks: int, path: str, experience: pa.Table, wanted: dict[str, Course], tmp_path: Path
) -> None:
    """ZeRO {0, 1, 2, 3} x ranks {1, 2} x micro-batches {1, 3, all} x rows as given and shuffled, hence beside other
    rows, under other padding.
    """
    orders = {"given": experience, "shuffled": experience.take(np.random.default_rng(1).permutation(ROWS))}
    learner_of(path, PPO(), config(), 0, 1, 0).save(str(tmp_path))
    arguments = (path, stage, orders, str(tmp_path))
    results = [cuts(0, 1, 0, *arguments)] if ranks == 1 else pair().run(cuts, *arguments)
    assert len(results[0]) == len(OBJECTIVES) * len(SIZES) * len(orders)
    assert len({repr({cut: (got.loss, got.grad_norm) for cut, got in result.items()}) for result in results}) == 1, (
        "all ranks report the same"
    )
    for (name, size, order), got in results[0].items():
        want, where = wanted[name], f"{name}, micro-batches of {size}, rows as {order}"
        assert got.loss == pytest.approx(want.loss, rel=1e-4, abs=1e-5), where
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4), where
        assert got.weights.keys() == want.weights.keys()
        for weight, tensor in got.weights.items():
            assert float((tensor - want.weights[weight]).abs().max()) < TOLERANCE, f"{where}: {weight}"


def test_the_objectives_differ_and_clipping_is_at_work_in_that_test(wanted: dict[str, Course]) -> None:
    norms = sorted(want.grad_norm for want in wanted.values())
    assert norms[0] > config().max_grad_norm
    assert all(later > 1.01 * earlier for earlier, later in itertools.pairwise(norms))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_statistics_are_over_all_ranks_and_micro_batches(name: str, path: str, experience: pa.Table) -> None:
    objective, options = OBJECTIVES[name]
    whole, cut = (
        run(ranks, path, objective, config(zero_stage=1, micro_batch_size=size), experience, course(**options))
        .reports[0]
        .statistics
        for ranks, size in ((1, ROWS), (2, 3))
    )
    assert cut == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_masking_is_at_work_in_that_test(path: str, experience: pa.Table) -> None:
    objective, options = OBJECTIVES["sequence masking"]
    report = run(2, path, objective, config(micro_batch_size=3), experience, course(**options)).reports[0]
    assert 0.1 < report.statistics["masked_fraction"] < 0.9
    # Dropped rollouts count in the normaliser, so the loss of the others is what it would be beside rollouts without
    # advantage.
    kept = [math.log(0.9) <= np.mean(row) <= math.log(1.1) for row in drift(experience)]
    quiet = replace(
        experience,
        "advantages",
        [[a if k else 0.0 for a in row] for k, row in zip(kept, experience["advantages"].to_pylist(), strict=True)],
    )
    plain = run(1, path, PPO(decoupled=True, importance_cap=1.2), config(micro_batch_size=3), quiet, course()).reports[
        0
    ]
    assert report.loss == pytest.approx(plain.loss, rel=1e-4, abs=1e-6)
    assert report.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)


def test_the_greatest_importance_weight_is_over_all_ranks(path: str, experience: pa.Table) -> None:
    report = run(2, path, PPO(decoupled=True), config(micro_batch_size=3), experience, course()).reports[0]
    weights = [math.exp(d) for row in drift(experience) for d in row]
    assert report.statistics["importance_weight_max"] == pytest.approx(max(weights), rel=1e-5)
    assert report.statistics["importance_weight"] == pytest.approx(np.mean(weights), rel=1e-5)


def test_a_constant_aggregation_divides_by_rows_and_constant(path: str, experience: pa.Table) -> None:
    means = {
        aggregation: run(1, path, Reinforce(), config(), experience, course(aggregation=aggregation, constant=20))
        .reports[0]
        .loss
        for aggregation in ("token_mean", "constant")
    }
    tokens = sum(sum(row) for row in experience["action_mask"].to_pylist())
    assert means["constant"] * 11 * 20 == pytest.approx(means["token_mean"] * tokens, rel=1e-5)


def test_the_entropys_gradient_is_that_of_the_distribution(path: str) -> None:
    model = PolicyModel(load_causal_lm(path, torch.float32), temperature=0.9)
    inputs = TokenInputs(
        input_ids=torch.tensor([[3, 5, 7, 9]]), states=torch.tensor([1, 2]), targets=torch.tensor([7, 9])
    )
    logits = model.causal_lm(inputs.input_ids).logits[0, 1:3] / 0.9
    probabilities = torch.softmax(logits, -1)
    wanted = -(probabilities * probabilities.log()).sum(-1)
    wanted.sum().backward()
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    entropy = model(inputs, entropy="gradient")[1]
    assert torch.allclose(entropy, wanted, atol=1e-5)
    entropy.sum().backward()
    assert torch.allclose(model.head.weight.grad, gradient, atol=1e-5)
    assert not model(inputs, entropy="value")[1].requires_grad
    assert len(model(inputs)[1]) == 0
    with torch.no_grad():
        assert not model(inputs, entropy="gradient")[1].requires_grad
