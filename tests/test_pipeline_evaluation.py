"""A policy against a baseline in numbers: paired by prompt, equal text on both sides, what failed left out
and counted.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation_helpers import answers, evaluation, measured
from pipeline.evaluation.results import Likelihood, assess, judged, side
from pipeline.evaluation.statistics import Interval
from pipeline.report.wording import left_out, rows

NAN = math.nan


def test_the_gain_is_paired() -> None:
    """Prompts differ by hundreds, every one gains exactly 1: the gain is certain though both means are not."""
    hard_and_easy = np.arange(10)[:, None] * 100.0
    found = judged(hard_and_easy + 1, hard_and_easy, seed=0)
    assert found.gain == Interval(mean=1.0, low=1.0, high=1.0)
    assert found.win_rate == Interval(mean=1.0, low=1.0, high=1.0)
    assert found.baseline.high - found.baseline.low > 100
    assert (found.baseline.mean, found.policy.mean) == (450.0, 451.0)


def test_a_prompt_counts_once_however_often_it_was_sampled() -> None:
    found = judged(np.array([[1.0, 3], [10, 14]]), np.array([[0.0, 2, 1], [10, 10, 10]]), seed=0)
    assert (found.baseline.mean, found.policy.mean, found.gain.mean) == (5.5, 7.0, 1.5)
    assert (found.gain.low, found.gain.high) == (1.0, 2.0)  # two prompts: each drawn twice is among the resamples


def test_a_failure_spoils_its_sample_then_its_prompt_then_its_pair_and_is_counted() -> None:
    found = judged(np.array([[2.0, 4], [3, 3], [NAN, NAN]]), np.array([[1.0, NAN], [NAN, NAN], [5, 7]]), seed=0)
    assert (found.baseline.mean, found.policy.mean) == (3.5, 3.0)
    assert found.gain == Interval(mean=2.0, low=2.0, high=2.0)  # the first prompt is the only one with both
    assert found.failed == 5


@pytest.mark.parametrize(
    ("policy", "baseline"), [([NAN, NAN], [1.0, 2.0]), ([1.0, 2.0], [NAN, NAN]), ([NAN, 2.0], [1.0, NAN])]
)
def test_without_one_complete_pair_there_is_no_comparison(policy: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="must have at least one scored response"):
        judged(np.array(policy)[:, None], np.array(baseline)[:, None], seed=0)


def test_against_itself_nothing_is_gained_and_half_is_won() -> None:
    rewards = [[0.5, -1.0], [2.0, 2.0], [0.0, 1.0]]
    found = evaluation(rewards, rewards, kl=0.0, best_of_n=2)
    for value, expected in (
        (found.optimised.gain, 0.0),
        (found.optimised.win_rate, 0.5),
        (found.kl, 0.0),
        (found.kl_per_token, 0.0),
    ):
        assert (value.low, value.mean, value.high) == (expected,) * 3
    assert found.matched is not None
    assert found.matched.lead.mean == pytest.approx(0.0), "best of one is the baseline"
    assert found.sides["policy"] == found.sides["baseline"]


def test_kl_is_of_a_reply_and_of_a_token() -> None:
    found = evaluation([[0.0, 0.0]] * 3, [[0.0, 0.0]] * 3, kl=2.0, tokens=4)
    assert found.kl.mean == 2.0
    assert found.kl_per_token.mean == 0.5


def test_distinct_n_is_of_equally_many_replies_though_the_baseline_has_more() -> None:
    """Six replies that differ pairwise in nothing: of more text more would be repeats."""
    many = side(answers([[0.0] * 6], "a b c"), 1, NAN, seed=0)
    assert many.distinct == (1.0, 1.0, 1.0)
    assert side(answers([[0.0] * 6], "a b c"), 6, NAN, seed=0).distinct == pytest.approx((1 / 6, 1 / 6, 1 / 6))


def test_perplexity_and_the_tax() -> None:
    """Two demonstrations of 1 and 3 tokens: the baseline gives each token 1/2, the policy 1/4."""
    tokens = np.array([1.0, 3.0])
    likelihood = Likelihood(
        policy=tokens * math.log(1 / 4), baseline=tokens * math.log(1 / 2), tokens=tokens, excluded=5
    )
    found = assess(measured([[0.0]], [[0.0]], likelihood=likelihood), policy="a", baseline="b", best_of_n=1, seed=0)
    assert (found.sides["policy"].perplexity, found.sides["baseline"].perplexity) == pytest.approx((4.0, 2.0))
    assert found.tax is not None
    assert (found.tax.low, found.tax.mean, found.tax.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (found.demonstrations, found.excluded) == (2, 5)


def test_best_of_n_by_the_optimised_judge_and_what_the_other_makes_of_it() -> None:
    """The reward model prefers what the rule dislikes: over-optimisation that only the second judge shows."""
    baseline = {"reward model": [[0.0, 1.0], [2.0, 3.0]], "rule": [[1.0, 0.0], [1.0, 0.0]]}
    found = evaluation(
        {name: [row[:1] for row in rows] for name, rows in baseline.items()}, baseline, best_of_n=2
    ).best_of
    assert found is not None
    assert found.judge == "reward model"
    assert [point.mean for point in found.rewards["reward model"]] == [1.5, 2.0]
    assert [point.mean for point in found.rewards["rule"]] == [0.5, 0.0]
    assert found.kl == (0.0, pytest.approx(math.log(2) - 0.5))
    assert found.matched.keys() == {"reward model", "rule"}


@pytest.mark.parametrize(("n", "shown"), [(2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_tables_show_powers_of_two_and_the_largest(n: int, shown: list[int]) -> None:
    found = evaluation([[0.0]] * 2, [list(range(n))] * 2, best_of_n=n).best_of
    assert found is not None
    assert found.shown == shown


def test_more_replies_than_best_of_n_draws_from() -> None:
    """The policy is asked more often than best-of-n needs: the pool is the first of the baseline's."""
    found = evaluation([[0.0] * 4] * 2, [[1.0, 0.0, 9.0, 9.0]] * 2, best_of_n=2).best_of
    assert found is not None
    assert found.rewards["rule"][1].mean == 1.0
    assert evaluation([[0.0] * 4] * 2, [[1.0, 0.0, 9.0, 9.0]] * 2, best_of_n=1).best_of is None


def test_a_prompt_not_fully_scored_is_left_out_of_best_of_n_and_counted() -> None:
    found = evaluation([[0.0]] * 2, [[1.0, 0.0], [NAN, 5.0]], best_of_n=2)
    assert found.best_of is not None
    assert (found.best_of.left_out, found.best_of.rewards["rule"][1].mean) == (1, 1.0)
    assert found.optimised.baseline.mean == pytest.approx((0.5 + 5.0) / 2), "but not out of its mean"


def test_a_judge_without_any_score_is_left_out_with_a_line_and_the_rest_stands() -> None:
    scored = {"reward model": [[NAN], [NAN]], "rule": [[1.0], [2.0]]}
    found = evaluation(scored, {"reward model": [[0.0], [0.0]], "rule": [[0.0], [0.0]]}, best_of_n=1)
    assert (list(found.judges), found.judge, found.optimised.gain.mean) == (["rule"], "rule", 1.5)
    assert found.lacking == ("the reward model (it scored no prompt's replies on both sides; see the examiners' logs)",)
    assert left_out(found) == f"Left out: {found.lacking[0]}."
    assert found.record()["lacking"] == list(found.lacking)


def test_without_one_prompt_whose_replies_are_all_scored_there_is_no_best_of_n_but_an_evaluation() -> None:
    found = evaluation([[3.0], [5.0]], [[1.0, NAN], [NAN, 5.0]], best_of_n=2)
    assert found.best_of is None
    assert found.optimised.gain.mean == 1.0
    assert found.lacking == ("best-of-n (no prompt has a reward for every reply of the baseline)",)


def test_what_a_task_measures_is_paired_and_judges_nothing() -> None:
    """A prompt without a number on both sides is left out of the gain; a measure that has none at all is named."""
    both = measured([[1.0, 3.0], [2.0, 2.0]], [[1.0], [1.0]])
    ours = {"sentences": np.array([[1.0, 0.0], [1.0, 1.0]]), "silent": np.array([[NAN, NAN], [NAN, NAN]])}
    theirs = {"sentences": np.array([[0.0], [NAN]]), "silent": np.array([[1.0], [1.0]])}
    given = replace(both, policy=replace(both.policy, measures=ours), baseline=replace(both.baseline, measures=theirs))
    found = assess(given, policy="policy", baseline="finetuned", best_of_n=1, seed=0)
    assert list(found.judges) == ["rule"]
    shares = found.measures["sentences"]
    assert (shares.policy.mean, shares.baseline.mean, shares.gain.mean) == (0.75, 0.0, 0.5)
    assert found.lacking == ("silent (measured for no prompt)",)
    assert ("sentences", "0.0% (0.0% to 0.0%)", "75.0% (50.0% to 100.0%)") in rows(found)
    assert found.record()["measures"]["sentences"]["gain"]["mean"] == 0.5
    assert "measures" not in evaluation([[1.0]], [[0.0]]).record(), "nothing was measured"


def test_the_record_is_plain_json() -> None:
    """Strict JSON, which knows no NaN and no infinity: a reward that failed and a reward that is never reached are
    null.
    """
    found = evaluation([[9.0, NAN], [9.0, 9.0]], [[1.0, 2.0], [3.0, 5.0]], kl=0.1, best_of_n=2)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["prompts"] == 2
    assert record["judges"]["rule"]["gain"] == {
        "mean": found.optimised.gain.mean,
        "low": found.optimised.gain.low,
        "high": found.optimised.gain.high,
    }
    assert record["judges"]["rule"]["failed"] == 1
    assert record["rewards"]["rule"] == {"policy": [[9.0, None], [9.0, 9.0]], "baseline": [[1.0, 2.0], [3.0, 5.0]]}
    assert record["best_of"]["matched"]["rule"]["kl"]["mean"] is None
    assert record["tax"] is None
    assert "lacking" not in record, "nothing is"
    assert record["sides"]["policy"]["perplexity"] is None
    assert record["replies"][1] == {
        "prompt": "prompt 1",
        "policy": "new 1 0",
        "baseline": "old 1 0",
        "rewards": {"rule": [9.0, 3.0]},
    }
