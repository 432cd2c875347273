"""The learning rate's schedule over a run: a pure function of the update's index, so resuming needs no state."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    update: int,
    total_updates: int,
    *,
    peak: float,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_fraction: float,
) -> float:
    """The learning rate of the update with index `update` in [0, total_updates).

    Warm-up takes W = round(warmup_fraction * total_updates) updates. Its rate rises linearly, peak * (update + 1) /
    (W + 1), so that no update is wasted on a rate of zero. Then p = (update - W) / (total_updates - W) rises from 0
    towards 1, and the rate is peak (constant), peak * (1 - p) (linear; Huang et al. 2023, detail 9) or
    peak * (1 + cos(pi * p)) / 2 (cosine). Raises ValueError when the index lies outside the run.
    """
    if not 0 <= update < total_updates:
        raise ValueError(f"update: must be >= 0 and < total_updates = {total_updates}, got {update}")
    warmup = round(warmup_fraction * total_updates)
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    p = (update - warmup) / (total_updates - warmup)
    if schedule == "linear":
        return peak * (1 - p)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * p)) / 2
    return peak
