"""Runs with a manager that chooses an option for each turn: both levels learn, are committed, lost and restored."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

import tiny_models
from actors.config import ManagerConfig
from actors.experience import Experience, Rollouts
from actors.manager.turns import Turns
from actors.models.option_names import TRAINED_HEAD
from cluster.session import Session
from conversation_helpers import acting, assembled, killed_in_conversation, talk
from conversation_helpers import recipe as flat_recipe
from entry_point import raylign
from pipeline.algorithms.ppo import PPO
from pipeline.assembly.hierarchy import manager_turns
from pipeline.cli import main
from pipeline.config.recipe import load
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import EvaluationConfig
from pipeline.run import replay
from pipeline.run.start import resume, run_stages
from run_helpers import ROOT, assert_same, final_commit, metrics_of, quiet

OPTIONS = ("soft", "loud", "short")


def recipe(model: Path, environment: str = "Mirror", **changes: Any) -> RunConfig:
    manager = ManagerConfig(
        options=OPTIONS, learning_rate=0.01, minibatch_size=16, check="talk_helpers:is_loud", check_coef=0.1
    )
    return flat_recipe(model, environment, **{"manager": manager, **changes})


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
def test_both_levels_learn_and_every_turn_has_its_option(whole: Path) -> None:
    last = metrics_of(whole)[-1]
    assert last["manager/ratio_deviation"] < 1e-5
    assert last["manager/grad_norm"] > 0
    assert sum(last[f"option/usage_{name}"] for name in OPTIONS) == pytest.approx(1)
    assert 0 < last["option/entropy"] <= np.log(3) + 1e-9
    assert 0 <= last["option/check"] <= 1
    tokenizer = json.loads((whole / "policy" / "tokenizer.json").read_text())
    control = {word["content"]: word["id"] for word in tokenizer["added_tokens"]}
    rows = Experience.read(whole / "experience" / "step=3" / "experience.parquet").table.to_pylist()
    for row in rows:
        turns = json.loads(row["metadata"])["conversation"]["turns"]
        assert len(row["option"]) == len(row["option_logprobs"]) == len(turns) == len(row["turn_starts"])
        assert len(row["option_features"]) == 32 * len(turns)
        assert len(row["last_features"]) == (
            32 if json.loads(row["metadata"])["conversation"]["end"] == "max_turns" else 0
        )
        for option, start, turn in zip(row["option"], row["turn_starts"], turns, strict=True):
            assert turn["option"] == OPTIONS[option]
            assert row["tokens"][start - 1] == control[f"<|option:{OPTIONS[option]}|>"]
            assert not row["action_mask"][start - 1]
        sampled = [token for token, acted in zip(row["tokens"], row["action_mask"], strict=True) if acted]
        assert not set(sampled) & set(control.values()) - {256}
    head = load_file(whole / "policy" / "option-head.safetensors")
    assert head["policy_weight"].shape == (3, 32)
    assert np.abs(head["policy_weight"]).max() > 0
    assert json.loads((whole / "policy" / "config.json").read_text())[TRAINED_HEAD] == "option-head.safetensors"
    assert TRAINED_HEAD not in json.loads((whole / "start-with-options" / "config.json").read_text())
    assert set(final_commit(whole).shards) == {"policy", "critic", "manager"}
    assert json.loads((whole / "evaluation.json").read_text())["judges"].keys() == {"environment"}
    assert "balances" in raylign("ledger", str(whole), cwd=ROOT).out


@pytest.mark.slow
def test_resumed_from_the_commit_in_the_middle_it_is_the_same_to_the_bit(whole: Path, tmp_path: Path) -> None:
    run_dir = resumed_from_the_middle(whole, tmp_path)
    assert_same(run_dir, whole)
    name = "option-head.safetensors"
    assert (run_dir / "policy" / name).read_bytes() == (whole / "policy" / name).read_bytes()


def resumed_from_the_middle(whole: Path, folder: Path) -> Path:
    run_dir = folder / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "policy")
    for commit in (run_dir / "checkpoints").iterdir():
        if int(commit.name[5:13]) > 2:
            shutil.rmtree(commit)
    resume(load(run_dir / "config.toml"), run_dir, (), quiet())
    return run_dir


@pytest.mark.slow
def test_ahead_of_the_learners_conversations_are_had_with_the_head_of_their_version(
    ray_session: Session, model: Path, tmp_path: Path
) -> None:
    """A commit has the older head beside the older weights, or the options of what is made again would be others."""
    run_stages(recipe(model, max_staleness=1), tmp_path / "whole", quiet())
    run_dir = resumed_from_the_middle(tmp_path / "whole", tmp_path)
    assert_same(run_dir, tmp_path / "whole", reissued=True)
    last = metrics_of(run_dir)[-1]
    assert last["staleness/versions"] == 1
    assert last["manager/ratio_deviation"] > 1e-4, "its options were chosen by the head before"


@pytest.mark.slow
def test_the_discriminator_is_committed_and_resumed_to_the_bit(
    ray_session: Session, model: Path, tmp_path: Path
) -> None:
    """One step and one more are two. Other options are on offer in each turn."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    base = recipe(model, "Picky", steps=2, commit_every=1, evaluation=EvaluationConfig(prompts=2, samples=1, best_of=1))
    manager = base.manager.model_copy(update={"diversity_coef": 0.2, "discriminator_learning_rate": 0.1})
    run_stages(base.model_copy(update={"manager": manager}), whole, quiet())
    first, second = metrics_of(whole)
    assert first["manager/diversity_reward"] == pytest.approx(0, abs=1e-7), "untrained, it knows nothing"
    assert abs(second["manager/diversity_reward"]) > 1e-4
    assert 0 < second["manager/discriminator_loss"] < np.log(3)
    assert 1 / 3 < second["manager/discriminator_accuracy"] <= 1

    experience, gains = Experience.read(whole / "experience" / "step=1" / "experience.parquet"), []
    assembled_again = replay._advantages(load(whole / "config.toml"), experience, second["kl/coef"])
    assert all(column.is_same for column in assembled_again), "a replay knows what was paid"
    for row in experience.table.to_pylist():
        offered = np.array(row["options_offered"]).reshape(-1, 3)
        assert offered.sum(1).tolist() == [3 - turn % 3 for turn in range(len(offered))]
        gains += [log_q + np.log(count) for log_q, count in zip(row["turn_log_q"], offered.sum(1), strict=True)]
    assert second["manager/diversity_reward"] == pytest.approx(0.2 * np.mean(gains), abs=1e-6)

    shutil.copytree(whole, run_dir)
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "policy")
    [last] = [commit for commit in (run_dir / "checkpoints").iterdir() if int(commit.name[5:13]) == 2]
    shutil.rmtree(last)
    resume(load(run_dir / "config.toml"), run_dir, (), quiet())
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_a_replay_finds_what_was_recorded_to_the_bit(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Step 3 from the commit after step 2, with the manager that was there."""
    assert main(["replay", str(whole), "--step", "3"]) == 0
    assert re.search(r"\d\d numbers computed again: the same to the bit", capfd.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["manager[0]", "rollout[0]"])
def test_killed_in_the_middle_of_conversations_changes_no_bit(
    whole: Path, model: Path, tmp_path: Path, who: str
) -> None:
    run_dir = tmp_path / "run"
    with killed_in_conversation(run_dir, who, after_step=1):
        run_stages(recipe(model, "Held"), run_dir, quiet())
    assert_same(run_dir, whole, reissued=True)
    assert metrics_of(run_dir)[-1]["incident/rolled_back" if who == "manager[0]" else "incident/replaced_workers"] == 1


# ---- the experience of both levels ----


def test_one_option_one_turn_and_a_manager_without_a_view_is_flat_ppo_to_the_bit() -> None:
    """The manager's value is 0, so its advantage of the only turn is the reward; nothing else pays the worker."""
    talks = [talk([0.5, 0.25, 1.0], rewards=[2.0]), talk([1.0], rewards=[-1.0]), talk([0.0, 0.0], rewards=[0.0])]
    ppo = PPO(lam=0.95, gamma=1.0)
    flat, levels = assembled(ppo, *talks)[1], assembled(ppo, *talks, advantages=[[2.0], [-1.0], [0.0]])[1]
    for a, b in zip(flat, levels, strict=True):
        assert (a["advantages"], a["returns"]) == (b["advantages"], b["returns"])


def test_the_worker_is_paid_by_the_managers_advantage_and_its_check_and_begins_anew_in_each_turn() -> None:
    one = talk([1.0, 2.0], [3.0], rewards=[5.0, 7.0], checks=[1.0, 0.0])
    ppo = PPO(whiten_advantages=False)
    [row] = assembled(ppo, one, advantages=[[0.5, -0.25]], check_coef=0.1)[1]
    last = 0.5 + 0.1 - 2.0
    first = 0.0 + 2.0 - 1.0 + 0.95 * last
    np.testing.assert_allclose(acting(row, "advantages"), [first, last, -0.25 - 3.0], rtol=1e-6)
    [other] = assembled(ppo, dict(one, rewards=[0.0, 100.0]), advantages=[[0.5, -0.25]], check_coef=0.1)[1]
    assert other["advantages"] == row["advantages"], "extrinsic rewards reach the worker through the manager alone"


def test_the_managers_turns_are_in_the_order_of_samples_and_say_how_each_conversation_ended() -> None:
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    step = option_step(
        ids=[9, 4, 7],
        options=[[1], [0, 2], [1, 1, 0]],
        rewards=[[0.5], [1.0, 2.0], [0.0, 0.0, 3.0]],
        features=[features[:1], features[1:3], features[3:]],
        after=[[7.0, 8.0], [], []],
    )
    table = Turns(manager_turns(*step, ManagerConfig(options=OPTIONS))).table.to_pydict()
    assert table["sample_id"] == [4, 4, 7, 7, 7, 9]
    assert table["turn"] == [0, 1, 0, 1, 2, 0]
    assert table["option"] == [0, 2, 1, 1, 0, 1]
    assert table["reward"] == [1.0, 2.0, 0.0, 0.0, 3.0, 0.5]
    assert table["terminated"] == [False, True, False, False, True, False]
    assert table["truncated"] == [False, False, False, False, False, True]
    assert table["last_features"] == [[], [], [], [], [], [7.0, 8.0]]
    np.testing.assert_array_equal(table["features"], [*features[1:3], *features[3:], features[0]])
    assert table["utterance"] == [[]] * 6


def test_the_discriminator_hears_the_tokens_that_the_policy_sampled_and_no_others() -> None:
    """No prompt, no line of the environment, no control token before a turn: it would give the option away."""
    control, env = 90, 80
    rows = {
        7: ([1, control, 11, 12, env, env, control, 13, env], [3, 8], [2, 7]),
        4: ([1, 1, control, 21, env, control, 22, 23, 24], [4, 9], [3, 6]),
        9: ([control, 31], [2], [1]),
    }
    acted = {sample: [token not in (1, control, env) for token in tokens] for sample, (tokens, _, _) in rows.items()}
    count = {sample: len(starts) for sample, (_, _, starts) in rows.items()}
    rollouts = option_step(
        ids=list(rows),
        options=[[0] * count[sample] for sample in rows],
        rewards=[[0.0] * count[sample] for sample in rows],
        features=[np.zeros((count[sample], 2), np.float32) for sample in rows],
        after=[[]] * 3,
        tokens=[tokens for tokens, _, _ in rows.values()],
        acted=list(acted.values()),
        starts=[starts for _, _, starts in rows.values()],
    )
    found = manager_turns(*rollouts, ManagerConfig(options=OPTIONS, diversity_coef=0.1))
    assert found["utterance"].to_pylist() == [[21], [22, 23, 24], [11, 12], [13], [31]]
    assert found["sample_id"].to_pylist() == [4, 4, 7, 7, 9]
    sliced = manager_turns(rollouts[0].slice(1), rollouts[1].slice(1), ManagerConfig(options=OPTIONS, diversity_coef=1))
    assert sliced["utterance"].to_pylist() == [[21], [22, 23, 24], [31]]


def test_the_worker_is_paid_for_what_the_discriminator_knew_among_the_options_on_offer() -> None:
    """At each turn's last token, 0.5 (log q + log of the number on offer) beside the manager's advantage and check."""
    talks = [talk([1.0, 2.0], [3.0], rewards=[5.0, 7.0], checks=[1.0, 0.0]), talk([4.0], rewards=[1.0], checks=[0.0])]
    how: dict[str, Any] = {"advantages": [[0.5, -0.25], [1.0]], "check_coef": 0.1}
    ppo = PPO(whiten_advantages=False)
    heard = {"log_q": [[np.log(0.9), np.log(0.25)], [0.0]], "offered": [["abc", "bc"], ["b"]]}
    rows = assembled(ppo, *talks, **how, **heard, diversity_coef=0.5)[1]
    first, second, alone = 0.5 * np.log(0.9 * 3), 0.5 * np.log(0.25 * 2), 0.0
    last = 0.5 + 0.1 + first - 2.0
    expected = [0.0 + 2.0 - 1.0 + 0.95 * last, last, -0.25 + second - 3.0]
    np.testing.assert_allclose(acting(rows[0], "advantages"), expected, rtol=1e-6)
    np.testing.assert_allclose(acting(rows[1], "advantages"), [1.0 + alone - 4.0], rtol=1e-6)
    np.testing.assert_allclose(rows[0]["turn_log_q"], heard["log_q"][0], rtol=1e-6)
    assert [row["turn_advantages"] for row in rows] == [[0.5, -0.25], [1.0]], "the manager's own are as they were"
    assert [row["turn_rewards"] for row in rows] == [[5.0, 7.0], [1.0]]

    without, off = assembled(ppo, *talks, **how)[1], assembled(ppo, *talks, **how, **heard)[1]
    for plain, zero in zip(without, off, strict=True):
        assert (zero["advantages"], zero["returns"]) == (plain["advantages"], plain["returns"])
        assert zero["turn_log_q"] == []


def option_step(
    *,
    ids: list[int],
    options: list[list[int]],
    rewards: list[list[float]],
    features: list[np.ndarray],
    after: list[list[float]],
    tokens: list[list[int]] | None = None,
    acted: list[list[bool]] | None = None,
    starts: list[list[int]] | None = None,
) -> tuple[pa.Table, pa.ChunkedArray]:
    """Rollouts and the rewards of their turns. tokens, acted, starts: by default, turns have one token each."""
    turns = [len(own) for own in options]
    tokens = tokens or [[1] * (1 + count) for count in turns]
    rollouts = Rollouts.of(
        {
            "sample_id": ids,
            "group_id": ids,
            "tokens": tokens,
            "action_mask": acted or [[False] + [True] * count for count in turns],
            "logprobs": [[0.0] * len(own) for own in tokens],
            "versions": [[0] * len(own) for own in tokens],
            "turn_starts": starts or [list(range(1, 1 + count)) for count in turns],
            "option": options,
            "option_logprobs": [[-1.0] * count for count in turns],
            "option_features": [own.ravel() for own in features],
            "options_offered": [[True] * 3 * count for count in turns],
            "last_features": after,
            "finish": ["stop"] * len(ids),
            "metadata": ["{}"] * len(ids),
        }
    ).table
    return rollouts, pa.chunked_array([pa.array(rewards, pa.list_(pa.float32()))])
