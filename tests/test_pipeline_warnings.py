"""What is said of steps that teach nothing, and how often."""

from __future__ import annotations

import pytest

from pipeline.observe.warnings import SIGNS, Watch, summary

NAN = float("nan")
GOOD = {
    "reward/std": 0.5,
    "reward/flat_groups": 0.25,
    "advantage/std": 1.0,
    "policy/grad_norm_max": 0.1,
    "rollout/stopped": 0.5,
}
BAD = {
    "constant reward": {
        "reward/std": 0.0,
        "reward/flat_groups": 1.0,
        "advantage/std": 0.0,
        "policy/grad_norm_max": 0.0,
    },
    "flat groups": {"reward/flat_groups": 1.0, "advantage/std": 0.0, "policy/grad_norm_max": 0.0},
    "no gradient": {"policy/grad_norm_max": 0.0},
    "cut off": {"rollout/stopped": 0.0},
}


def said(name: str) -> str:
    return next(sign.what for sign in SIGNS if sign.name == name)


@pytest.mark.parametrize("name", BAD)
def test_each_sign_is_told_from_the_others_and_says_what_to_do(name: str) -> None:
    watch = Watch()
    found = [watch.step(GOOD | BAD[name]) for _ in range(3)]
    assert found[:2] == [[], []], "one step may be chance"
    [remark] = found[2]
    assert remark.startswith(f"in the last 3 steps {said(name)}; ")


def test_it_is_said_again_when_it_lasts_but_not_every_step() -> None:
    watch = Watch()
    spoke = [step for step in range(1, 1000) if watch.step(GOOD | BAD["cut off"])]
    assert spoke == [3, 30, 300]


def test_a_good_step_in_between_begins_the_count_anew() -> None:
    watch = Watch()
    bad = GOOD | BAD["no gradient"]
    assert [len(watch.step(values)) for values in (bad, bad, GOOD, bad, bad, bad)] == [0, 0, 0, 0, 0, 1]


def test_what_comes_and_goes_is_not_said_each_time_it_comes() -> None:
    """Small batches: three such steps, a good one, three such steps ... for two thousand steps."""
    watch = Watch()
    bad = GOOD | BAD["cut off"]
    spoke = [step for step in range(1, 2001) if watch.step(GOOD if step % 4 == 0 else bad)]
    assert spoke == [3, 39, 399], "after 3, 30 and 300 such steps, each the third in a row"


def test_what_was_said_before_a_break_is_not_said_again() -> None:
    bad = GOOD | BAD["constant reward"]
    assert Watch([bad] * 3).step(bad) == []
    assert len(Watch([bad] * 2).step(bad)) == 1


@pytest.mark.parametrize(
    "nothing", [{}, dict.fromkeys(GOOD, None), dict.fromkeys(GOOD, NAN)], ids=["missing", "null", "nan"]
)
def test_where_there_is_no_number_nothing_is_said(nothing: dict[str, float | None]) -> None:
    watch = Watch()
    assert not any(watch.step(nothing) for _ in range(40))
    assert summary([nothing] * 40) == []


def test_flat_groups_matter_only_where_nothing_else_is_learned_from() -> None:
    """PPO has a critic: that the samples of a prompt are alike takes nothing from it."""
    watch = Watch()
    assert not any(watch.step(GOOD | {"reward/flat_groups": 1.0}) for _ in range(40))


def test_the_report_has_what_at_least_half_of_the_steps_show() -> None:
    steps = [GOOD | BAD["cut off"]] * 3 + [GOOD | BAD["no gradient"]] * 2 + [GOOD]
    [line] = summary(steps)
    assert line.startswith(f"In 3 of 6 steps {said('cut off')}; ")
    assert line.endswith(".")
    assert summary([]) == summary([GOOD]) == []


def test_the_report_has_a_long_row_of_steps_too() -> None:
    """Thirty steps in a row, of two hundred: the live view has said it twice."""
    dead = [GOOD | BAD["no gradient"]] * 30
    [line] = summary([GOOD] * 100 + dead + [GOOD] * 70)
    assert line.startswith(f"In 30 of 200 steps {said('no gradient')}; ")
    assert summary([GOOD] * 100 + dead[:29] + [GOOD] * 70) == []
