"""Warnings about steps from which nothing is learned, such as steps with a gradient of zero.

    metrics of the steps, in order --Watch----> remarks for the live view, after 3, 30, 300 ... such steps
                                   --summary--> lines for the report

Pure: no console, no file. Left out: whether the policy gets better, which the evaluation says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Values = Mapping[str, Any]  # one step of metrics.jsonl; a metric may be None, NaN or missing

FIRST = 3  # steps in a row before the first warning; one may be chance
AGAIN = 10  # it is repeated after ten times as many such steps in all, however often a good step comes in between


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A symptom of a step that teaches nothing. what: the symptom, as a clause; remedy: what to do."""

    name: str
    seen: Callable[[Values], bool]
    what: str
    remedy: str


def _is(values: Values, name: str, number: float) -> bool:
    return values.get(name) == number


def _constant(values: Values) -> bool:
    return _is(values, "reward/std", 0)


def _flat(values: Values) -> bool:
    """All samples of each prompt have the same reward, and the algorithm compares only these."""
    return not _constant(values) and _is(values, "reward/flat_groups", 1) and _is(values, "advantage/std", 0)


def _still(values: Values) -> bool:
    return not _constant(values) and not _flat(values) and _is(values, "policy/grad_norm_max", 0)


def _cut_off(values: Values) -> bool:
    return _is(values, "rollout/stopped", 0)


SIGNS = (
    Sign(
        name="constant reward",
        seen=_constant,
        what="every sample had the same reward, so nothing tells a good reply from a bad one",
        remedy="unless the task is solved, look at the reward function: try it by hand on two different replies",
    ),
    Sign(
        name="flat groups",
        seen=_flat,
        what="all samples of each prompt had the same reward, so comparing them gives advantages of 0",
        remedy="raise batch.group_size or sampling.temperature, take prompts that are neither too easy nor too hard, "
        "or give a finer reward",
    ),
    Sign(
        name="no gradient",
        seen=_still,
        what="the policy's gradient was 0, so no weight changed",
        remedy="look at advantage/std, policy/clip_fraction and policy/masked_fraction in metrics.jsonl: "
        "either the baseline equals every reward, or clipping (clip_low, clip_high) or masking (mask_low, mask_high) "
        "removes every token",
    ),
    Sign(
        name="cut off",
        seen=_cut_off,
        what="no reply ended by itself: all were cut off at sampling.max_new_tokens",
        remedy="if replies should end, raise sampling.max_new_tokens, give sampling.stop, or see whether the model "
        "ever gives its end-of-text token",
    ),
)


class Watch:
    """Counts, for each sign, the steps that show it: in a row, and in all."""

    def __init__(self, history: Iterable[Values] = ()) -> None:
        """history: steps whose warnings were already given, such as those before a resume."""
        self._in_a_row = dict.fromkeys((sign.name for sign in SIGNS), 0)
        self._in_all = dict(self._in_a_row)
        self._due = dict.fromkeys(self._in_all, FIRST)  # steps in all at which the next warning is due
        for values in history:
            self.step(values)

    def step(self, values: Values) -> list[str]:
        """Count one more step; returns the warnings that are now due."""
        return [_remark(sign, self._in_a_row[sign.name]) for sign in SIGNS if self._is_due(sign, sign.seen(values))]

    def _is_due(self, sign: Sign, is_seen: bool) -> bool:
        name = sign.name
        self._in_a_row[name] = self._in_a_row[name] + 1 if is_seen else 0
        self._in_all[name] += is_seen
        if self._in_a_row[name] < FIRST or self._in_all[name] < self._due[name]:
            return False
        self._due[name] = self._in_all[name] * AGAIN
        return True


def _remark(sign: Sign, count: int) -> str:
    return f"in the last {count} steps {sign.what}; {sign.remedy}"


def summary(history: Iterable[Values]) -> list[str]:
    """A line for each sign that half of the steps show, or `FIRST * AGAIN` steps in a row."""
    steps = list(history)
    lines = []
    for sign in SIGNS:
        seen = [sign.seen(values) for values in steps]
        longest = max((len(list(run)) for is_seen, run in groupby(seen) if is_seen), default=0)
        if steps and (2 * sum(seen) >= len(steps) or longest >= FIRST * AGAIN):
            lines.append(f"In {sum(seen)} of {len(steps)} steps {sign.what}; {sign.remedy}.")
    return lines
