"""How many workers of a pool are worth their nodes, from how long the learners wait for them. Pure.

    the learners wait much   ask for all that could have work at the same time
    they hardly wait, for a while, and one fewer would change little   give one back, so that its node can go
    a worker has never work  give it back

It never changes a result, because no result depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HUNGRY = 0.3  # share of a step's time in which learners wait, from which more workers are asked for
CONTENT = 0.15  # share below which, also with one worker fewer, the learners hardly wait
PATIENCE = 5  # steps in a row; one may be chance


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """One step. seconds: its time; waited: of that, for the pool. chunks: pieces of work that it had at the same time.
    workers: that were ready.
    """

    seconds: float
    waited: float
    chunks: int
    workers: int

    @property
    def hunger(self) -> float:
        """Share of the step in which the learners waited."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    @property
    def hunger_with_one_less(self) -> float:
        """The same, if the same work had been done by one worker fewer."""
        if self.workers < 2:
            return 1.0
        waited = self.waited * self.workers / (self.workers - 1)
        return waited / (self.seconds - self.waited + waited) if self.seconds > 0 else 0.0


def wanted(loads: Sequence[StepLoad], *, held: int, core: int, most: int) -> int:
    """The number of workers to have, besides the `core` that always stay.

    loads: the steps since the number was last changed. held: workers that are there or asked for, besides the core.
    most: that the recipe allows, besides the core.
    """
    if not loads:
        return held
    useful = min(most, max(0, max(load.chunks for load in loads) - core))
    if held > useful and len(loads) >= PATIENCE:
        return useful
    if held < useful and loads[-1].hunger >= HUNGRY:
        return useful
    if held and len(loads) >= PATIENCE and all(load.hunger_with_one_less < CONTENT for load in loads[-PATIENCE:]):
        return held - 1
    return held
