"""Workers that will have nothing to do; the plan and the start say so, because they cost resources."""

from __future__ import annotations

import math

from pipeline.config.run_config import RunConfig
from pipeline.loop.wiring import demands


def idle_workers(config: RunConfig) -> list[str]:
    """One line for each pool with more workers than a step has chunks, and each gang with more ranks than rows."""
    batch, per_chunk = config.batch, config.rollout.chunk_size // config.batch.group_size
    chunks, rollouts, lines = math.ceil(batch.prompts / per_chunk), batch.samples // batch.minibatches, []
    for demand in demands(config):
        is_gang = demand.turn == "learn"
        parts = rollouts if is_gang else chunks
        if demand.workers > parts:
            key, unit = (
                (f"{demand.role}.ranks", "a minibatch has {} rollout(s)")
                if is_gang
                else (f"{demand.role}.workers", "a step has {} chunk(s)")
            )
            smaller = max(batch.prompts // demand.workers, 1) * batch.group_size
            remedy = (
                "lower it"
                if is_gang or batch.prompts < demand.workers
                else f"lower it, or set rollout.chunk_size = {smaller}"
            )
            lines.append(
                f"{key} = {demand.workers}, but {unit.format(parts)}: {demand.workers - parts} of them will idle; "
                f"{remedy}"
            )
    for name, section in (("finetune", config.finetune), ("reward_model", config.reward_model)):
        idle = section.learner.ranks - section.batch_size
        if section.epochs and idle > 0:
            lines.append(
                f"{name}.learner.ranks = {section.learner.ranks}, but {name}.batch_size = {section.batch_size}: {idle} "
                "of them will idle; lower it"
            )
    return lines
