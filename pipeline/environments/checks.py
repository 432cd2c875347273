"""Checks everything that a user's environment returns before the run uses it.

There are two kinds of fault. An environment that breaks the protocol ends the run, by a ContractError (a ValueError)
that names the rule and the value. An environment that raises fails only the conversations of that call: each of them
gets a turn that says why, and no reward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from actors.reward.scoring import what_went_wrong
from actors.reward.worker import user_code
from cluster.faults import ContractError
from pipeline.environments.environment import Environment, Episode, Turn
from pipeline.tasks.task import PromptText


class CheckedEnvironment:
    """Wraps an environment and checks each of its answers."""

    def __init__(self, environment: Environment, name: str) -> None:
        """name: the environment's name in messages."""
        self._environment = environment
        self._name = name

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[list[Episode], list[Turn]]:
        """Like `Environment.reset`; if that raises, every episode is None and its turn says why."""
        if len(prompts) != len(seeds):
            raise ContractError(f"seeds: must be one for each of {len(prompts)} prompts, got {len(seeds)}")
        try:
            answer = self._environment.reset(prompts, seeds)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code; it becomes a status
            return [None] * len(prompts), _failed(error, len(prompts))
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ContractError(
                f"environment: {self._name}: reset must return two lists, episodes and turns, got {answer!r:.80}"
            )
        episodes, turns = answer
        self._count("reset", "episodes", episodes, len(prompts))
        self._count("reset", "turns", turns, len(prompts))
        for place, turn in enumerate(turns):
            check_turn(turn, f"environment: {self._name}: turn {place} of reset", first=True)
        return list(episodes), list(turns)

    def step(self, episodes: Sequence[Episode], replies: Sequence[str]) -> list[Turn]:
        """Like `Environment.step`; if that raises, every turn says why."""
        if len(episodes) != len(replies):
            raise ContractError(f"replies: must be one for each of {len(episodes)} episodes, got {len(replies)}")
        try:
            turns = self._environment.step(episodes, replies)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code; it becomes a status
            return _failed(error, len(episodes))
        self._count("step", "turns", turns, len(episodes))
        for place, turn in enumerate(turns):
            check_turn(turn, f"environment: {self._name}: turn {place} of step")
        return list(turns)

    def load(self) -> None:
        """Let the environment load what is large, if it has a method for that. Raises ValueError where it cannot."""
        load = getattr(self._environment, "load", None)
        if load is not None:
            with user_code(f"environment: must be able to load, got {self._name!r}", but=ValueError):
                load()

    def close(self, episodes: Sequence[Episode]) -> None:
        """Like `Environment.close`, for the episodes that did begin."""
        self._environment.close([episode for episode in episodes if episode is not None])

    def _count(self, method: str, what: str, values: object, count: int) -> None:
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            got = len(values) if isinstance(values, Sequence) else type(values).__name__
            raise ContractError(
                f"environment: {self._name}: {method} must return a list of {count} {what}, one a conversation, got "
                f"{got}"
            )


def check_turn(turn: object, where: str, first: bool = False) -> None:
    """Raises ContractError unless `turn` obeys the rules of `Turn`.

    where: the beginning of the error's message. first: the turn comes from `reset`.
    """

    def must(holds: bool, field: str, rule: str, value: object) -> None:
        if not holds:
            raise ContractError(f"{where}: {field} must be {rule}, got {value!r:.80}")

    if not isinstance(turn, Turn):
        names = ", ".join(field.name for field in fields(Turn))
        raise ContractError(f"{where}: must be a Turn, got {turn!r:.80}; make it by Turn({names})")
    must(_is_text(turn.text), "text", "a string that UTF-8 can write", turn.text)
    must(
        _is_finite(turn.reward),
        "reward",
        "a finite number; a failure is told by `failure`, not by a reward",
        turn.reward,
    )
    for field in ("terminated", "truncated"):
        must(isinstance(getattr(turn, field), bool), field, "True or False", getattr(turn, field))
    must(
        not (turn.terminated and turn.truncated),
        "truncated",
        "False where terminated is True, or nobody knows what the rest is worth",
        turn.truncated,
    )
    options = turn.options
    must(
        isinstance(options, tuple)
        and all(isinstance(option, str) and option for option in options)
        and len(set(options)) == len(options),
        "options",
        "a tuple of different names",
        options,
    )
    must(_is_json(turn.info), "info", "a dict of JSON values with strings as keys", turn.info)
    must(_is_text(turn.failure), "failure", "a string, empty if nothing failed", turn.failure)
    if turn.failure:
        must(turn.reward == 0, "reward", "0 in a turn that failed", turn.reward)
    elif first:
        must(turn.reward == 0, "reward", "0 before the first reply", turn.reward)
        must(not turn.over, "terminated", "False before the first reply", True)


def _is_finite(value: object) -> bool:
    """Whether a value is a number that float32 holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    try:
        return bool(abs(float(value)) <= np.finfo(np.float32).max)
    except OverflowError:
        return False


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_json(info: object) -> bool:
    try:
        text = json.dumps(info, allow_nan=True, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, ValueError):
        return False
    return text.startswith("{") and all(isinstance(key, str) for key in info)  # type: ignore[attr-defined]


def _failed(error: BaseException, count: int) -> list[Turn]:
    return [Turn(failure=f"error: {what_went_wrong(error)}")] * count
