"""The assembly of experience from rollouts, scores, log-probs and values: one call over the whole step.

    Rollouts, Scores, TokenLogprobs, TokenValues --assemble--> Experience, AssemblyReport

Everything that must see the whole step happens here, so that it cannot depend on ranks or micro-batches: reward
shaping, KL penalty, returns, advantages, whitening. Tables come by chunk or by rank, in any order; they are joined by
sample_id and leave in the order of `sample_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actors import ragged
from actors.config import ManagerConfig
from actors.experience import Experience, Rollouts
from pipeline.algorithms.base import Advantages, Algorithm, Trajectories
from pipeline.algorithms.estimators import token_rewards, whiten
from pipeline.algorithms.losses import kl_estimate
from pipeline.algorithms.shaping import ShapingConfig, shape_scores, shape_token_rewards
from pipeline.algorithms.turns import credit_turns, gae_within_turns
from pipeline.assembly.conversations import ConversationStep, conversation_metrics
from pipeline.assembly.grid import ActionGrid
from pipeline.assembly.hierarchy import manager_turns, option_metrics, turn_columns, worker_rewards
from pipeline.assembly.joined import Counts, JoinedStep, StepTables
from pipeline.assembly.own_columns import with_own_columns
from pipeline.assembly.report import AssemblyReport, report_of

if TYPE_CHECKING:
    from pipeline.config.loop_config import LoopConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """How experience is made.

    kl_coef: as it is in this step. max_new_tokens: longest completion. conversations: whether an environment has
    rewarded the turns. manager: what chooses options for them, if it has any.
    """

    algorithm: Algorithm
    kl_coef: float
    shaping: ShapingConfig
    max_new_tokens: int
    conversations: bool = False
    manager: ManagerConfig = field(default_factory=ManagerConfig)

    @classmethod
    def of(cls, config: LoopConfig, kl_coef: float) -> Assembly:
        return cls(
            algorithm=config.algorithm,
            kl_coef=kl_coef,
            shaping=config.shaping,
            max_new_tokens=config.sampling.max_new_tokens,
            conversations=bool(config.environment.name),
            manager=config.manager,
        )


def assemble(
    how: Assembly, sample_ids: Sequence[int], counts: Counts, *tables: pa.Table
) -> tuple[AssemblyReport, pa.Table]:
    """Join, shape, estimate, whiten.

    `counts`: how many of `tables` are rollouts, scores, reference, values, proximal and, with a manager, advantages of
    turns, in that order.

    (Ray resolves references only among a call's own arguments, hence the flat list.)
    """
    step = JoinedStep.of(StepTables.of(tables, counts), sample_ids)
    grid = ActionGrid(step.acted, step.offsets)
    conversations = ConversationStep.of(step, grid) if how.conversations else None
    trajectories = _trajectories(how, step, grid, conversations)
    if conversations is not None and step.turn_advantages is not None:
        estimates = gae_within_turns(
            trajectories.rewards, trajectories.values, conversations.turns, gamma=1.0, lam=how.manager.worker_lam
        )
    else:
        estimates = how.algorithm.advantages(trajectories)
    of_turns = turn_columns(step, conversations, how.manager) if conversations is not None else {}
    experience = _experience(how.algorithm, step, estimates, grid, of_turns)
    experience = with_own_columns(experience, how.algorithm, trajectories, grid)
    shaped_mean = float(trajectories.scores.mean())
    report = report_of(experience, step, shaped_mean, how.algorithm.kl_estimator)
    if conversations is not None:
        found = conversation_metrics(conversations, report.action_tokens)
        options = option_metrics(conversations.records, how.manager.options)
        report = replace(report, conversation=found, option=options)
    return report, experience.table


def turns_of_step(how: Assembly, sample_ids: Sequence[int], counts: Counts, *tables: pa.Table) -> tuple[int, pa.Table]:
    """What the manager learns from: the number of turns, and their table; see `assemble`."""
    step = JoinedStep.of(StepTables.of(tables, counts), sample_ids)
    table = manager_turns(step.rollouts, step.scores["turn_rewards"], how.manager)
    return table.num_rows, table


def _trajectories(
    how: Assembly, step: JoinedStep, grid: ActionGrid, conversations: ConversationStep | None
) -> Trajectories:
    """What the algorithm estimates from: shaped scores, and rewards with the KL penalty, if it belongs there.

    In conversations each turn's reward is credited at its own last token; what shaping adds or takes, at the very last.
    With a manager, its advantage of the turn takes the place of the reward, and the intrinsic reward is added.
    """
    raw = torch.from_numpy(step.scores["reward"].to_numpy().copy())
    score = shape_scores(
        how.shaping,
        raw,
        torch.from_numpy(pc.equal(step.rollouts["finish"], "stop").to_numpy()),
        grid.mask.sum(dim=1),
        how.max_new_tokens,
    )
    penalty = how.kl_coef if how.algorithm.kl_in == "reward" else 0.0
    kl = kl_estimate(grid.pad(step.kl), how.algorithm.kl_estimator)
    if conversations is None:
        rewards = token_rewards(score, kl, grid.mask, kl_coef=penalty)
    else:
        turn_rewards = conversations.with_last(score - raw)
        if step.turn_advantages is not None:
            turn_rewards = worker_rewards(step, conversations, how.manager)
        rewards = credit_turns(-penalty * kl, turn_rewards, conversations.turns)
    return Trajectories(
        rewards=shape_token_rewards(how.shaping, rewards, grid.mask),
        values=grid.pad(step.values),
        scores=score,
        groups=torch.from_numpy(np.unique(step.rollouts["group_id"].to_numpy(), return_inverse=True)[1]),
        mask=grid.mask,
        values_after=conversations.values_after if conversations else None,
    )


def _experience(
    algorithm: Algorithm,
    step: JoinedStep,
    estimates: Advantages,
    grid: ActionGrid,
    of_turns: dict[str, object],
) -> Experience:
    """The step's columns, with returns and advantages, whitened if the algorithm asks for that."""
    advantages = whiten(estimates.advantages, grid.mask) if algorithm.whiten_advantages else estimates.advantages
    added = {
        "proximal_logprobs": step.proximal,
        "reference_logprobs": step.reference,
        "values": step.values,
        "advantages": grid.unpad(advantages),
        "returns": grid.unpad(estimates.returns),
    }
    columns = {name: step.rollouts[name] for name in Rollouts.schema.names} | {
        name: step.scores[name] for name in ("reward", "turn_rewards")
    }
    return Experience.of(
        columns | of_turns | {name: ragged.unflat(column, step.offsets, pa.float32()) for name, column in added.items()}
    )
