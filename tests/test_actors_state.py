"""What a learner commits: exact to the bit where ranks and stage stay the same, exact in its state where they do not,
refused where it does not fit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.config import LearnerConfig
from actors.learner.learner import Learner, LearnerReady, LearnerSpec, UpdateReport
from actors.learner.shards import write_shard
from actors.objective import ActionTokens
from cluster.storage import Folder
from learner_helpers import (
    POISON,
    STAGES,
    TRAINEES,
    PolicyGradient,
    SquaredError,
    make_experience,
    make_learner,
    pair,
    plan,
    replace,
    save_tiny_model,
    stages,
    weights_of,
)
from ports import free_port

DTYPES = ("float32", "bfloat16")
RATE = 1e-3
TOLERANCE = RATE / 1000  # as in test_actors_learner: a thousandth of the largest step
EXPERIENCE = make_experience(8)


def config(**options: Any) -> LearnerConfig:
    return LearnerConfig(**({"learning_rate": RATE, "micro_batch_size": 1, "schedule": "constant"} | options))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


def on(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What every rank returned: in this process for one, on the pair for two."""
    return [function(0, 1, 0, *arguments)] if ranks == 1 else pair().run(function, *arguments)


def shards(ranks: int) -> list[str]:
    return [f"rank-{rank}.safetensors" for rank in range(ranks)]


def assembled(folder: Path) -> dict[str, Tensor | int]:
    """Every parameter's whole state, from all shards in the folder; an element that no shard holds is NaN."""
    whole: dict[str, Tensor | int] = {}
    for file in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["shard"])
        for key, values in load_file(file).items():
            part = header["parameters"][key.rpartition("/")[0]]
            tensor = whole.setdefault(key, torch.full((part["numel"],), float("nan")))
            assert isinstance(tensor, Tensor)
            tensor[part["start"] : part["start"] + len(values)] = values
        whole |= {f"{name}/step": part["step"] for name, part in header["parameters"].items()}
    return whole


def assert_equal(got: dict[str, Tensor | int], want: dict[str, Tensor | int]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        other = want[name]
        assert (
            torch.equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other
        ), name


@dataclasses.dataclass
class Breaks:
    """An objective that raises after that many micro-batches."""

    calls: int

    def _count(self) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise OSError("told to break off")

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        self._count()
        return PolicyGradient().policy_loss(logprobs, entropy, batch)

    def value_loss(self, values: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        self._count()
        return SquaredError().value_loss(values, batch)


def break_off(learner: Learner, calls: int) -> None:
    """An update that fails after that many micro-batches, with gradients that are not finite."""
    poison = [[POISON if chosen else 0.0 for chosen in row] for row in EXPERIENCE["action_mask"].to_pylist()]
    kept, learner.trainee = learner.trainee, dataclasses.replace(learner.trainee, objective=Breaks(calls))
    with pytest.raises(OSError, match="told to break off"):
        learner.update(replace(EXPERIENCE, "advantages", poison), plan(step=7))
    learner.trainee = kept


@dataclasses.dataclass(frozen=True)
class Life:
    """What became of a learner after the commit: its reports but for the time they took, its weights (rank 0), the
    checksum of its next commit.
    """

    reports: list[UpdateReport]
    weights: dict[str, Tensor]
    checksum: str


def live_on(learner: Learner, folder: str) -> Life:
    reports = [dataclasses.replace(learner.update(EXPERIENCE, plan(step=step)), seconds=0) for step in (1, 2)]
    return Life(reports=reports, weights=weights_of(learner) or {}, checksum=learner.save(folder).file.checksum)


def lives(
    rank: int, ranks: int, port: int, path: str, settings: LearnerConfig, role: str, folder: str
) -> dict[str, Life]:
    """The same two steps after a commit: undisturbed, resumed from it, rolled back to it later, and rolled back from a
    broken update.
    """

    def fresh() -> Learner:
        return make_learner(path, settings, trainee=role, rank=rank, ranks=ranks, port=port)

    learner, out = fresh(), {}
    learner.update(EXPERIENCE, plan(step=0))
    saved = learner.save(f"{folder}/commit")
    out["undisturbed"] = live_on(learner, f"{folder}/undisturbed")
    assert learner.restore(f"{folder}/commit", shards(ranks)).steps == 4
    out["rolled back"] = live_on(learner, f"{folder}/rolled back")
    break_off(learner, calls=1)
    learner.restore(f"{folder}/commit", shards(ranks))
    out["broken off"] = live_on(learner, f"{folder}/broken off")
    learner = fresh()
    learner.restore(f"{folder}/commit", shards(ranks))
    assert learner.save(f"{folder}/again").file == saved.file, "the same state is the same bytes"
    out["resumed"] = live_on(learner, f"{folder}/resumed")
    return out


def assert_lives_are_the_same(results: list[dict[str, Life]]) -> None:
    for life in results:
        want = life.pop("undisturbed")
        assert set(life) == {"rolled back", "broken off", "resumed"}
        for how, got in life.items():
            assert got.reports == want.reports, how
            assert got.checksum == want.checksum, how
            assert got.weights.keys() == want.weights.keys()
            assert all(torch.equal(tensor, want.weights[name]) for name, tensor in got.weights.items()), how


MATRIX = [
    pytest.param(
        stage,
        dtype,
        ranks,
        marks=[] if (stage, dtype, ranks) in ((1, "float32", 2), (3, "bfloat16", 2)) else pytest.mark.slow,
    )
    for stage in STAGES
    for dtype in DTYPES
    for ranks in (1, 2)
]


@pytest.mark.parametrize(("stage", "dtype", "ranks"), MATRIX)
def test_a_restored_learner_equals_an_undisturbed_one_to_the_bit(
    stage: int, dtype: str, ranks: int, path: str, tmp_path: Path
) -> None:
    assert_lives_are_the_same(on(ranks, lives, path, config(zero_stage=stage, dtype=dtype), "policy", str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("role", "options"), [("critic", {}), ("policy", {"trainable": "heads"}), ("policy", {"weight_decay": 0.1})]
)
def test_so_does_every_other_kind_of_learner(
    stage: int, role: str, options: dict[str, Any], path: str, tmp_path: Path
) -> None:
    assert_lives_are_the_same(on(2, lives, path, config(zero_stage=stage, **options), role, str(tmp_path)))


@pytest.mark.slow
# matrices of 147,456 elements, where DeepSpeed keeps up to 100,000 whole; odd ones, which it pads
@pytest.mark.parametrize("width", [192, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_does_one_of_another_width_at_stage_3(width: int, dtype: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", width=width)
    assert_lives_are_the_same(on(2, lives, model, config(zero_stage=3, dtype=dtype), "policy", str(tmp_path)))


@pytest.mark.parametrize("stage", stages(1))
def test_wherever_an_update_broke_off(stage: int, path: str, tmp_path: Path) -> None:
    learner = make_learner(path, config(zero_stage=stage))
    learner.save(str(tmp_path))
    want = live_on(learner, str(tmp_path / "undisturbed"))
    for calls in (0, 1, 3, 4, 5):  # minibatches are of four micro-batches
        break_off(learner, calls)
        learner.restore(str(tmp_path), shards(1))
        assert live_on(learner, str(tmp_path / "again")).checksum == want.checksum, calls


def first_step(rank: int, ranks: int, port: int, path: str, settings: LearnerConfig, folder: str) -> dict[str, Tensor]:
    learner = make_learner(path, settings, rank=rank, ranks=ranks, port=port)
    learner.update(EXPERIENCE, plan(epochs=1, minibatches=1))
    learner.save(folder)
    return weights_of(learner) or {}


@pytest.mark.parametrize("stage", stages(3))
def test_the_files_hold_what_their_names_say(stage: int, tmp_path: Path) -> None:
    odd = save_tiny_model(tmp_path / "model", width=33)  # nothing divides by two ranks
    settings = config(zero_stage=stage)
    weights = on(2, first_step, odd, settings, str(tmp_path))[0]
    state = {name: torch.as_tensor(value) for name, value in assembled(tmp_path).items()}
    assert state.keys() == {
        f"causal_lm.{name}/{kind}" for name in weights for kind in ("weight", "exp_avg", "exp_avg_sq", "step")
    }
    for name, weight in weights.items():
        assert torch.equal(state[f"causal_lm.{name}/weight"], weight.flatten()), name
        assert int(state[f"causal_lm.{name}/step"]) == 1
        gradient = state[f"causal_lm.{name}/exp_avg"] / (1 - settings.betas[0])  # moments began at zero
        assert gradient.any(), name
        torch.testing.assert_close(
            state[f"causal_lm.{name}/exp_avg_sq"] / (1 - settings.betas[1]), gradient**2, rtol=1e-4, atol=0.0
        )


def test_equal_runs_have_equal_checksums_and_other_runs_others(path: str, tmp_path: Path) -> None:
    first, second = make_learner(path, config()), make_learner(path, config())
    same = [live_on(learner, str(tmp_path)).checksum for learner in (first, second)]
    assert same[0] == same[1]
    first.update(EXPERIENCE, plan(step=3))
    assert first.save(str(tmp_path)).file.checksum != same[0]


@pytest.mark.parametrize("stage", stages(1))
def test_before_any_step_there_are_no_moments(stage: int, path: str, tmp_path: Path) -> None:
    settings = config(zero_stage=stage, dtype="bfloat16")
    learner = make_learner(path, settings)
    learner.save(str(tmp_path))
    for name, value in assembled(tmp_path).items():
        assert not name.endswith(("/step", "/exp_avg", "/exp_avg_sq")) or not torch.as_tensor(value).any(), name
    never_saved = live_on(make_learner(path, settings), str(tmp_path / "never saved"))
    trained = live_on(learner, str(tmp_path / "trained"))
    learner.restore(str(tmp_path), shards(1))
    back = live_on(learner, str(tmp_path / "back"))
    assert never_saved.checksum == trained.checksum == back.checksum


def commit(rank: int, ranks: int, port: int, path: str, settings: LearnerConfig, folder: str) -> dict[str, Tensor]:
    """Train, save, train on; the weights then."""
    learner = make_learner(path, settings, rank=rank, ranks=ranks, port=port)
    learner.update(EXPERIENCE, plan(step=0))
    learner.save(f"{folder}/saved")
    return live_on(learner, f"{folder}/trained on").weights


def move(
    rank: int, ranks: int, port: int, path: str, settings: LearnerConfig, files: list[str], folder: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Restore, save again, train on; the weights before and after."""
    learner = make_learner(path, settings, rank=rank, ranks=ranks, port=port)
    assert learner.restore(f"{folder}/saved", files).ranks == len(files)
    learner.save(f"{folder}/moved")
    return weights_of(learner) or {}, live_on(learner, f"{folder}/moved on").weights


MOVES = [
    ((2, 1), (1, 3), {}),
    pytest.param((1, 3), (2, 1), {"micro_batch_size": 3}, marks=pytest.mark.slow),
    pytest.param((2, 0), (2, 2), {"weight_decay": 0.1}, marks=pytest.mark.slow),
    pytest.param((2, 3), (1, 0), {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param((2, 2), (1, 2), {}, marks=pytest.mark.slow),
    pytest.param((1, 2), (2, 3), {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param((2, 3), (2, 1), {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param((2, 1), (2, 3), {"dtype": "bfloat16", "weight_decay": 0.1}, marks=pytest.mark.slow),
    pytest.param((1, 0), (2, 0), {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param((1, 1), (2, 2), {"weight_decay": 0.1, "micro_batch_size": 3}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("before", "after", "options"), MOVES)
def test_ranks_and_stage_can_change(
    before: tuple[int, int], after: tuple[int, int], options: dict[str, Any], path: str, tmp_path: Path
) -> None:
    (ranks, stage), (new_ranks, new_stage) = before, after
    old, new = (
        config(zero_stage=stage, weight_decay=options.get("weight_decay", 0.0), dtype=options.get("dtype", "float32")),
        config(**{"zero_stage": new_stage} | options),
    )
    want = on(ranks, commit, path, old, str(tmp_path))[0]
    restored, got = on(new_ranks, move, path, new, shards(ranks), str(tmp_path))[0]
    saved = assembled(tmp_path / "saved")
    assert_equal(assembled(tmp_path / "moved"), saved)
    for name, tensor in restored.items():
        assert torch.equal(
            tensor.flatten(), torch.as_tensor(saved[f"causal_lm.{name}/weight"]).to(getattr(torch, new.dtype)).float()
        ), name
    gap = torch.cat([(tensor - want[name]).abs().flatten() for name, tensor in got.items()])
    if new.dtype == "float32":
        assert float(gap.max()) < TOLERANCE
    # gradients are rounded in another order: that is a whole step where a moment is about zero, and little on average
    else:
        assert float(gap.mean()) < RATE / 20


# ---- what does not fit ----


def two_shards(learner: Learner, folder: Path) -> None:
    """A commit of two ranks, written by one process."""
    for rank in range(2):
        write_shard(
            Folder(folder),
            [f.part(rank, 2) for f in learner._engine.fragments()],
            role=learner.role,
            rank=rank,
            ranks=2,
        )


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change a shard's header and tensors."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["shard"])
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(header, tensors)
    save_file(tensors, file, {"shard": json.dumps(header)})


WTE = "causal_lm.transformer.wte.weight"


def without_a_range(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del header["parameters"][WTE]
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        del tensors[f"{WTE}/{kind}"]


def with_an_overlap(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    header["parameters"][WTE]["start"] -= 1


def without_a_moment(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[f"{WTE}/exp_avg"]


def of_another_size(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    header["parameters"][WTE]["numel"] += 1


def of_another_format(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    header["format"] = 2


DAMAGED = [
    (without_a_range, rf"must hold each of the 3072 elements of '{WTE}' once, got 0:1536 in rank-0.safetensors$"),
    (with_an_overlap, rf"of '{WTE}' once, got 0:1536 in rank-0.safetensors, 1535:3071 in rank-1.safetensors$"),
    (
        without_a_moment,
        rf"rank-1.safetensors: '{WTE}' must have weight, exp_avg, exp_avg_sq of one length, got shapes \[\[1536\], "
        r"None, \[1536\]\]$",
    ),
    (of_another_size, rf"of '{WTE}' once, got 0:1536 in rank-0.safetensors, 1536:3072 in rank-1.safetensors$"),
    (of_another_format, r"rank-1.safetensors: must be a shard that a learner wrote, format 1, got one that is not"),
]


@pytest.fixture(scope="module")
def learner(path: str) -> Learner:
    """One that has trained a step; every refusal must leave it as it is."""
    learner = make_learner(path, config(zero_stage=2))
    learner.update(EXPERIENCE, plan())
    return learner


def refused(learner: Learner, folder: Path, files: list[str], message: str) -> None:
    before, weights = learner.save(str(folder / "before")).file, weights_of(learner)
    with pytest.raises(ValueError, match=message):
        learner.restore(str(folder), files)
    assert learner.save(str(folder / "after")).file == before
    now = weights_of(learner)
    assert now is not None and weights is not None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in now.items())


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_commit_that_is_not_whole_is_refused(
    change: Callable[..., None], message: str, learner: Learner, path: str, tmp_path: Path
) -> None:
    two_shards(make_learner(path, config()), tmp_path)
    rewrite(tmp_path / "rank-1.safetensors", change)
    refused(learner, tmp_path, shards(2), message)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 0], [0, 1, 1], []])
def test_the_shards_must_be_all_of_one_commit(ranks: list[int], learner: Learner, path: str, tmp_path: Path) -> None:
    two_shards(make_learner(path, config()), tmp_path)
    message = (
        rf"must be given the shards of ranks 0 to 1, each once, got those of \[{', '.join(map(str, ranks))}\]"
        if ranks
        else "is missing from the shards"
    )
    refused(learner, tmp_path, [f"rank-{rank}.safetensors" for rank in ranks], message)


def test_the_commit_of_another_model_is_refused(learner: Learner, path: str, tmp_path: Path) -> None:
    wide = save_tiny_model(tmp_path / "wide model", width=64)
    others = {
        "critic": (
            make_learner(path, config(), trainee="critic"),
            r"critic/rank-0.safetensors: must be a shard of the policy, got one of the critic",
        ),
        "wide": (
            make_learner(wide, config()),
            r"'causal_lm.transformer.\S+' must have the model's \d+ elements, got \d+",
        ),
        "heads": (
            make_learner(path, config(trainable="heads")),
            r"hold the model's 28 trainable parameters, 'causal_lm.transformer.h.0\S+' is missing",
        ),
    }
    for name, (other, message) in others.items():
        other.save(str(tmp_path / name))
        refused(learner, tmp_path / name, shards(1), message)
    head = make_learner(path, config(trainable="heads"), trainee="critic")
    refused(
        head,
        tmp_path / "critic",
        shards(1),
        r"hold the model's 2 trainable parameters, 'trunk.h.0\S+' is unknown to the model",
    )


def test_a_file_that_is_no_shard_is_refused(learner: Learner, tmp_path: Path) -> None:
    (tmp_path / "rank-0.safetensors").write_bytes(b"something else")
    refused(learner, tmp_path, shards(1), "rank-0.safetensors: must be a shard that a learner wrote")
    save_file({"x": torch.zeros(1)}, tmp_path / "rank-0.safetensors")
    refused(learner, tmp_path, shards(1), "rank-0.safetensors: must be a shard that a learner wrote")
    with pytest.raises(FileNotFoundError, match="rank-1"):
        learner.restore(str(tmp_path), ["rank-1.safetensors"])


# ---- the model a run began with ----


def ready(rank: int, ranks: int, port: int, path: str, role: str, **options: Any) -> LearnerReady:
    spec = LearnerSpec(trainee=TRAINEES[role], path=path, config=config(**options), total_updates=1, seed=0)
    learner = Learner(spec=spec, rank=rank, ranks=ranks, timeout_s=30.0)
    return learner.connect("127.0.0.1", port or free_port())


def ready_in_two_stages(rank: int, ranks: int, port: int, path: str) -> list[str]:
    return [ready(rank, ranks, port, path, "policy", zero_stage=stage).checksum for stage in (1, 3)]


@pytest.mark.slow
def test_ready_has_the_checksum_of_the_model_as_it_was_loaded(path: str, tmp_path: Path) -> None:
    [alone] = {ready(0, 1, 0, path, "policy", zero_stage=stage).checksum for stage in STAGES}
    assert len(alone) == 32
    assert on(2, ready_in_two_stages, path) == [[alone, alone]] * 2
    other = save_tiny_model(tmp_path, seed=1)
    different = {
        ready(0, 1, 0, other, "policy").checksum,
        ready(0, 1, 0, path, "critic").checksum,
        ready(0, 1, 0, path, "policy", dtype="bfloat16").checksum,
    }
    assert len(different | {alone}) == 4
