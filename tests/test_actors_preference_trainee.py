"""A trainee that the package does not have, whole in this file: a policy that learns from comparisons directly (DPO).

    L = -log sigmoid(beta [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))])    Rafailov et al. 2023

It has a table, targets, a normaliser and a column of its own, `reference`, and the learner trains it as it stands.
log pi is of all tokens of a text but the first: the two texts of a comparison share their prompt, whose log-probs
cancel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import logsigmoid

from actors import ragged
from actors.config import LearnerConfig
from actors.device import torch_dtype
from actors.experience import Comparisons, TokenLogprobs
from actors.learner.learner import UpdatePlan
from actors.learner.micro_batches import Batch, Rows, minibatches
from actors.learner.trainees.base import LossTerms, Moments, Normaliser, Trainee, ready
from actors.models.causal_lm import Entropy, PolicyModel, TokenInputs, load_causal_lm
from actors.models.export import save_model
from actors.models.tokenizer import load_tokenizer
from learner_helpers import make_comparisons, make_learner, plan, save_tiny_model, train_on
from test_actors_learner import Oracle, assert_same, config
from test_actors_reward_learner import texts_of

BETA = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectPreferenceTrainee(Trainee[PolicyModel]):
    """Of each comparison two texts, the better one first."""

    role: ClassVar[str] = "preference"
    beta: float = BETA

    def load(self, path: str, config: LearnerConfig, seed: int) -> tuple[PolicyModel, int]:
        causal_lm = load_causal_lm(path, torch_dtype(config.dtype))
        model = PolicyModel(causal_lm, temperature=1.0)
        return ready(model, model.head, causal_lm, path, config)

    def learning(self, table: pa.Table, device: torch.device, kl_coef: float = 0.0) -> Batch:
        return self._batch(Comparisons(table).check_extra(["reference"]).table, device)

    def inferring(self, tables: Sequence[pa.Table], device: torch.device) -> Batch:
        return self._batch(Comparisons.concat([Comparisons(table) for table in tables]).table, device)

    def _batch(self, table: pa.Table, device: torch.device) -> Batch:
        offsets = ragged.flat(table["tokens"])[1]
        starts, first = ragged.flat(table["segment_starts"])
        targets = np.ones(offsets[-1], np.bool_)
        targets[np.repeat(offsets[:-1], np.diff(first)) + starts] = False
        return Batch(table, device, targets=targets)

    def forward(self, run: Callable[..., Any], inputs: TokenInputs, entropy: Entropy) -> tuple[Tensor, ...]:
        return (run(inputs)[0],)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch, rows: Rows) -> LossTerms:
        moved = outputs[0] - batch.at_targets(["reference"], rows)["reference"]  # (N,)
        text, row = batch.text(rows)
        better, worse = moved.new_zeros(len(row)).index_add(0, text, moved).view(-1, 2).unbind(1)  # (rows,) each
        gap = better - worse
        statistics = {"accuracy": (gap.detach().sign() + 1) / 2, "gap": gap.detach()}
        return LossTerms(each=-logsigmoid(self.beta * gap), row=row[::2], rows=len(rows), statistics=statistics)

    def count(self, batch: Batch, rows: Rows) -> int:
        return len(rows)

    def normaliser(self, batch: Batch, rows: Rows, plan: UpdatePlan) -> Normaliser:
        return Normaliser(count=len(rows))

    def inferred(self, sample_ids: npt.NDArray[Any], column: pa.ListArray) -> pa.Table:
        return TokenLogprobs.of({"sample_id": sample_ids, "logprobs": column}).table

    def published(self, model: PolicyModel) -> Iterable[tuple[str, Tensor]]:
        return model.causal_lm.named_parameters()  # type: ignore[no-any-return]

    def save(self, model: PolicyModel, folder: Path, path: str, moments: Moments | None) -> None:
        save_model(model.causal_lm, load_tokenizer(path), folder)


TRAINEE = DirectPreferenceTrainee()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


def with_reference(table: pa.Table, path: str) -> pa.Table:
    """The comparisons with the log-probs of the model in that folder, which the learner itself infers."""
    own = make_learner(path, config(), trainee=TRAINEE).infer(table)[1]
    assert own["sample_id"].to_pylist() == table["sample_id"].to_pylist()
    return Comparisons(table).with_extra({"reference": own["logprobs"]}).table


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """7 pairs. The reference is another model than the one that is trained, so that no number is trivial."""
    other = save_tiny_model(Path(tmp_path_factory.mktemp("other")), seed=1)
    return with_reference(make_comparisons(7, sizes=(2,)), other)


def oracle(path: str, settings: LearnerConfig, table: pa.Table, plan: UpdatePlan) -> Oracle:
    """One text at a time through the Hugging Face model, one loss a comparison, averaged over the minibatch."""
    model: Any = load_causal_lm(path, torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, eps=settings.adam_epsilon, weight_decay=0.0
    )
    pairs = texts_of(table)
    known = [
        sum(row[: len(pair[0])]) - sum(row[len(pair[0]) :])
        for row, pair in zip(table["reference"].to_pylist(), pairs, strict=True)
    ]

    def whole(text: list[int]) -> Tensor:
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([text])).logits[0, :-1], -1)
        return logprobs.gather(-1, torch.tensor(text[1:])[:, None]).sum()

    losses, norms = [], []
    for epoch in minibatches(
        len(table), epochs=plan.epochs, minibatches=plan.minibatches, seed=plan.seed, step=plan.step
    ):
        for rows in epoch:
            gaps = torch.stack([whole(pairs[i][0]) - whole(pairs[i][1]) - known[i] for i in rows])
            loss = torch.log1p(torch.exp(-BETA * gaps)).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)))
            optimizer.step()
            losses.append(float(loss.detach()))
    return Oracle(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("stage", "ranks", "micro_batch_size", "pack_tokens"),
    [(0, 1, 7, 0), (0, 1, 1, 0), (1, 2, 3, 60), (2, 2, 2, 0), (3, 2, 1, 0)],
)
def test_every_rank_count_and_micro_batch_does_what_the_plain_loop_does(
    stage: int, ranks: int, micro_batch_size: int, pack_tokens: int, path: str, comparisons: pa.Table
) -> None:
    settings = config(zero_stage=stage, micro_batch_size=micro_batch_size, pack_tokens=pack_tokens)
    got = train_on(ranks, path, settings, [comparisons], [plan()], TRAINEE)
    assert_same(got, oracle(path, settings, comparisons, plan()))
    [report] = got.reports
    assert (report.samples, report.action_tokens, report.ratio_deviation) == (7, 14, 0.0)
    assert report.statistics.keys() == {"accuracy", "gap"}


def test_statistics_are_over_all_ranks_and_micro_batches(path: str, comparisons: pa.Table) -> None:
    one, two = (
        train_on(ranks, path, config(micro_batch_size=size), [comparisons], [plan()], TRAINEE).reports[0].statistics
        for ranks, size in ((1, 7), (2, 1))
    )
    assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


def test_it_begins_at_log_2_learns_the_order_and_leaves_a_language_model(path: str, tmp_path: Path) -> None:
    table = with_reference(make_comparisons(8, sizes=(2,)), path)
    learner = make_learner(path, config(learning_rate=3e-3), trainee=TRAINEE)
    before = learner.judge(table)
    assert before.loss == pytest.approx(math.log(2), abs=1e-4), "the model is its own reference"
    for step in range(4):
        learner.update(table, plan(step=step))
    after = learner.judge(table)
    assert after.loss < 0.5 * before.loss
    assert after.statistics["accuracy"] == 1.0
    learner.export(str(tmp_path / "policy"))
    again = with_reference(make_comparisons(8, sizes=(2,)), str(tmp_path / "policy"))
    trained = learner.infer(table)[1]["logprobs"]
    for got, want in zip(again["reference"].to_pylist(), trained.to_pylist(), strict=True):
        assert got == pytest.approx(want, abs=1e-4)


def test_a_commit_carries_its_name_and_no_other_learner_takes_it(path: str, tmp_path: Path) -> None:
    file = make_learner(path, config(), trainee=TRAINEE).save(str(tmp_path)).file
    with safe_open(tmp_path / file.name, framework="pt") as opened:
        assert json.loads(opened.metadata()["shard"])["role"] == "preference"
    with pytest.raises(ValueError, match=r"must be a shard of the policy, got one of the preference"):
        make_learner(path, config(), trainee="policy").restore(str(tmp_path), [file.name])


def test_the_column_that_it_needs_is_asked_for(path: str, comparisons: pa.Table) -> None:
    learner = make_learner(path, config(), trainee=TRAINEE)
    with pytest.raises(ValueError, match=r"^Comparisons: must have the extra columns .* 'reference' is missing"):
        learner.update(comparisons.drop_columns(["reference"]), plan())
    with pytest.raises(ValueError, match=r"^Comparisons: must have the extra columns .* 'reference' is declared by no"):
        make_learner(path, config(), trainee="reward").update(comparisons, plan())
