"""DeepSpeed as we pin it: steps on all ranks or none, bounded waits, no compiler, no surprise defaults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.config import LearnerConfig
from actors.learner.deepspeed_engine import _assert_settings
from actors.learner.learner import Learner, LearnerSpec
from actors.learner.trainees.policy import PolicyTrainee
from learner_helpers import (
    POISON,
    STAGES,
    Gang,
    PolicyGradient,
    gang_of,
    make_experience,
    make_learner,
    pair,
    plan,
    replace,
    save_tiny_model,
    stages,
    train_on,
    weights_of,
)

DTYPES = ("float32", "bfloat16")


BAD = [
    pytest.param(
        value,
        dtype,
        stage,
        marks=[] if (value, dtype, stage) in ((POISON, "float32", 3), (POISON, "bfloat16", 1)) else pytest.mark.slow,
    )
    for value in (POISON, float("nan"))
    for dtype in DTYPES
    for stage in STAGES
]


def config(**options: Any) -> LearnerConfig:
    return LearnerConfig(**({"learning_rate": 1e-3, "micro_batch_size": 2, "schedule": "constant"} | options))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


def poisoned(value: float) -> pa.Table:
    """One rollout of eight has one token that poisons its rank's gradient: POISON with a finite loss, NaN with a NaN
    one.
    """
    table = make_experience(8, seed=2)
    rows = table["advantages"].to_pylist()
    rows[3][-1] = value
    return replace(table, "advantages", rows)


@pytest.mark.parametrize(("value", "dtype", "stage"), BAD)
def test_a_bad_gradient_on_one_rank_is_skipped_on_all_and_leaves_no_trace(
    value: float, dtype: str, stage: int, path: str
) -> None:
    settings, clean = config(zero_stage=stage, dtype=dtype), make_experience(8, seed=3)
    course = [plan(step=i, epochs=1, minibatches=1) for i in range(3)]
    untouched = train_on(2, path, settings, [poisoned(value)], course[:1])
    assert [(r.updates, r.skipped, r.grad_norm) for r in untouched.reports] == [(0, 1, 0.0)]
    start = weights_of(make_learner(path, settings))
    assert start is not None
    assert all(torch.equal(tensor, start[name]) for name, tensor in untouched.weights.items())
    # Skipped before, between and after clean steps: what the clean ones do is the same to the bit.
    tables = [clean, poisoned(value), clean]
    mixed = train_on(
        2,
        path,
        settings,
        [poisoned(value), *tables, poisoned(value)],
        [course[0], course[1], course[0], course[2], course[0]],
    )
    alone = train_on(2, path, settings, [clean, clean], course[1:])
    assert [r.skipped for r in mixed.reports] == [1, 0, 1, 0, 1]
    assert [r.grad_norm for r in mixed.reports if r.updates] == [r.grad_norm for r in alone.reports]
    assert all(torch.equal(tensor, alone.weights[name]) for name, tensor in mixed.weights.items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in alone.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_gradients_whose_norm_overflows_float32_do_no_harm(stage: int, dtype: str, path: str) -> None:
    course = plan(epochs=1, minibatches=1)
    got = train_on(2, path, config(zero_stage=stage, dtype=dtype), [poisoned(1e30)], [course])
    [report] = got.reports
    # ZeRO-3 alone takes the norm in float64, and clips
    assert (report.updates, report.skipped) == ((1, 0) if stage == 3 else (0, 1))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in got.weights.values())


def test_a_finite_loss_with_an_infinite_gradient_is_what_poison_is(path: str) -> None:
    [report] = train_on(1, path, config(), [poisoned(POISON)], [plan(epochs=1, minibatches=1)]).reports
    assert report.skipped == 1
    assert abs(report.loss) < 100


@pytest.mark.parametrize("stage", stages(1, 3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_settings_that_decide_the_numbers_are_read_back(stage: int, dtype: str, path: str) -> None:
    learner = make_learner(path, config(zero_stage=stage, dtype=dtype, max_grad_norm=0.25))
    engine = learner._engine._engine
    for wrong in (
        {"max_grad_norm": 1.0},
        {"zero_stage": (stage + 1) % 4},
        {"adam_epsilon": 1e-8},
        {"dtype": DTYPES[dtype == "float32"]},
    ):
        settings = {"zero_stage": stage, "dtype": dtype, "max_grad_norm": 0.25} | wrong
        with pytest.raises(AssertionError, match=r"asked for|AdamW runs with"):
            _assert_settings(engine, config(**settings), 1)


@pytest.mark.slow
def test_no_compiler_is_needed_and_nothing_is_compiled(path: str, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from learner_helpers import make_experience, make_learner, plan
from actors.config import LearnerConfig
learner = make_learner({path!r}, LearnerConfig(zero_stage=1))
print("updates", learner.update(make_experience(6), plan(epochs=1, minibatches=1)).updates)
"""
    extensions = tmp_path / "extensions"
    environment = {
        "PATH": str(tmp_path / "nothing"),
        "HOME": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "updates 1\n", "stdout belongs to the caller; DeepSpeed's own words go to stderr"
    assert not extensions.exists() or not list(extensions.rglob("*.so")), "nothing may be compiled"


_kept: list[Learner] = []  # a rank's learner between two calls of a test


def connect(rank: int, ranks: int, port: int, path: str, stage: int, timeout_s: float) -> int:
    _kept[:] = [make_learner(path, config(zero_stage=stage), rank=rank, ranks=ranks, port=port, timeout_s=timeout_s)]
    return os.getpid()


def step(rank: int, ranks: int, port: int) -> int:
    return _kept[0].update(make_experience(8), plan(epochs=1, minibatches=1)).updates


def ask(gang: Gang, rank: int) -> None:
    gang._pipes[rank].send((step, ()))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])
def test_a_stopped_peer_cannot_block_for_ever(stage: int, path: str) -> None:
    with gang_of(2) as gang:
        pids = gang.run(connect, path, stage, 3.0)
        assert gang.run(step) == [1, 1]
        os.kill(pids[1], signal.SIGSTOP)
        started = time.monotonic()
        ask(gang, 0)
        with pytest.raises(RuntimeError, match="rank 0: "):
            gang.answer(0, 45.0)
        assert time.monotonic() - started < 45, "torch's own default would be 30 minutes"


@pytest.mark.slow
def test_a_killed_peer_is_noticed_at_once(path: str) -> None:
    with gang_of(2) as gang:
        pids = gang.run(connect, path, 2, 60.0)
        os.kill(pids[1], signal.SIGKILL)
        ask(gang, 0)
        with pytest.raises(RuntimeError, match="rank 0: "):
            gang.answer(0, 30.0)


def test_every_process_group_has_the_deadline(path: str) -> None:
    assert {t for times in pair().run(deadlines, path) for t in times} == {17.0}


def deadlines(rank: int, ranks: int, port: int, path: str) -> list[float]:
    from torch.distributed import distributed_c10d as c10d

    make_learner(path, config(zero_stage=3), rank=rank, ranks=ranks, port=port, timeout_s=17.0)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in c10d._world.pg_map]


@pytest.mark.slow
def test_ranks_that_rightly_differ_wait_for_each_other_beyond_the_deadline_of_a_collective(path: str) -> None:
    """Rank 1 takes longer to load its model, then rank 0 to write: each by more than a collective may take, and with
    ZeRO 3 the next thing is one.
    """
    assert pair().run(uneven, path) == [(1, True), (1, True)]


def uneven(rank: int, ranks: int, port: int, path: str) -> tuple[int, bool]:
    time.sleep(8 * (rank == 1))  # long enough for a rank 0 that itself comes late
    began = time.monotonic()
    learner = make_learner(path, config(zero_stage=3), rank=rank, ranks=ranks, port=port, timeout_s=3.0)
    met_late = rank == 1 or time.monotonic() - began > 3.0
    time.sleep(8 * (rank == 0))
    learner.await_peers()
    return learner.update(make_experience(4), plan(epochs=1, minibatches=1)).updates, met_late


def test_a_process_group_that_exists_is_taken_over(path: str) -> None:
    with gang_of(1) as gang:
        wrong, updates, timeouts = gang.run(take_over, path)[0]
    assert wrong == "one process belongs to one gang: it is rank 0 of 1, told to be 1 of 2"
    assert updates == 1
    assert set(timeouts) == {17.0}, "also of the group that was there before, made with torch's 30 minutes"


def take_over(rank: int, ranks: int, port: int, path: str) -> tuple[str, int, list[float]]:
    """As in a worker of Ray Train: somebody else has made the group, and `connect` is given no address."""
    from torch.distributed import distributed_c10d as c10d

    def learner(rank: int, ranks: int) -> Learner:
        trainee = PolicyTrainee(objective=PolicyGradient())
        spec = LearnerSpec(trainee=trainee, path=path, config=config(zero_stage=2), total_updates=1, seed=0)
        return Learner(spec=spec, rank=rank, ranks=ranks, timeout_s=17.0)

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    with pytest.raises(AssertionError) as wrong:
        learner(1, 2).connect()
    ours = learner(rank, ranks)
    ours.connect()
    report = ours.update(make_experience(4), plan(epochs=1, minibatches=1))
    return (
        str(wrong.value),
        report.updates,
        [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in c10d._world.pg_map],
    )
