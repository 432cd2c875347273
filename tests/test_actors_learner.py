"""The learner against a plain torch loop, over every ZeRO stage, number of ranks and micro-batch size.

The oracle knows nothing of padding, ranks, micro-batches or DeepSpeed: one row at a time through the Hugging Face
model.
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
from actors.learner.learner import Learner, LearnerReady, LearnerSpec, UpdatePlan
from actors.learner.micro_batches import minibatches
from actors.models.causal_lm import ValueModel, load_causal_lm
from actors.objective import ActionTokens
from actors.weights import pack
from learner_helpers import (
    POISON,
    TRAINEES,
    PolicyGradient,
    SquaredError,
    Trained,
    make_experience,
    make_learner,
    pair,
    plan,
    replace,
    rollouts_of,
    save_tiny_model,
    stages,
    train_on,
    weights_of,
)
from ports import free_port
from tiny_models import save_llama

TEMPERATURE = 0.9  # as in make_learner
# Weights move by up to learning_rate a step, so agreement is asked to a thousandth of one step (float32 sums in another
# order).
RATE = 1e-3
TOLERANCE = RATE / 1000


def config(**options: Any) -> LearnerConfig:
    return LearnerConfig(
        **({"learning_rate": RATE, "micro_batch_size": 3, "schedule": "constant", "adam_epsilon": 1e-5} | options)
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def experience() -> pa.Table:
    return make_experience(11)


class Oracle(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def oracle(path: str, settings: LearnerConfig, experience: pa.Table, plan: UpdatePlan, role: str = "policy") -> Oracle:
    """A plain training loop: the definition of what the learner must do."""
    causal_lm = load_causal_lm(path, torch.float32)
    model: nn.Module = causal_lm if role == "policy" else ValueModel(causal_lm)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, eps=settings.adam_epsilon, weight_decay=0.0
    )
    columns = {name: experience[name].to_pylist() for name in experience.column_names}
    losses, norms = [], []
    for epoch in minibatches(
        len(experience), epochs=plan.epochs, minibatches=plan.minibatches, seed=plan.seed, step=plan.step
    ):
        for rows in epoch:
            tokens = sum(sum(columns["action_mask"][i]) for i in rows)
            total = torch.zeros(())
            for i in rows:
                per_token = oracle_row(
                    model, {name: values[i] for name, values in columns.items() if isinstance(values[i], list)}, role
                )
                total = total + per_token.sum() / (
                    tokens if plan.aggregation == "token_mean" else len(rows) * len(per_token)
                )
            optimizer.zero_grad()
            total.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf)))
            optimizer.step()
            losses.append(float(total.detach()))
    return Oracle(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def oracle_row(model: nn.Module, row: dict[str, Any], role: str) -> Tensor:
    """Loss of each action token of one rollout."""
    tokens, chosen = torch.tensor(row["tokens"]), torch.tensor(row["action_mask"])
    columns = {
        name: torch.tensor(row[name])[chosen]
        for name in ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns")
    }
    batch = ActionTokens(row=torch.zeros(int(chosen.sum()), dtype=torch.int64), rows=1, **columns)
    if role == "critic":
        assert isinstance(model, ValueModel)
        hidden = model.trunk(input_ids=tokens[None]).last_hidden_state[0]
        return SquaredError().value_loss(model.value_head(hidden)[:-1, 0][chosen[1:]], batch)[0]
    logprobs = torch.log_softmax(model(input_ids=tokens[None]).logits[0] / TEMPERATURE, -1)[:-1]
    new = logprobs.gather(-1, tokens[1:, None])[:, 0][chosen[1:]]
    return PolicyGradient().policy_loss(new, torch.zeros_like(new), batch)[0]


def assert_same(got: Trained, want: Oracle, tolerance: float = TOLERANCE) -> None:
    [report] = got.reports
    assert (report.updates, report.skipped) == (len(want.losses), 0)
    assert report.loss == pytest.approx(np.mean(want.losses), rel=1e-4, abs=1e-5)
    assert report.grad_norm == pytest.approx(np.mean(want.norms), rel=1e-4)
    assert report.grad_norm_max == pytest.approx(max(want.norms), rel=1e-4)
    assert got.weights.keys() == want.weights.keys()
    for name, tensor in got.weights.items():
        assert float((tensor - want.weights[name]).abs().max()) < tolerance, name


def test_a_filler_takes_nothing_from_the_row_that_it_runs(path: str) -> None:
    """Two minibatches of one row, so that with two ranks one runs a filler: the row that poisons a gradient drops its
    own minibatch alone, on any number of ranks. (As a filler of the other it multiplied an infinite slope by 0.)
    """
    experience = make_experience(2, seed=3)
    shortest = min(range(2), key=lambda row: len(experience["tokens"][row]))
    rows = experience["advantages"].to_pylist()
    rows[shortest] = [POISON if chosen else 0.0 for chosen in experience["action_mask"][shortest].as_py()]
    found = [
        train_on(ranks, path, config(), [replace(experience, "advantages", rows)], [plan(epochs=1, minibatches=2)])
        for ranks in (1, 2)
    ]
    assert [(report.updates, report.skipped) for trained in found for report in trained.reports] == [(1, 1)] * 2
    one, two = (trained.weights for trained in found)
    assert all(float((one[name] - two[name]).abs().max()) < TOLERANCE for name in one)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [pytest.param(1, 64, marks=pytest.mark.slow), (2, 3)])
@pytest.mark.parametrize("stage", stages(0, 2))
def test_every_stage_does_what_the_plain_loop_does(
    stage: int, ranks: int, micro_batch_size: int, path: str, experience: pa.Table
) -> None:
    """Over several minibatches; tests/test_actors_objectives.py goes through every number of ranks and micro-batch
    size.
    """
    settings = config(zero_stage=stage, micro_batch_size=micro_batch_size, max_grad_norm=1.0)
    want = oracle(path, settings, experience, plan())
    assert min(want.norms) > 1.0, "clipping must be at work for this test to test it"
    assert_same(train_on(ranks, path, settings, [experience], [plan()]), want)


@pytest.mark.parametrize(
    ("family", "ranks", "role", "aggregation"),
    [
        ("gpt2", 1, "policy", "sequence_mean"),
        ("gpt2", 2, "critic", "token_mean"),
        ("llama", 1, "policy", "token_mean"),
        ("llama", 2, "policy", "token_mean"),
    ],
)
def test_packed_rows_do_what_the_plain_loop_does(
    family: str, ranks: int, role: str, aggregation: str, path: str, experience: pa.Table, tmp_path: Path
) -> None:
    """So does every other number of rows a line: the loss is of the action tokens of a row, whatever lies beside it."""
    path = path if family == "gpt2" else str(save_llama(tmp_path))
    settings, course = (
        config(zero_stage=2, micro_batch_size=2, pack_tokens=30, max_grad_norm=0.1),
        plan(aggregation=aggregation),
    )
    assert_same(
        train_on(ranks, path, settings, [experience], [course], role), oracle(path, settings, experience, course, role)
    )


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.0}, {"max_grad_norm": 1e6}])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_without_clipping_and_with_either_aggregation(
    options: dict[str, float], aggregation: str, path: str, experience: pa.Table
) -> None:
    settings, course = config(**options), plan(aggregation=aggregation)
    # Unclipped gradients are ten times as large, and so is the rounding noise that Adam divides by epsilon where the
    # true gradient is zero (key biases).
    assert_same(
        train_on(2, path, settings, [experience], [course]),
        oracle(path, settings, experience, course),
        tolerance=RATE / 100,
    )


@pytest.mark.parametrize("stage", stages(3))
def test_fewer_rows_than_ranks_times_micro_batches_are_filled_up_with_weight_zero(stage: int, path: str) -> None:
    few, course = make_experience(3, seed=5), plan(epochs=1, minibatches=3)
    settings = config(zero_stage=stage, micro_batch_size=1)
    assert_same(train_on(2, path, settings, [few], [course]), oracle(path, settings, few, course))


@pytest.mark.parametrize("stage", stages(1))
def test_the_critic_does_what_the_plain_loop_does(stage: int, path: str, experience: pa.Table) -> None:
    settings = config(zero_stage=stage, max_grad_norm=0.1)
    want = oracle(path, settings, experience, plan(), role="critic")
    got = train_on(2, path, settings, [experience], [plan()], "critic")
    assert_same(got, want)
    assert (got.reports[0].ratio_deviation, got.reports[0].logprob_gap) == (0.0, 0.0)


def test_the_order_of_rows_does_not_matter(path: str, experience: pa.Table) -> None:
    course = plan(epochs=2, minibatches=1)
    backwards = experience.take(list(range(len(experience)))[::-1])
    a, b = (train_on(1, path, config(), [table], [course]) for table in (experience, backwards))
    for name, tensor in a.weights.items():
        assert float((tensor - b.weights[name]).abs().max()) < TOLERANCE, name


def test_the_same_run_twice_gives_the_same_bits(path: str, experience: pa.Table) -> None:
    a, b = (train_on(2, path, config(zero_stage=2), [experience], [plan()]) for _ in range(2))
    assert all(torch.equal(tensor, b.weights[name]) for name, tensor in a.weights.items())


@pytest.mark.parametrize("stage", stages(1))
def test_bfloat16_follows_float32_at_every_stage(stage: int, path: str, experience: pa.Table) -> None:
    course = plan(epochs=3, minibatches=1)
    start = weights_of(make_learner(path, config()))
    assert start is not None
    exact, rounded = (
        train_on(2, path, config(zero_stage=stage, dtype=dtype), [experience], [course])
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.reports[0].grad_norm == pytest.approx(exact.reports[0].grad_norm, rel=0.05)
    assert rounded.reports[0].loss == pytest.approx(exact.reports[0].loss, abs=0.05)
    moved = [torch.cat([(run.weights[name] - start[name]).flatten() for name in start]) for run in (exact, rounded)]
    assert float(torch.nn.functional.cosine_similarity(*moved, dim=0)) > 0.98
    assert float(moved[1].norm() / moved[0].norm()) == pytest.approx(1, abs=0.03), (
        "a first step of another size means a wrong Adam state"
    )


def infer_on(
    rank: int, ranks: int, port: int, path: str, settings: LearnerConfig, tables: list[pa.Table], role: str
) -> tuple[float, pa.Table]:
    report, table = make_learner(path, settings, trainee=role, rank=rank, ranks=ranks, port=port).infer(*tables)
    return report.mean, table


@pytest.mark.parametrize(
    ("stage", "pack_tokens"),
    [pytest.param(*cut, marks=pytest.mark.slow) for cut in ((0, 0), (1, 30), (2, 0))] + [(3, 0)],
)
def test_infer_shares_rows_out_and_gives_the_models_log_probs(
    stage: int, pack_tokens: int, path: str, experience: pa.Table
) -> None:
    tables = [rollouts_of(experience.slice(0, 4)), rollouts_of(experience.slice(4))]
    model = load_causal_lm(path, torch.float32)
    results = pair().run(infer_on, path, config(zero_stage=stage, pack_tokens=pack_tokens), tables, "policy")
    assert results[0][0] == results[1][0], "the mean is over all ranks"
    got = {
        i: row
        for _, table in results
        for i, row in zip(table["sample_id"].to_pylist(), table["logprobs"].to_pylist(), strict=True)
    }
    assert sorted(got) == experience["sample_id"].to_pylist()
    actions = []
    for i, tokens, mask in zip(
        *(experience[name].to_pylist() for name in ("sample_id", "tokens", "action_mask")), strict=True
    ):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0] / TEMPERATURE, -1)
        want = [float(logprobs[t - 1, token]) if mask[t] else 0.0 for t, token in enumerate(tokens)]
        assert got[i] == pytest.approx(want, abs=1e-5)
        actions += [x for x, chosen in zip(want, mask, strict=True) if chosen]
    assert results[0][0] == pytest.approx(np.mean(actions), abs=1e-5)


def test_the_untrained_critic_says_zero_everywhere(path: str, experience: pa.Table) -> None:
    report, table = make_learner(path, config(), trainee="critic").infer(rollouts_of(experience))
    assert table.column_names == ["sample_id", "values"]
    assert report.mean == 0.0
    assert {x for row in table["values"].to_pylist() for x in row} == {0.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_one_when_the_proximal_log_probs_are_the_learners_own(
    dtype: str, path: str, experience: pa.Table
) -> None:
    learner = make_learner(path, config(dtype=dtype))
    report, table = learner.infer(rollouts_of(experience))
    own = dict(zip(table["sample_id"].to_pylist(), table["logprobs"].to_pylist(), strict=True))
    ready = make_experience(11, proximal=own)
    ready = replace(ready, "logprobs", [[x + 0.25 if x else 0.0 for x in row] for row in own.values()])
    update = learner.update(ready, plan(epochs=2, minibatches=1))
    assert update.ratio_deviation < (1e-5 if dtype == "float32" else 0.05)
    assert update.logprob_gap == pytest.approx(0.25, abs=1e-5 if dtype == "float32" else 0.05)
    assert report.action_tokens == update.action_tokens // 2


def test_statistics_are_means_over_all_action_tokens_of_all_ranks(path: str, experience: pa.Table) -> None:
    [report] = train_on(2, path, config(), [experience], [plan(epochs=3)]).reports
    chosen = [
        a
        for row, mask in zip(experience["advantages"].to_pylist(), experience["action_mask"].to_pylist(), strict=True)
        for a, m in zip(row, mask, strict=True)
        if m
    ]
    assert report.statistics["advantage"] == pytest.approx(np.mean(chosen), rel=1e-6)
    assert report.action_tokens == 3 * len(chosen)
    assert 0 < report.statistics["entropy"] < math.log(96)


def test_the_learning_rate_follows_the_schedule_over_the_whole_run(path: str, experience: pa.Table) -> None:
    learner = make_learner(path, config(schedule="linear"))  # 1000 updates in all
    rates = [learner.update(experience, plan(step=step)).learning_rate for step in (0, 1, 249)]
    assert rates == pytest.approx([RATE * (1 - i / 1000) for i in (3, 7, 999)])
    with pytest.raises(ValueError, match="total_updates = 1000, got 1000"):
        learner.update(experience, plan(step=250))
    extended = learner.update(experience, dataclasses.replace(plan(step=250), total=2000))
    assert extended.learning_rate == pytest.approx(RATE * (1 - 1003 / 2000)), (
        "a run that is extended has the rates of one that was as long from the start"
    )


@pytest.mark.parametrize("stage", stages(3))
@pytest.mark.parametrize(("role", "head"), [("policy", "lm_head.weight"), ("critic", "value_head")])
def test_heads_mode_trains_the_head_alone(stage: int, role: str, head: str, path: str, experience: pa.Table) -> None:
    runs = [
        train_on(
            2,
            path,
            config(zero_stage=stage, trainable="heads"),
            [experience] * n,
            [plan(step=i) for i in range(n)],
            role,
        )
        for n in (0, 1)
    ]
    changed = {name for name, tensor in runs[0].weights.items() if not torch.equal(tensor, runs[1].weights[name])}
    assert changed
    assert all(name.startswith(head) for name in changed)
    assert runs[1].reports[0].grad_norm > 0


def export_on(
    rank: int, ranks: int, port: int, path: str, settings: LearnerConfig, experience: pa.Table, folder: str
) -> tuple[pa.Table, str]:
    learner = make_learner(path, settings, rank=rank, ranks=ranks, port=port)
    learner.update(experience, plan())
    learner.export(folder)
    manifest, _ = learner.publish(5, "float32")
    return learner.infer(rollouts_of(experience))[1], manifest.checksum if manifest else ""


@pytest.mark.parametrize("stage", stages(1))
@pytest.mark.parametrize("trainable", ["all", "heads"])
def test_what_is_exported_is_what_was_trained_and_published(
    stage: int, trainable: str, path: str, experience: pa.Table, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results = pair().run(
        export_on, path, config(zero_stage=stage, trainable=trainable), experience, str(tmp_path / "policy")
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<eos>"
    assert model.config.tie_word_embeddings is (trainable == "all")
    assert [checksum for _, checksum in results] == [pack(model.named_parameters(), "float32", 5).checksum, ""]
    reloaded = make_learner(str(tmp_path / "policy"), config(trainable=trainable)).infer(rollouts_of(experience))[1]
    got = {
        i: row
        for table, _ in results
        for i, row in zip(table["sample_id"].to_pylist(), table["logprobs"].to_pylist(), strict=True)
    }
    for i, row in zip(reloaded["sample_id"].to_pylist(), reloaded["logprobs"].to_pylist(), strict=True):
        assert got[i] == pytest.approx(row, abs=1e-5)


def test_weight_decay_shrinks_matrices_and_spares_biases(path: str, experience: pa.Table) -> None:
    runs = [
        train_on(2, path, config(zero_stage=1, weight_decay=d), [experience], [plan(epochs=1, minibatches=1)]).weights
        for d in (0.0, 0.5)
    ]
    start = weights_of(make_learner(path, config()))
    assert start is not None
    for name, plain in runs[0].items():
        want = plain - (0.5 * RATE * start[name] if plain.ndim >= 2 else 0)
        assert float((runs[1][name] - want).abs().max()) < TOLERANCE, name


def test_ready_says_what_was_loaded(path: str) -> None:
    def ready(role: str, config: LearnerConfig) -> LearnerReady:
        spec = LearnerSpec(trainee=TRAINEES[role], path=path, config=config, total_updates=1, seed=0)
        return Learner(spec=spec, rank=0, ranks=1, timeout_s=30.0).connect("127.0.0.1", free_port())

    whole = ready("policy", config())
    heads = ready("policy", config(trainable="heads", zero_stage=3, dtype="bfloat16"))
    critic = ready("critic", config(trainable="heads"))
    assert (whole.parameters, whole.trainable, whole.device, whole.dtype, whole.context) == (
        whole.trainable,
        30_592,
        "cpu",
        "float32",
        64,
    )
    assert (heads.parameters, heads.trainable, heads.dtype) == (whole.parameters + 96 * 32, 96 * 32, "bfloat16")
    assert (critic.parameters, critic.trainable) == (whole.parameters + 33, 33)


def test_losses_fall_when_there_is_something_to_learn(path: str, experience: pa.Table) -> None:
    learner = make_learner(path, config(zero_stage=2, learning_rate=3e-3), trainee="critic")
    losses = [learner.update(experience, plan(step=step, epochs=2)).loss for step in range(6)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
