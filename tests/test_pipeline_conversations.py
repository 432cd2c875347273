"""Conversations in the ordinary pipeline: whole runs with an environment, and what is broken off, killed or failed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from actors.config import RewardConfig, RolloutConfig
from actors.experience import Experience
from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.session import Session
from conversation_helpers import acting, assembled, killed_in_conversation, recipe, talk
from entry_point import raylign
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.shaping import ShapingConfig
from pipeline.config.recipe import load
from pipeline.run.start import resume, run_stages
from run_helpers import ROOT, assert_same, final_commit, metrics_of, quiet

# ---- the experience of conversations, against slow loops ----


def test_returns_cross_turns_and_the_environments_tokens_are_as_if_cut_out() -> None:
    """The numbers of a published report: mask 1 1 0 0 1 1, reward 1 at the end, gamma .5."""
    plain = Reinforce(gamma=0.5, whiten_advantages=False)
    one = talk([0.0, 0.0], [0.0, 0.0], rewards=[0.0, 1.0])
    assert acting(assembled(plain, one)[1][0], "returns") == [0.125, 0.25, 0.5, 1.0]
    spoilt = assembled(plain, one, noise=3.0)[1][0]
    assert spoilt["returns"] == assembled(plain, one)[1][0]["returns"]
    assert spoilt["advantages"] == assembled(plain, one)[1][0]["advantages"]


def test_each_turns_reward_is_credited_at_its_own_last_token_also_if_it_is_zero() -> None:
    plain = Reinforce(gamma=0.5, whiten_advantages=False)
    row = assembled(plain, talk([0.0, 0.0], [0.0], [0.0, 0.0], rewards=[2.0, 0.0, 4.0]))[1][0]
    rewards, expected, after = [0, 2, 0, 0, 4], [], 0.0
    for reward in reversed(rewards):
        after = reward + 0.5 * after
        expected.insert(0, after)
    assert acting(row, "returns") == expected
    assert row["turn_rewards"] == [2.0, 0.0, 4.0]


def test_what_was_broken_off_is_worth_what_would_follow_and_what_ended_is_not() -> None:
    ppo = PPO(gamma=0.9, lam=0.8, whiten_advantages=False)
    values = ([1.0, 2.0], [3.0])
    for end, after in (("terminated", 0.0), ("truncated", 7.0), ("max_turns", 7.0), ("no_room", 0.0)):
        row = assembled(ppo, talk(*values, end=end, rewards=[1.0, 5.0]))[1][0]
        flat, rewards, expected, running = [1.0, 2.0, 3.0, after], [0.0, 1.0, 5.0], [], 0.0
        for t in (2, 1, 0):
            running = rewards[t] + 0.9 * flat[t + 1] - flat[t] + 0.9 * 0.8 * running
            expected.insert(0, running)
        np.testing.assert_allclose(acting(row, "advantages"), expected, rtol=1e-5, err_msg=end)


def test_shaping_acts_on_the_whole_and_is_credited_at_the_very_end() -> None:
    plain = Reinforce(whiten_advantages=False)
    row = assembled(plain, talk([0.0], [0.0], rewards=[3.0, 4.0]), shaping=ShapingConfig(clip=5.0))[1][0]
    assert acting(row, "returns") == [5.0, 2.0]  # 3, and 4 - 2 that are clipped
    assert row["reward"] == 7.0


def test_a_conversation_of_one_turn_is_what_a_single_reply_is() -> None:
    for algorithm in (PPO(whiten_advantages=False), Reinforce(), GRPO()):
        talks = [talk([0.5, 0.25, 1.0], rewards=[2.0]), talk([1.0], rewards=[-1.0])]
        there = assembled(algorithm, *talks)[1]
        here = assembled(algorithm, *talks, are_replies=True)[1]
        for a, b in zip(there, here, strict=True):
            assert (a["advantages"], a["returns"]) == (b["advantages"], b["returns"])


def test_the_report_tells_of_conversations() -> None:
    report, _ = assembled(
        Reinforce(), talk([0.0, 0.0], [0.0], rewards=[1.0, 3.0]), talk([0.0], end="max_turns", rewards=[0.0])
    )
    assert report.conversation == {
        "turns": 1.5,
        "tokens_per_turn": 4 / 3,
        "terminated": 0.5,
        "broken_off": 0.5,
        "no_room": 0.0,
        "reward_of_turn_1": 0.5,
        "reward_of_turn_2": 3.0,
        "info/good": 2 / 3,
    }


# ---- whole runs ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_gpt2(tmp_path_factory.mktemp("models") / "policy", context=96)


@pytest.fixture(scope="module")
def whole(ray_session: Session, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run_stages(recipe(model), run_dir, quiet())
    return run_dir


@pytest.mark.slow
def test_a_run_over_conversations_is_logged_accounted_for_and_evaluated(whole: Path) -> None:
    last = metrics_of(whole)[-1]
    assert last["conversation/turns"] > 1
    assert last["conversation/terminated"] + last["conversation/broken_off"] == pytest.approx(1)
    assert "conversation/info/letters" in last
    table = Experience.read(whole / "experience" / "step=3" / "experience.parquet").table.to_pylist()
    for row in table:
        turns = json.loads(row["metadata"])["conversation"]["turns"]
        assert row["turn_rewards"] == pytest.approx([turn["reward"] for turn in turns])
        assert row["reward"] == pytest.approx(sum(row["turn_rewards"]))
        assert len(row["turn_starts"]) == len(turns) <= 3
    found = json.loads((whole / "evaluation.json").read_text())
    assert set(found["judges"]) == {"environment"}
    assert "issued 64 = 64 + 0 + 0 + 0: balances" in raylign("ledger", str(whole), cwd=ROOT).out


@pytest.mark.slow
def test_another_number_of_workers_gives_the_same_bits(whole: Path, model: Path, tmp_path: Path) -> None:
    rollout = RolloutConfig(chunk_size=8, slots=8, workers=2)
    run_stages(recipe(model, rollout=rollout), tmp_path / "run", quiet())
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_resumed_from_the_commit_in_the_middle_it_is_the_same_to_the_bit(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "policy")
    for commit in (run_dir / "checkpoints").iterdir():
        if int(commit.name[5:13]) > 2:
            shutil.rmtree(commit)
    resume(load(run_dir / "config.toml"), run_dir, (), quiet())
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_a_rollout_worker_killed_in_the_middle_of_conversations_changes_no_bit(
    whole: Path, model: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with killed_in_conversation(run_dir, "rollout[0]", after_step=0):
        run_stages(recipe(model, "Held"), run_dir, quiet())
    assert final_commit(run_dir).state.ledger.reissued > 0, "it died while it had work"
    assert_same(run_dir, whole, reissued=True)


@pytest.mark.slow
def test_a_conversation_that_kills_its_worker_is_quarantined_and_the_account_balances(
    ray_session: Session, model: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_stages(
        recipe(model, "Deadly", steps=2, cluster=ClusterConfig(cpus_per_bundle=1, max_attempts=1)), run_dir, quiet()
    )
    ledger = final_commit(run_dir).state.ledger
    assert ledger.quarantined
    assert all("killed" in why or "process" in why for why in ledger.quarantined.values()), ledger.quarantined
    assert "balances" in raylign("ledger", str(run_dir), cwd=ROOT).out


@pytest.mark.slow
def test_an_environment_that_fails_is_named_when_too_many_samples_fail(
    ray_session: Session, model: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_stages(recipe(model, "Broken", steps=2), run_dir, quiet())
    ledger = final_commit(run_dir).state.ledger
    assert set(ledger.quarantined.values()) == {"error: environment: the partner has no answer"}
    with pytest.raises(RunError, match=r"environment failed during 'conversing'.*Mend the environment"):
        run_stages(recipe(model, "Broken", steps=2, reward=RewardConfig(max_failed=0.01)), tmp_path / "less", quiet())
