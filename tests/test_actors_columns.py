"""An algorithm with a token column of its own, defined in this file alone: from the assembler, through every check, to
its loss on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from torch import Tensor

from actors.experience import Comparisons, Experience, Rollouts, Scores, TokenLogprobs
from actors.learner.trainees.base import Trainee
from actors.learner.trainees.critic import CriticTrainee
from actors.learner.trainees.policy import PolicyTrainee
from actors.objective import ActionTokens
from cluster.session import Session
from learner_helpers import (
    Trained,
    make_comparisons,
    make_experience,
    make_learner,
    plan,
    replace,
    rollouts_of,
    save_tiny_model,
    train_on,
)
from pipeline.algorithms.base import Algorithm, Producer, StepArrays
from pipeline.algorithms.losses import Loss
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.shaping import ShapingConfig
from pipeline.assembly.assembler import Assembler
from pipeline.assembly.assembly import Assembly, assemble
from test_actors_learner import TOLERANCE, config

ROWS = 11
CPU = torch.device("cpu")


def age(step: StepArrays) -> Tensor:
    """Versions between the newest token of the step and each token, which no micro-batch alone could say."""
    newest = step.versions[step.trajectories.mask].max()
    return newest - step.versions


class Fading(Reinforce):
    """A token counts half as much for every version that it is older."""

    name: Literal["fading"] = "fading"  # type: ignore[assignment]

    @property
    def columns(self) -> Mapping[str, Producer]:
        return {"age": age}

    def surrogate(self, logprobs: Tensor, batch: ActionTokens) -> Loss:
        loss, statistics = super().surrogate(logprobs, batch)
        return 0.5 ** batch.extra["age"] * loss, statistics | {"age": batch.extra["age"]}

    def value_loss(self, values: Tensor, batch: ActionTokens) -> Loss:
        loss, statistics = super().value_loss(values, batch)
        return 0.5 ** batch.extra["age"] * loss, statistics


POLICY: Trainee[Any] = PolicyTrainee(objective=Fading(), temperature=0.9, columns=("age",))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


def rollouts() -> pa.Table:
    """Each token of one of three versions."""
    random, table = np.random.default_rng(2), rollouts_of(make_experience(ROWS))
    versions = [[int(random.integers(3, 6)) if a else -1 for a in row] for row in table["action_mask"].to_pylist()]
    return replace(table, "versions", versions)


def scores(table: pa.Table) -> pa.Table:
    rows = len(table)
    rewards = np.random.default_rng(3).normal(size=rows).astype(np.float32)
    columns = {"reward": rewards, "turn_rewards": [[]] * rows, "status": ["ok"] * rows, "detail": [""] * rows}
    return Scores.of({"sample_id": table["sample_id"], **columns}).table


def assembled(algorithm: Algorithm, *parts: pa.Table) -> pa.Table:
    """The step's experience; parts: of the rollouts and then of the scores, in any order and number."""
    how = Assembly(algorithm=algorithm, kl_coef=0.0, shaping=ShapingConfig(), max_new_tokens=14)
    ids, half = sorted(rollouts()["sample_id"].to_pylist()), len(parts) // 2
    return assemble(how, ids, (half, half, 0, 0, 0), *parts)[1]


@pytest.fixture(scope="module")
def experience() -> pa.Table:
    return assembled(Fading(), rollouts(), scores(rollouts()))


def test_the_assembler_adds_what_the_algorithm_declares_and_nothing_else(experience: pa.Table) -> None:
    plain = assembled(Reinforce(), rollouts(), scores(rollouts()))
    assert plain.column_names == Experience.schema.names
    assert experience.column_names == [*Experience.schema.names, "age"]
    assert experience.select(plain.column_names).equals(plain), "no other column changes"
    want = [[5.0 - v if v >= 0 else 0.0 for v in row] for row in rollouts()["versions"].to_pylist()]
    assert experience["age"].to_pylist() == want
    assert {x for row in want for x in row} == {0.0, 1.0, 2.0}


def test_the_column_does_not_depend_on_how_the_tables_come_in(experience: pa.Table) -> None:
    table, scored = rollouts(), scores(rollouts())
    parts = [kind.take(rows) for kind in (table, scored) for rows in ([9, 3, 0], [1, 2, 4, 10], [8, 7, 6, 5])]
    assert assembled(Fading(), *parts).equals(experience)


def test_it_passes_files_that_do_not_know_it(experience: pa.Table, tmp_path: Path, ray_session: Session) -> None:
    """Written and read as the experience log is, cut, joined, shuffled, and through Ray's object store."""
    Assembler().write(str(tmp_path / "experience.parquet"), experience)
    back = Experience.read(tmp_path / "experience.parquet")
    assert back.extra == ("age",) and back.table.equals(experience)
    cut = [Experience(experience).slice(0, 4), Experience(experience).slice(4)]
    assert Experience.concat(cut).table.equals(experience)
    assert Experience(experience.take(list(range(ROWS))[::-1])).extra == ("age",)
    assert Experience(ray.get(ray.put(experience))).extra == ("age",)


def test_the_loss_finds_it_however_rows_are_cut(path: str, experience: pa.Table) -> None:
    """The plain loss with the weight in the advantages is the same loss, and knows nothing of the column."""
    weight = [[0.5**x for x in row] for row in experience["age"].to_pylist()]
    rows = zip(experience["advantages"].to_pylist(), weight, strict=True)
    weighed = [[a * w for a, w in zip(*row, strict=True)] for row in rows]
    plain = replace(experience.drop_columns(["age"]), "advantages", weighed)
    want = train_on(
        1, path, config(micro_batch_size=ROWS), [plain], [plan()], PolicyTrainee(objective=Reinforce(), temperature=0.9)
    )
    chosen = [
        x
        for row, mask in zip(*columns(experience, "age", "action_mask"), strict=True)
        for x, a in zip(row, mask, strict=True)
        if a
    ]
    for ranks, options in (
        (1, {"micro_batch_size": ROWS}),
        (1, {"micro_batch_size": 1}),
        (2, {"micro_batch_size": 3, "zero_stage": 2}),
        (2, {"micro_batch_size": 2, "pack_tokens": 40}),
    ):
        got = train_on(ranks, path, config(**options), [experience], [plan()], POLICY)
        assert_close(got, want)
        assert got.reports[0].statistics["age"] == pytest.approx(np.mean(chosen), rel=1e-6)


def columns(table: pa.Table, *names: str) -> list[Any]:
    return [table[name].to_pylist() for name in names]


def assert_close(got: Trained, want: Trained) -> None:
    assert got.reports[0].loss == pytest.approx(want.reports[0].loss, rel=1e-4, abs=1e-5)
    assert got.reports[0].grad_norm == pytest.approx(want.reports[0].grad_norm, rel=1e-4)
    for name, tensor in got.weights.items():
        assert float((tensor - want.weights[name]).abs().max()) < TOLERANCE, name


def test_the_critic_of_the_algorithm_finds_it_too(path: str, experience: pa.Table) -> None:
    trainee: Trainee[Any] = CriticTrainee(objective=Fading(), columns=("age",))
    one, two = (
        train_on(ranks, path, config(micro_batch_size=size), [experience], [plan()], trainee)
        for ranks, size in ((1, ROWS), (2, 3))
    )
    assert_close(two, one)
    still = train_on(1, path, config(), [experience.drop_columns(["age"])], [plan()], "critic")
    assert still.reports[0].loss > 1.1 * one.reports[0].loss, "the weight is at work"


def test_a_learner_is_given_the_columns_it_declares_or_refuses(path: str, experience: pa.Table) -> None:
    fading, plain = make_learner(path, config(), trainee=POLICY), make_learner(path, config())
    with pytest.raises(
        ValueError, match=r"^Experience: must have the extra columns .* \['age'\], got \[\]; 'age' is mi"
    ):
        fading.update(experience.drop_columns(["age"]), plan())
    with pytest.raises(
        ValueError, match=r"^Experience: must have the extra columns .* \[\], got \['age'\]; 'age' is de"
    ):
        plain.update(experience, plan())


class Misshapen(Fading):
    @property
    def columns(self) -> Mapping[str, Producer]:
        return {"age": lambda step: step.trajectories.scores}


class Doubled(Fading):
    @property
    def columns(self) -> Mapping[str, Producer]:
        return {"values": age}


def test_a_producer_that_gives_something_else_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^algorithm\.columns\['age'\]: must give .* of shape \(11, \d+\), got \(11,\)"
    ):
        assembled(Misshapen(), rollouts(), scores(rollouts()))
    with pytest.raises(ValueError, match=r"^Experience\.values: must be a new column"):
        assembled(Doubled(), rollouts(), scores(rollouts()))


# ---- the tables ----


def test_a_column_that_nobody_declared_is_refused(experience: pa.Table) -> None:
    bare = experience.drop_columns(["age"])
    assert Experience(bare).extra == ()
    with pytest.raises(ValueError, match=r"^Experience: column 'age' is not declared"):
        Experience(bare.append_column("age", experience["age"]))
    with pytest.raises(ValueError, match=r"^Experience: column 'age' is not declared"):
        Experience(
            bare.append_column(pa.field("age", pa.list_(pa.float32()), metadata={"by": "me"}), experience["age"])
        )
    with pytest.raises(ValueError, match=r"^Experience: column 'age' is not declared"):
        Experience(
            experience.replace_schema_metadata().cast(pa.schema([f.remove_metadata() for f in experience.schema]))
        )


def test_a_declared_column_has_one_float32_a_token(experience: pa.Table) -> None:
    bare, field = Experience(experience.drop_columns(["age"])), experience.schema.field("age")
    for wrong in ([[1.0]] * ROWS, [row[:-1] for row in experience["age"].to_pylist()]):
        with pytest.raises(ValueError, match=r"^Experience\.age: must have a number a token"):
            bare.with_extra({"age": wrong})
    with pytest.raises(ValueError, match=r"^Experience\.age: must be list<item: float>, got int64"):
        Experience(bare.table.append_column(field.with_type(pa.int64()), pa.array(range(ROWS))))
    with pytest.raises(ValueError, match=r"^Experience\.age: must be list<item: float>, got values that do not fit"):
        bare.with_extra({"age": ["x"] * ROWS})
    nulls = [[None] * len(row) for row in experience["tokens"].to_pylist()]
    with pytest.raises(ValueError, match=r"^Experience\.age: must have no nulls"):
        bare.with_extra({"age": nulls})
    with pytest.raises(ValueError, match=r"^Experience\.returns: must be a new column"):
        bare.with_extra({"returns": experience["age"]})


def test_a_column_of_the_kinds_own_cannot_be_declared_away(experience: pa.Table) -> None:
    field = experience.schema.field("age").with_name("reward")
    at = experience.column_names.index("reward")
    with pytest.raises(ValueError, match=r"^Experience: "):
        Experience(experience.set_column(at, field, experience["age"]))


def test_tables_that_are_learned_from_take_columns_and_others_do_not(experience: pa.Table) -> None:
    compared = Comparisons(make_comparisons(3))
    numbers = [[0.5] * len(row) for row in compared.table["tokens"].to_pylist()]
    assert compared.with_extra({"reference": numbers}).extra == ("reference",)
    for kind, names in ((Rollouts, Rollouts.schema.names), (TokenLogprobs, TokenLogprobs.schema.names)):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: column 'age' is not declared"):
            kind(experience.select([*names, "age"]))


def test_parts_with_different_columns_do_not_become_one_table(experience: pa.Table) -> None:
    with pytest.raises(ValueError, match="Schema at index 1 was different"):
        Experience.concat([Experience(experience), Experience(experience.drop_columns(["age"]))])
