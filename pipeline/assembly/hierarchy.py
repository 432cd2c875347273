"""The two levels of a hierarchical policy: the manager's table of turns, and what the worker learns from.

    Rollouts, Scores --manager_turns--> Turns --manager--> TurnAdvantages --worker_rewards--> the worker's token rewards

The manager sees the extrinsic rewards alone. The worker sees the manager's advantage of each turn, the check of its
sub-task and, with `diversity_coef`, how well the discriminator knew the option from what was said; see
`pipeline/algorithms/turns.py`.

B conversations; N turns of all of them; A action tokens and T turns of the longest ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors import ragged
from actors.config import ManagerConfig
from actors.manager.turns import TurnAdvantages, Turns
from pipeline.algorithms.turns import intrinsic_rewards, option_counts, option_statistics
from pipeline.assembly.conversations import ConversationStep
from pipeline.assembly.joined import JoinedStep


def manager_turns(rollouts: pa.Table, turn_rewards: pa.ChunkedArray, manager: ManagerConfig) -> pa.Table:
    """The turns of conversations as the manager learns from them, in the order of sample ids.

    rollouts: the columns of Rollouts, of B conversations. turn_rewards: of each turn, B rows. What was said goes with
    the turns only if there is a discriminator to hear it.

    What was broken off is truncated: the features after its last line stand for the state that would follow. Where the
    context is full there is no such state, and nothing counts beyond, as for the flat policy.
    """
    order = np.argsort(rollouts["sample_id"].to_numpy(), kind="stable")
    rollouts, rewards = rollouts.take(order), turn_rewards.take(order)
    chosen, offsets = ragged.flat(rollouts["option"])
    counts, total = np.diff(offsets), len(chosen)
    last = np.zeros(total, np.bool_)
    last[offsets[1:] - 1] = True
    after = rollouts["last_features"].to_pylist()
    truncated = last & np.repeat([len(features) > 0 for features in after], counts)
    features, _ = ragged.flat(rollouts["option_features"])
    offered, _ = ragged.flat(rollouts["options_offered"])
    following = iter([features for features in after if features])
    return Turns.of(
        {
            "sample_id": np.repeat(rollouts["sample_id"].to_numpy(), counts),
            "turn": (np.arange(total) - np.repeat(offsets[:-1], counts)).astype(np.int32),
            "features": list(features.reshape(total, -1)),
            "offered": list(offered.reshape(total, len(manager.options))),
            "option": chosen.astype(np.int16),
            "option_logprob": ragged.flat(rollouts["option_logprobs"])[0],
            "reward": ragged.flat(rewards)[0],
            "terminated": last & ~truncated,
            "truncated": truncated,
            "last_features": [next(following) if cut else [] for cut in truncated],
        }
        | ({"utterance": _utterances(rollouts)} if manager.diversity_coef else {})
    ).table


def _utterances(rollouts: pa.Table) -> pa.ListArray:
    """The action tokens of each turn, N rows: nothing that the policy was given, so no control token of an option."""
    tokens, offsets = ragged.flat(rollouts["tokens"])
    acted = ragged.flat(rollouts["action_mask"])[0]
    starts, first = ragged.flat(rollouts["turn_starts"])
    begins = starts + np.repeat(offsets[:-1], np.diff(first))  # (N,), ascending, among all tokens
    turn = np.searchsorted(begins, np.flatnonzero(acted), side="right") - 1
    ends = np.cumsum(np.bincount(turn, minlength=len(begins)))
    return ragged.unflat(tokens[acted], np.append(0, ends), pa.int32())


def advantages_table(experience: pa.Table) -> pa.Table:
    """The manager's `TurnAdvantages` as the experience has them, a list for each conversation; values are not known."""
    values, offsets = ragged.flat(experience["turn_advantages"])
    heard = ragged.flat(experience["turn_log_q"])[0]
    counts, unknown = np.diff(offsets), np.zeros(len(values), np.float32)
    return TurnAdvantages.of(
        {
            "sample_id": np.repeat(experience["sample_id"].to_numpy(), counts),
            "turn": (np.arange(len(values)) - np.repeat(offsets[:-1], counts)).astype(np.int32),
            "advantage": values,
            "value": unknown,
            "log_q": heard if len(heard) else unknown,
        }
    ).table


def turn_columns(step: JoinedStep, conversations: ConversationStep, manager: ManagerConfig) -> dict[str, object]:
    """What the experience keeps of the manager's view, a list for each conversation; nothing without a manager."""
    if step.turn_advantages is None:
        return {}
    columns = {"turn_advantages": "advantage"} | ({"turn_log_q": "log_q"} if manager.diversity_coef else {})
    real = conversations.turns.real
    return {
        name: [row[own].numpy() for row, own in zip(_by_turn(step, column, conversations), real, strict=True)]
        for name, column in columns.items()
    }


def worker_rewards(step: JoinedStep, conversations: ConversationStep, manager: ManagerConfig) -> torch.Tensor:
    """The worker's reward for each turn: the manager's advantage and the intrinsic reward, (B, T); 0 where not real."""
    real = conversations.turns.real
    log_q, on_offer = torch.zeros(real.shape), torch.ones(real.shape, dtype=torch.int64)
    if manager.diversity_coef:
        log_q, on_offer = _by_turn(step, "log_q", conversations), _on_offer(step, len(manager.options))
    return _by_turn(step, "advantage", conversations) + intrinsic_rewards(
        checks(conversations.records, conversations),
        log_q,
        on_offer,
        real,
        check_coef=manager.check_coef,
        diversity_coef=manager.diversity_coef,
    )


def _by_turn(step: JoinedStep, name: str, conversations: ConversationStep) -> torch.Tensor:
    """A column of the manager's view, (B, T), in the order of the step; 0 where not real."""
    assert step.turn_advantages is not None
    found = TurnAdvantages(step.turn_advantages).table
    ids = step.rollouts["sample_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    row = np.searchsorted(ids, found["sample_id"].to_numpy(), sorter=order)
    grid = np.zeros(tuple(conversations.turns.real.shape), np.float32)
    grid[order[row], found["turn"].to_numpy()] = found[name].to_numpy()
    return torch.from_numpy(grid)


def _on_offer(step: JoinedStep, options: int) -> torch.Tensor:
    """How many options could be chosen in each turn, (B, T). options: K."""
    offered, offsets = ragged.flat(step.rollouts["options_offered"])
    return torch.from_numpy(ragged.pad(offered.reshape(-1, options).sum(1), offsets // options))


def checks(records: Sequence[Mapping[str, Any]], conversations: ConversationStep) -> torch.Tensor:
    """How well each turn carried out its option, as the user's check said, (B, T); 0 without a check."""
    grid = torch.zeros(conversations.turns.real.shape)
    for row, record in enumerate(records):
        for number, turn in enumerate(record["turns"]):
            grid[row, number] = float(turn.get("check", 0.0))
    return grid


def option_metrics(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Use of the options for the metrics: shares, entropy and mutual information in nats, mean check.

    What was carried out is the entry `subtask` of the environment's info, if it has one.
    """
    turns = [turn for record in records for turn in record["turns"] if "option" in turn]
    if not turns:
        return {}
    outcomes = [str(turn["info"].get("subtask", "")) for turn in turns]
    numbers = {outcome: number for number, outcome in enumerate(Counter(outcomes))}
    option = torch.tensor([[names.index(turn["option"]) for turn in turns]])
    outcome = torch.tensor([[numbers[one] for one in outcomes]])
    real = torch.ones(option.shape, dtype=torch.bool)
    counts = option_counts(option, outcome, real, option_count=len(names), outcome_count=len(numbers))
    found = option_statistics(counts)
    shares = {f"usage_{name}": float(share) for name, share in zip(names, found.usage, strict=True)}
    checked = [float(turn["check"]) for turn in turns if "check" in turn]
    return (
        shares
        | {"entropy": found.entropy}
        | ({"mutual_information": found.mutual_information} if len(numbers) > 1 else {})
        | ({"check": float(np.mean(checked))} if checked else {})
    )
