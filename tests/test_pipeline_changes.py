"""Which settings may change when a run goes on."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.placement import place
from driver_setup import config
from pipeline.algorithms.ppo import PPO
from pipeline.config.run_config import RunConfig, leaves
from pipeline.folder.compatibility import (
    ANOTHER_RUN,
    KINDS,
    check_changes,
    check_data_changes,
    differences,
    kind_of,
    moved,
    paths_changed,
)
from pipeline.loop.wiring import demands

BEFORE = config().model_dump(mode="json")


def changed(**sections: dict[str, Any] | int) -> RunConfig:
    run = config()
    values = {
        name: getattr(run, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return run.model_copy(update=values)


def test_the_same_settings_pass() -> None:
    assert check_changes(BEFORE, config(), ()) == []


def test_a_setting_that_the_run_did_not_know_had_its_default() -> None:
    """A run of an older release, before there were a setting, a setting of a section, and a whole section."""
    before = {key: value for key, value in BEFORE.items() if key not in ("max_staleness", "shaping")}
    before["algorithm"] = {key: value for key, value in before["algorithm"].items() if key != "mask_low"}
    assert check_changes(before, config(), ()) == []
    with pytest.raises(ValueError, match="max_staleness: 0 -> 2   not in a run that has begun"):
        check_changes(before, config().model_copy(update={"max_staleness": 2}), ())
    with pytest.raises(ValueError, match=r"shaping\.clip: 0\.0 -> 5\.0   not in a run"):
        check_changes(before, changed(shaping={"clip": 5.0}), ())


def test_every_difference_is_shown_with_what_may_be_done() -> None:
    run = changed(policy={"learning_rate": 0.5, "ranks": 2, "pack_tokens": 64}, rollout={"workers": 5})
    with pytest.raises(ValueError, match="differ") as caught:
        check_changes(BEFORE, run, ["policy.ranks"])
    text = str(caught.value)
    assert "policy.learning_rate: 1e-05 -> 0.5   not in a run that has begun" in text
    assert (
        "policy.pack_tokens: 0 -> 64   gives the same weights except for rounding: --allow-change policy.pack_tokens"
        in text
    )
    assert "rollout.workers: 2 -> 5   (allowed)" in text
    assert "policy.ranks: 1 -> 2   (allowed)" in text
    assert text.endswith("or begin a new run with `raylign run`.")


def test_allowed_changes_are_told_with_what_they_mean() -> None:
    run = changed(rollout={"workers": 5}, steps=9)
    assert check_changes(BEFORE, run, []) == [
        "steps: 3 -> 9, which makes the learning-rate schedules end at that step from now on",
        "rollout.workers: 2 -> 5, which gives the same weights",
    ]


def test_data_or_models_that_differ_are_listed_and_may_be_allowed() -> None:
    before = {
        "prompts": "a",
        "heldout": "b",
        "model weights": "c",
        "reward model ends": "[2]",
        "partner model weights": "g",
        "of an older release": "d",
    }
    now = before | {
        "heldout": "e",
        "model weights": "f",
        "reward model ends": "[3]",
        "partner model weights": "h",
        "of a newer release": "g",
    }
    del now["of an older release"]
    with pytest.raises(ValueError, match="data and models must hold what they held") as caught:
        check_data_changes(before, now, ["data"])
    _, *lines, remedy = str(caught.value).splitlines()
    assert lines == [
        "  heldout: b -> e   (allowed)",
        "  model weights: c -> f   is used only if its weights are those that the commits were made from: "
        "--allow-change model",
        "  reward model ends: [2] -> [3]   is used only if its weights are those that the commits were made from: "
        "--allow-change model",
        "  partner model weights: g -> h   changes the course of the run from here on; what is done stays as it is: "
        "--allow-change model",
    ]
    assert remedy == "Put the files back as they were, allow it, or begin a new run with `raylign run`."
    said = check_data_changes(before, now, ["data", "model"])
    assert said[0] == "heldout: b -> e, which changes the course of the run from here on; what is done stays as it is"
    assert len(said) == 4
    assert check_data_changes(before, before, ()) == []


def test_a_path_may_change_where_what_it_names_is_the_same() -> None:
    run = changed(
        data={"prompts": "new.jsonl"},
        model={"path": "/new"},
        reward={"model": "/new-judge"},
        environment={"partner": "/new-partner"},
    )
    before = BEFORE | {
        "data": BEFORE["data"] | {"prompts": "old.jsonl"},
        "model": BEFORE["model"] | {"path": "/old"},
        "reward": BEFORE["reward"] | {"model": "owner/judge"},
        "environment": BEFORE["environment"] | {"partner": "/old-partner"},
    }
    paths = paths_changed(before, run)
    assert paths == {
        "data.prompts": "old.jsonl",
        "model.path": "/old",
        "reward.model": "owner/judge",
        "environment.partner": "/old-partner",
    }
    then = {"prompts": "a", "heldout": "b", "model weights": "c", "partner model weights": "p"}
    now = then | {"reward model weights": "d"}
    same = moved(paths, then, now)
    here = {"data.prompts": "old.jsonl", "model.path": "/old", "environment.partner": "/old-partner"}
    assert same == here, "the hub's judge had no checksum"
    assert moved(paths, then, now | {"heldout": "e", "model ends": "[0]", "partner model weights": "q"}) == {}
    with pytest.raises(ValueError, match="differ") as caught:
        check_changes(before, run, (), same)
    text = str(caught.value)
    assert "  model.path: '/old' -> '/new'   holds the same\n" in text
    assert "reward.model: 'owner/judge' -> '/new-judge'   not in a run that has begun, unless it holds the same" in text
    assert check_changes(before, run, (), paths)[1] == "model.path: '/old' -> '/new', which holds the same"
    assert paths_changed(BEFORE, run) == {}, "there was none"


def test_what_is_not_harmless_cannot_be_allowed() -> None:
    with pytest.raises(ValueError, match="seed: 0 -> 1   not in a run that has begun"):
        check_changes(BEFORE, changed(seed=1), ["seed"])


def test_another_algorithm_differs_in_its_fields() -> None:
    ppo = BEFORE | {"algorithm": {"name": "ppo", "lam": 0.9}}
    assert differences(ppo, BEFORE)["algorithm.lam"] == (0.9, None)
    assert differences(ppo, BEFORE)["algorithm.name"] == ("ppo", "reinforce")


def test_what_changes_no_weight_needs_no_permission_and_is_told() -> None:
    run = changed(
        cluster={"address": "10.0.0.1:6379", "call_timeout_s": 60.0, "max_rebuilds": 9},
        reward={"workers": 3, "timeout_s": 5.0},
        evaluation={"prompts": 7},
        commit_every=2,
    )
    told = check_changes(BEFORE, run, ())
    assert "cluster.address: '' -> '10.0.0.1:6379', which gives the same weights" in told
    assert "evaluation.prompts: 128 -> 7, which gives the same policy, measured otherwise" in told
    assert len(told) == 7


def test_how_many_threads_a_learner_has_is_part_of_its_arithmetic() -> None:
    """Policy and critic share the cores of one bundle, or have a bundle each."""
    runs = [
        config().model_copy(
            update={"algorithm": PPO(), "cluster": ClusterConfig(cpus_per_bundle=4, share_devices=share)}
        )
        for share in (True, False)
    ]
    assert [place(run.cluster, demands(run)).slot("critic", 0).threads for run in runs] == [2, 4]
    assert kind_of("cluster.share_devices").words == "gives the same weights except for rounding"


def test_every_setting_is_of_a_kind_and_every_kind_is_of_a_setting() -> None:
    """A new setting must be given one; a section that is all of one kind stands for its keys."""
    keys = set(leaves(RunConfig))
    assert {key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in KINDS)} == set()
    assert {name for name in KINDS if not any(key == name or key.startswith(f"{name}.") for key in keys)} == set()


def test_a_setting_that_nobody_knows_is_another_run() -> None:
    assert kind_of("policy.no_such_key") is ANOTHER_RUN
