"""Which settings may change when a run goes on."""

from __future__ import annotations

from typing import Any

import pytest

from driver_setup import config
from pipeline.changes import HARMLESS, check_changes, differences
from pipeline.config import RunConfig, leaves

BEFORE = config().model_dump(mode="json")


def changed(**sections: dict[str, Any] | int) -> RunConfig:
    run = config()
    values = {name: getattr(run, name).model_copy(update=value) if isinstance(value, dict) else value for name, value in sections.items()}
    return run.model_copy(update=values)


def test_the_same_settings_pass() -> None:
    assert check_changes(BEFORE, config(), ()) == []


def test_every_difference_is_shown_with_what_may_be_done() -> None:
    run = changed(policy={"learning_rate": 0.5, "ranks": 2}, rollout={"workers": 5})
    with pytest.raises(ValueError, match="differ") as caught:
        check_changes(BEFORE, run, ["policy.ranks"])
    text = str(caught.value)
    assert "policy.learning_rate: 1e-05 -> 0.5   not in a run that has begun" in text
    assert "rollout.workers: 2 -> 5   gives the same weights: --allow-change rollout.workers" in text
    assert "policy.ranks: 1 -> 2   (allowed)" in text
    assert text.endswith("or begin a new run with `raylign run`.")


def test_allowed_changes_are_told_with_what_they_mean() -> None:
    run = changed(rollout={"workers": 5}, steps=9)
    assert check_changes(BEFORE, run, ["rollout.workers", "steps"]) == [
        "steps: 3 -> 9, which changes the course of the run from here on",
        "rollout.workers: 2 -> 5, which gives the same weights",
    ]


def test_what_is_not_harmless_cannot_be_allowed() -> None:
    with pytest.raises(ValueError, match="seed: 0 -> 1   not in a run that has begun"):
        check_changes(BEFORE, changed(seed=1), ["seed"])


def test_another_algorithm_differs_in_its_fields() -> None:
    ppo = BEFORE | {"algorithm": {"name": "ppo", "lam": 0.9}}
    assert differences(ppo, BEFORE)["algorithm.lam"] == (0.9, None)
    assert differences(ppo, BEFORE)["algorithm.name"] == ("ppo", "reinforce")


def test_every_harmless_key_exists() -> None:
    assert HARMLESS.keys() <= set(leaves(RunConfig))
