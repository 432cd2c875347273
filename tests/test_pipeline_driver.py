"""The driver over real pools, gangs and files: order, accounts, failures, and that no token passes through it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from actors.experience import Experience
from cluster.faults import RunError
from cluster.session import Session
from cluster.stopping import Stopped
from cluster.storage import Folder
from driver_setup import config, fake_driver
from pipeline.algorithms.reinforce import Reinforce
from pipeline.config.run_config import RunConfig
from pipeline.folder.run_folder import read_history
from pipeline.loop.driver import Driver
from pipeline.observe.metrics import StepMetrics
from pipeline.report.ledger import show_account
from pipeline.samples.limits import too_many

ROOT = Path(__file__).parents[1]


def trained(run_dir: Path) -> list[int]:
    """Sample ids in the order the learner was given them."""
    return [int(line) for line in (run_dir / "seen").read_text().split()]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing happens."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with fake_driver(ray_session, config(), run_dir) as driver:
        driver.run(run_dir / "policy")
    return run_dir


def table_of(run_dir: Path, step: int) -> pa.Table:
    return Experience.read(run_dir / "experience" / f"step={step}" / "experience.parquet").table


def test_every_sample_is_trained_once_in_order(undisturbed: Path) -> None:
    assert trained(undisturbed) == list(range(36))
    steps = metrics(undisturbed)
    assert [m["version"] for m in steps] == [1, 2, 3]
    assert [m["ledger/trained"] for m in steps] == [12, 24, 36]
    assert {m["ledger/in_flight"] for m in steps} == {0}
    assert [m["kl/per_rollout"] for m in steps] == [0.75, None, None], (
        "without a reference it is estimated every algorithm.kl_every steps"
    )
    versions = [
        set(np.unique(table_of(undisturbed, step)["versions"].combine_chunks().flatten().to_numpy()).tolist())
        for step in range(3)
    ]
    assert versions == [{-1, 0}, {-1, 1}, {-1, 2}]


@pytest.mark.slow
def test_a_dead_rollout_worker_is_replaced_and_nothing_changes(
    ray_session: Session, undisturbed: Path, tmp_path: Path
) -> None:
    with fake_driver(ray_session, config(), tmp_path / "killed", die_at=str(tmp_path / "died")) as driver:
        driver.run(tmp_path / "policy")
        assert driver.roles.rollout.replaced == 1
        assert driver.ledger.account().reissued == 4, "the chunk that was given to another worker"
    assert (tmp_path / "died").exists()
    assert trained(tmp_path / "killed") == trained(undisturbed)
    for step in range(3):
        assert table_of(tmp_path / "killed", step).equals(table_of(undisturbed, step))


@pytest.mark.slow
def test_a_hanging_reward_worker_is_expired_and_replaced(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, config(call_timeout_s=20), tmp_path, hang_at=str(tmp_path / "hung")) as driver:
        driver.run(tmp_path / "policy")
        assert driver.roles.reward.replaced == 1
    assert trained(tmp_path) == list(range(36))


@pytest.mark.slow
def test_after_a_lost_input_the_same_worker_scores_again(ray_session: Session, tmp_path: Path) -> None:
    """What is lost too often takes the run back to its last commit; the one reward worker must not count as busy for
    ever.
    """
    with fake_driver(
        ray_session,
        config(steps=2, commit_every=1, max_attempts=1, call_timeout_s=30),
        tmp_path,
        lose_at=str(tmp_path / "lost"),
    ) as driver:
        [before] = driver.roles.reward.workers
        driver.run(tmp_path / "policy")
        assert driver.incidents.rolled_back == 1
        assert driver.roles.reward.workers == (before,)
    assert trained(tmp_path) == list(range(24))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("doing", "deadly"),
    [
        ("scoring", "deadly_to_score"),
        ("generating", "deadly_to_generate"),
        ("reference log-probs of", "deadly_to_reference"),
    ],
)
def test_a_sample_that_kills_its_worker_is_found_and_quarantined(
    ray_session: Session, tmp_path: Path, doing: str, deadly: str
) -> None:
    """Of chunk 1, which holds groups 2 and 3, sample 7 does it.

    Its group goes with it, a fresh one comes in, and the loss of some workers is one incident.
    """
    run, trouble = config(prompts=6, group_size=2, chunk=4, steps=2, max_attempts=2, max_replacements=1), {deadly: (7,)}
    run = run.model_copy(update={"algorithm": Reinforce(kl_coef=0.1 if deadly == "deadly_to_reference" else 0.0)})
    with fake_driver(ray_session, run, tmp_path, **trouble) as driver:  # type: ignore[arg-type]
        said: list[str] = []
        driver.observer.remark = said.append  # type: ignore[method-assign]
        driver.run(tmp_path / "policy")
        account = driver.ledger.account()
        assert driver.ledger.quarantined == {7: f"error: {doing} it killed its worker"}
    assert trained(tmp_path) == [*range(6), *range(8, 26)]
    assert (account.issued, account.trained, account.filtered, account.quarantined, account.in_flight) == (
        26,
        24,
        1,
        1,
        0,
    )
    assert [m["incident/searches"] for m in metrics(tmp_path)] == [1, 0]
    assert f"{doing} chunk 1 has killed or hung its workers 2 times; looking for the sample that does it" in said
    assert f"sample 7 is quarantined, not trained on: error: {doing} it killed its worker (all: raylign ledger)" in said


@pytest.mark.slow
def test_samples_that_kill_their_workers_in_numbers_end_the_run_by_the_limit_for_samples(
    ray_session: Session, tmp_path: Path
) -> None:
    run = config(prompts=6, group_size=1, chunk=6, steps=1, max_attempts=1, max_replacements=1)
    with (
        fake_driver(ray_session, run, tmp_path, deadly_to_generate=(0, 1, 2, 3)) as driver,
        pytest.raises(
            RunError,
            match=r"^rollout failed during 'generating': 2 of 6 samples are quarantined, more than reward.max_failed = "
            r"0.2 allows; sample 0: error: generating it killed its worker. See what the rollout workers' logs end",
        ),
    ):
        driver.run(tmp_path / "policy")


RAISED = "error: ValueError: no such word"
READ = "error: reference log-probs of it killed its worker"


@pytest.mark.parametrize(
    ("failed", "told"),
    [
        (
            {1: READ, 2: RAISED, 5: "error: scoring it hung its worker"},
            "reward failed during 'scoring': 3 of 8 samples "
            f"are quarantined (2 of them by the reward), more than reward.max_failed = 0.1 allows; sample 2: {RAISED}. "
            "Mend the reward function, or raise reward.max_failed",
        ),
        (
            {1: RAISED, 2: READ, 5: READ},
            "reference failed during 'reference log-probs': 3 of 8 samples are quarantined "
            f"(2 of them by the reference), more than reward.max_failed = 0.1 allows; sample 2: {READ}. See what the "
            "reference workers' logs end with",
        ),
    ],
)
def test_the_role_that_most_samples_failed_in_is_to_blame(failed: dict[int, str], told: str) -> None:
    assert str(too_many(failed, 8, 0.1)).startswith(told)


def test_a_sample_without_reward_is_quarantined_and_the_step_refilled(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, config(prompts=6, group_size=2, chunk=4, steps=2), tmp_path, fail=(5,)) as driver:
        driver.run(tmp_path / "policy")
        account = driver.ledger.account()
    assert trained(tmp_path) == [0, 1, 2, 3, *range(6, 26)]  # sample 4 went with its group; group 6 came in for it
    assert (account.issued, account.trained, account.filtered, account.quarantined, account.in_flight) == (
        26,
        24,
        1,
        1,
        0,
    )
    rewards = table_of(tmp_path, 0)["reward"].to_numpy()
    assert not np.isnan(rewards).any()


def dynamic(**options: Any) -> RunConfig:
    """Steps of 4 groups of 2 in chunks of 2 groups, groups without variance left out."""
    run = config(prompts=4, group_size=2, chunk=4, steps=2)
    return run.model_copy(update={"batch": run.batch.model_copy(update={"dynamic_sampling": True} | options)})


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_groups_without_variance_are_filtered_and_the_step_refilled(
    workers: int, ray_session: Session, tmp_path: Path
) -> None:
    """Groups 0 and 1 are all of chunk 0; 4 and 5 come in for them and are no better; 6 and 7 are good. Of the second
    step, group 9 has lost a sample.
    """
    run = dynamic()
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"workers": workers})})
    with fake_driver(ray_session, run, tmp_path, flat=(0, 1, 4, 5, 9, 10), fail=(19,)) as driver:
        driver.run(tmp_path / "policy")
        account, filtered = driver.ledger.account(), driver.ledger.filtered
    assert [s // 2 for s in trained(tmp_path)[::2]] == [2, 3, 6, 7, 8, 11, 12, 13]
    assert (account.issued, account.trained, account.filtered, account.quarantined, account.in_flight) == (
        28,
        16,
        11,
        1,
        0,
    )
    assert filtered == {"no variance": 10, "lost a member": 1}
    rewards = table_of(tmp_path, 0)["reward"].to_numpy().reshape(-1, 2)
    assert (rewards[:, 0] != rewards[:, 1]).all()
    out = io.StringIO()
    show_account(tmp_path, run, Console(file=out, width=200))
    shown = out.getvalue()
    assert "issued 28 = 16 + 11 + 1 + 0: balances\nevery sample below 28 has ended" in shown
    assert "filtered 1: lost a member\nfiltered 10: no variance\nquarantined 1: error: told to fail" in shown


@pytest.mark.slow
def test_groups_without_variance_are_kept_unless_they_are_to_be_left_out(ray_session: Session, tmp_path: Path) -> None:
    with fake_driver(ray_session, dynamic(dynamic_sampling=False), tmp_path, flat=(0, 1)) as driver:
        driver.run(tmp_path / "policy")
    assert trained(tmp_path) == list(range(16))


@pytest.mark.slow
def test_refills_that_do_not_end_stop_the_run_by_name(ray_session: Session, tmp_path: Path) -> None:
    """The first step and at most twice as much again: 12 groups, of which group 2 alone is good, and group 3 lost a
    sample.
    """
    flat = tuple(g for g in range(100) if g != 2)
    with (
        fake_driver(ray_session, dynamic(max_refills=2), tmp_path, flat=flat, fail=(6,)) as driver,
        pytest.raises(RunError) as caught,
    ):
        driver.run(tmp_path / "policy")
    assert "of 10 groups 8 have no variance in their scores and 1 lost a member, 3 of 4 are still missing" in str(
        caught.value
    )
    assert "batch.max_refills = 2" in str(caught.value)
    assert not (tmp_path / "seen").exists(), "nothing was trained on"


@pytest.mark.slow
@pytest.mark.parametrize(("options", "proximal"), [({}, -1.5), ({"decoupled": True}, -1.25)])
def test_the_learner_is_asked_for_its_own_log_probs_where_the_algorithm_needs_them(
    options: dict[str, Any], proximal: float, ray_session: Session, tmp_path: Path
) -> None:
    run = config(steps=1).model_copy(update={"algorithm": Reinforce(**options)})
    with fake_driver(ray_session, run, tmp_path, fail=(2,)) as driver:
        driver.run(tmp_path / "policy")
    table = table_of(tmp_path, 0)
    assert table["proximal_logprobs"].to_pylist() == [[0, 0, *[proximal] * 3]] * 12
    assert table["logprobs"].to_pylist() == [[0, 0, *[-1.5] * 3]] * 12


@pytest.mark.slow
def test_too_many_failed_rewards_stop_the_run_by_name(ray_session: Session, tmp_path: Path) -> None:
    with (
        fake_driver(ray_session, config(), tmp_path, fail=tuple(range(36))) as driver,
        pytest.raises(RunError, match=r"reward.*told to fail") as caught,
    ):
        driver.run(tmp_path / "policy")
    assert "reward.max_failed" in str(caught.value)
    assert not (tmp_path / "seen").exists(), "nothing was trained on"


@pytest.mark.slow
def test_a_step_is_the_same_for_every_chunk_order(ray_session: Session, undisturbed: Path, tmp_path: Path) -> None:
    """One worker or two, the learner sees the same table."""
    run = config(steps=1)
    assert run.rollout.workers == 2
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"workers": 1})})
    with fake_driver(ray_session, run, tmp_path) as driver:
        driver.run(tmp_path / "policy")
    assert table_of(tmp_path, 0).equals(table_of(undisturbed, 0))


@pytest.mark.slow
def test_no_token_passes_through_the_driver(tmp_path: Path) -> None:
    """Ten times the tokens (300 -> 3,000 a rollout, about 100 MB more a step) cost the driver under 50 MB; fetching
    them would cost more.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    out = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "driver_memory.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=800,
        env=environment,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    words = out.stdout.split()
    growth, control = float(words[1]), float(words[3])
    assert growth < 50, out.stdout
    assert control > 50, f"the measurement would not notice: {out.stdout}"


def steps_of(run_dir: Path) -> list[float]:
    return [m["step"] for m in metrics(run_dir)]


@pytest.mark.slow
@pytest.mark.parametrize(("die_step", "seen"), [(3, [0, 1, 2, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4, 5])])
def test_a_lost_learner_is_rebuilt_and_the_run_goes_on_from_the_last_commit(
    ray_session: Session, tmp_path: Path, die_step: int, seen: list[int]
) -> None:
    """Commits after steps 2, 4, 6; at step 1 there is none, so the run begins anew.

    Pool workers live on, the account balances.
    """
    run_dir = tmp_path / "run"
    learner = {"die_at": str(tmp_path / "died"), "die_step": die_step}
    with fake_driver(ray_session, config(steps=6, commit_every=2), run_dir, learner=learner) as driver:
        before = [worker.pid for worker in driver.roles.rollout.workers]
        driver.run(run_dir / "policy")
        assert [worker.pid for worker in driver.roles.rollout.workers] == before
        account = driver.ledger.check()
    assert trained(run_dir) == [sample for step in seen for sample in range(12 * step, 12 * step + 12)]
    assert steps_of(run_dir) == [0, 1, 2, 3, 4, 5], "the metrics of steps undone are replaced"
    assert (account.issued, account.trained, account.reissued) == (72, 72, 0)
    assert (run_dir / "policy" / "config.json").read_text() == "6"


@pytest.mark.slow
def test_a_learner_that_dies_again_and_again_stops_the_run_by_name(ray_session: Session, tmp_path: Path) -> None:
    run = config(steps=6, commit_every=2, max_rebuilds=2)
    with (
        fake_driver(ray_session, run, tmp_path / "run", learner={"die_step": 3}) as driver,
        pytest.raises(RunError) as caught,
    ):
        driver.run(tmp_path / "run" / "policy")
    assert (caught.value.who, caught.value.phase) == ("policy[0]", "update")
    assert "taken back 2 times in a row without a new commit (cluster.max_rebuilds = 2)" in str(caught.value)


@pytest.mark.slow
def test_a_learner_that_dies_while_it_starts_is_started_again(ray_session: Session, tmp_path: Path) -> None:
    """In its constructor, then in connect, then idle before the first weights; and on the way back to a commit, and in
    the export.
    """
    run_dir, die_in = tmp_path / "run", ("__init__", "connect", "publish", "export")
    with fake_driver(ray_session, config(steps=2, commit_every=1), run_dir, learner={"die_in": die_in}) as driver:
        assert (driver.rolled_back, driver.state.step, driver.roles.rollout.replaced) == (3, 0, 0)
        driver.run(run_dir / "policy")
        assert driver.incidents.rolled_back == 4
    with fake_driver(ray_session, config(steps=4, commit_every=1), run_dir, learner={"die_in": ("restore",)}) as driver:
        assert (driver.rolled_back, driver.state.step) == (1, 2)
        driver.run(run_dir / "policy")
        account = driver.ledger.check()
    assert trained(run_dir) == list(range(48))
    assert steps_of(run_dir) == [0, 1, 2, 3]
    assert (account.issued, account.trained, account.reissued) == (48, 48, 0)
    assert (run_dir / "policy" / "config.json").read_text() == "4"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("never_starts", "starts", "told"),
    [
        (
            "__init__",
            2,
            r"policy\[0\] failed during 'start': taken back 1 times in a row without a new commit "
            r"\(cluster.max_rebuilds = 1\)",
        ),
        (
            "connect",
            1,
            r"policy\[0\] failed during 'connect': the called code raised:\n(.*\n)*ValueError: a model that cannot be "
            r"loaded",
        ),
    ],
)
def test_a_learner_that_never_starts_stops_the_run(
    ray_session: Session, tmp_path: Path, never_starts: str, starts: int, told: str
) -> None:
    """At the limit where a process is to blame; at once where the code is."""
    run = config(max_rebuilds=1)
    with (
        pytest.raises(RunError, match=told),
        fake_driver(ray_session, run, tmp_path / "run", learner={"never_starts": never_starts}),
    ):
        pass
    assert (tmp_path / "run" / "starts").read_text() == f"{never_starts}\n" * starts


def after_step(driver: Driver, step: int, act: Callable[[], object]) -> None:
    """Have `act` called once the metrics of a step are written."""
    write = driver.observer.step

    def written(metrics: StepMetrics) -> None:
        write(metrics)
        if metrics.step == step:
            act()

    driver.observer.step = written  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_stop_commits_and_the_run_goes_on_as_if_nothing_had_been(ray_session: Session, tmp_path: Path) -> None:
    run_dir, run = tmp_path / "run", config(steps=5)
    with fake_driver(ray_session, run, run_dir) as driver:
        after_step(driver, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped) as stopped:
            driver.run(run_dir / "policy")
    assert (stopped.value.number, stopped.value.step) == (signal.SIGTERM, 3)
    with fake_driver(ray_session, run, run_dir) as driver:
        assert driver.state.step == 3
        driver.run(run_dir / "policy")
    assert trained(run_dir) == list(range(60))
    assert steps_of(run_dir) == [0, 1, 2, 3, 4]
    assert [m["version"] for m in metrics(run_dir)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_stop_does_not_wait_for_rollouts(ray_session: Session, tmp_path: Path) -> None:
    """A reward that hangs in step 1 would take ten minutes; the state after step 0 is committed at once."""
    run_dir, hung = tmp_path / "run", tmp_path / "hung"
    with fake_driver(ray_session, config(steps=5), run_dir, hang_at=str(hung), hang_chunk=4) as driver:
        driver.pump.add_tick(
            lambda: os.kill(os.getpid(), signal.SIGINT) if hung.exists() and not driver.stop else None, every_s=0.1
        )
        started = time.monotonic()
        with pytest.raises(Stopped) as stopped:
            driver.run(run_dir / "policy")
    assert time.monotonic() - started < 300, "the reward would sleep for 600 s"
    assert (stopped.value.number, stopped.value.step) == (signal.SIGINT, 1)
    with fake_driver(ray_session, config(steps=5), run_dir) as driver:
        driver.run(run_dir / "policy")
    assert trained(run_dir) == list(range(60))


@pytest.mark.slow
def test_a_run_whose_folder_was_taken_over_stops_and_commits_nothing_more(ray_session: Session, tmp_path: Path) -> None:
    run_dir, run = tmp_path / "run", config(steps=4, commit_every=1)

    def take_over() -> None:
        history = read_history(run_dir)
        later = history[-1].model_copy(update={"number": 2, "from_step": 1, "pid": 4711})
        Folder(run_dir).write_text("history.json", json.dumps([epoch.model_dump() for epoch in (*history, later)]))

    with fake_driver(ray_session, run, run_dir) as driver:
        after_step(driver, 1, take_over)
        with pytest.raises(RunError, match=r"process 4711 on .* has taken over"):
            driver.run(run_dir / "policy")
    assert Folder(run_dir / "checkpoints").folders() == ["step=00000001-epoch=0001", "step=00000002-epoch=0001"]
    assert not (run_dir / "checkpoints" / "step=00000002-epoch=0001" / "commit.json").exists()


@pytest.mark.slow
def test_a_commit_is_not_restored_into_another_model(ray_session: Session, tmp_path: Path) -> None:
    run_dir, run = tmp_path / "run", config(steps=2, commit_every=1)
    with fake_driver(ray_session, run, run_dir, learner={"model": "one"}) as driver:
        driver.run(run_dir / "policy")
    other = "the model it starts from is not the one that commit step=00000002-epoch=0001 belongs to"
    with pytest.raises(RunError, match=other):  # noqa: SIM117 (it is raised on entering)
        with fake_driver(ray_session, run, run_dir, learner={"model": "another"}):
            pass
