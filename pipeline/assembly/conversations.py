"""What a step's conversations add to its experience: turns, their rewards, the value of what was broken off, metrics.

B conversations; A action tokens and T turns of the longest ones.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors import ragged
from actors.experience import CONVERSATION
from actors.rollout.conversations import UNFINISHED
from pipeline.algorithms.turns import Turns
from pipeline.assembly.grid import ActionGrid
from pipeline.assembly.joined import JoinedStep

_SHOWN_TURNS = 8  # turns whose mean reward has a metric of its own
_LARGEST = 1e30  # a number of the info beyond this is not shown
_SHOWN_INFO = 24  # entries of the environment's info that have one


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationStep:
    """The conversations of a step. records: what the environment said in each, see `Rollouts`."""

    records: Sequence[Mapping[str, Any]]
    turns: Turns
    turn_rewards: torch.Tensor  # (B, T) float32
    values_after: torch.Tensor  # (B,) float32, of the state in which a conversation was broken off; else 0

    @classmethod
    def of(cls, step: JoinedStep, grid: ActionGrid) -> ConversationStep:
        """The conversations of a step."""
        rewards, offsets = ragged.flat(step.scores["turn_rewards"])
        records = [json.loads(text)[CONVERSATION] for text in step.rollouts["metadata"].to_pylist()]
        return cls(
            records=records,
            turns=_turns(step, grid, offsets),
            turn_rewards=torch.from_numpy(ragged.pad(rewards, offsets)),
            values_after=torch.from_numpy(_values_after(step, records)),
        )

    def with_last(self, added: torch.Tensor) -> torch.Tensor:
        """The turns' rewards, (B, T), with a number added to each conversation's last one; added: (B,)."""
        last = (self.turns.real.sum(dim=1) - 1)[:, None]
        return self.turn_rewards.scatter_add(1, last, added[:, None])


def _turns(step: JoinedStep, grid: ActionGrid, offsets: ragged.Array) -> Turns:
    starts, own = ragged.flat(step.rollouts["turn_starts"])
    assert np.array_equal(own, offsets), "a conversation has another number of turns than of their rewards"
    positions = np.arange(step.acted.size) - np.repeat(step.offsets[:-1], np.diff(step.offsets))
    return Turns.of_starts(
        torch.from_numpy(ragged.pad(starts.astype(np.int64), own)),
        torch.from_numpy(ragged.mask(own, int(np.diff(own).max()))),
        grid.pad(positions),
        grid.mask,
    )


def _values_after(step: JoinedStep, records: Sequence[Mapping[str, Any]]) -> ragged.Array:
    """(B,): where a conversation was broken off, its last token stands in the place of the one that would follow."""
    last = step.offsets[1:] - 1
    is_open = np.array([record["end"] in UNFINISHED for record in records]) & ~step.acted[last]
    return np.where(is_open, step.values[last], np.float32(0)).astype(np.float32)


def conversation_metrics(step: ConversationStep, tokens: int) -> dict[str, float]:
    """Numbers of a step's conversations for the metrics. tokens: action tokens of the step.

    Shares of conversations by their end; means over turns of the environment's rewards and of the numbers in its info.
    """
    ends = [record["end"] for record in step.records]
    real, turns = step.turns.real, int(step.turns.real.sum())
    found = {
        "turns": turns / len(ends),
        "tokens_per_turn": tokens / max(turns, 1),
        "terminated": ends.count("terminated") / len(ends),
        "broken_off": sum(end in UNFINISHED for end in ends) / len(ends),
        "no_room": ends.count("no_room") / len(ends),
    }
    for number in range(min(real.shape[1], _SHOWN_TURNS)):
        column = step.turn_rewards[:, number][real[:, number]]
        found[f"reward_of_turn_{number + 1}"] = float(column.double().mean())
    return found | _info_means(step.records)


def _info_means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for turn in record["turns"]:
            for name, value in turn["info"].items():
                if isinstance(value, int | float) and abs(value) <= _LARGEST:  # so never NaN
                    values[name].append(float(value))
    return {f"info/{name}": float(np.mean(values[name])) for name in sorted(values)[:_SHOWN_INFO]}
