"""What the manager's tests share: made-up conversations, and slow formulas to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from actors.config import ManagerConfig
from actors.manager.manager import Manager
from actors.manager.option_head import OptionHead
from actors.manager.reports import ManagerSpec
from actors.manager.turns import Turns

WIDTH, OPTIONS = 12, 3


def make_manager(*, width: int = WIDTH, seed: int = 5, options: int = OPTIONS, **settings: Any) -> Manager:
    """A connected manager."""
    names = tuple(f"option-{number}" for number in range(options))
    config = ManagerConfig(**{"options": names, "learning_rate": 0.01, "minibatch_size": 16} | settings)
    manager = Manager(spec=ManagerSpec(width=width, config=config, seed=seed))
    manager.connect()
    return manager


def make_turns(
    conversations: int = 12,
    *,
    seed: int = 0,
    width: int = WIDTH,
    options: int = OPTIONS,
    offer: float = 1.0,
    scale: float = 1.0,
    head: OptionHead | None = None,
    heard: bool = False,
) -> pa.Table:
    """Ragged conversations of 1 to 5 turns, about half of them truncated.

    offer: probability that an option is on offer. scale: of the rewards. head: chooses the options, else all options on
    offer are equally likely. heard: with utterances, whose tokens lean towards the option.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, conversations)
    total = int(lengths.sum())
    features = rng.normal(size=(total, width)).astype(np.float32)
    offered = rng.random((total, options)) < offer
    offered[np.arange(total), rng.integers(options, size=total)] = True
    samples = np.repeat(np.arange(conversations) * 3 + 4, lengths)
    turns = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    uniform = {
        "policy_weight": np.zeros((options, width), np.float32),
        "policy_bias": np.zeros(options, np.float32),
    }
    chosen = (head or OptionHead(uniform)).choose(features, offered, samples, turns, seed=seed)
    last = np.append(turns[1:] == 0, True)
    truncated = last & np.repeat(rng.random(conversations) < 0.5, lengths)
    after = rng.normal(size=(total, width)).astype(np.float32)
    return Turns.of(
        {
            "sample_id": samples,
            "turn": turns,
            "features": features.tolist(),
            "offered": offered.tolist(),
            "option": chosen.options,
            "option_logprob": chosen.logprobs,
            "reward": (rng.normal(size=total) * scale).astype(np.float32),
            "terminated": last & ~truncated,
            "truncated": truncated,
            "last_features": [row.tolist() if cut else [] for row, cut in zip(after, truncated, strict=True)],
        }
        | ({"utterance": _utterances(chosen.options, seed)} if heard else {})
    ).table


def _utterances(options: Sequence[int], seed: int) -> list[list[int]]:
    """1 to 8 of 40 tokens each, of which half are those of the option alone."""
    rng = np.random.default_rng([seed, 1])
    return [
        [int(o) if rng.random() < 0.5 else int(rng.integers(40)) for _ in range(rng.integers(1, 9))] for o in options
    ]


def slow_gae(table: pa.Table, manager: Manager, *, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages and values of all turns: one conversation after the other, backwards, in float64."""
    rows = table.to_pylist()

    def value(features: Sequence[float]) -> float:
        return float(manager.values(np.array([features], np.float32))[0])

    values = [value(row["features"]) for row in rows]
    advantages = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        row = rows[i]
        if row["terminated"]:
            following, carried = 0.0, 0.0
        elif row["truncated"]:
            following, carried = value(row["last_features"]), 0.0
        else:
            following, carried = values[i + 1], advantages[i + 1]
        advantages[i] = row["reward"] + gamma * following - values[i] + gamma * lam * carried
    return advantages, values


def replace(table: pa.Table, name: str, values: object) -> pa.Table:
    """The table with one column's values replaced."""
    i = table.column_names.index(name)
    return table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))


def learn(manager: Manager, seeds: Sequence[int]) -> None:
    """An update for each seed, on conversations in which the manager's own head chose the options."""
    for seed in seeds:
        manager.update(make_turns(seed=seed, head=OptionHead(manager.weights()), offer=0.8))
