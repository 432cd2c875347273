"""Deadly samples: those that killed or hung a worker, what was being done with them, and what happened."""

from __future__ import annotations

from actors.reward.worker import ENVIRONMENT

# what is done with a sample, in the words of the messages, and the role whose workers do it
GENERATING, SCORING, REFERENCE = "generating", "scoring", "reference log-probs of"
CONVERSING = "conversing"
ROLES = {GENERATING: "rollout", SCORING: "reward", REFERENCE: "reference", CONVERSING: "environment"}


class DeadlySamples:
    """The samples that a search has found to kill or hang their worker."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], dict[int, str]] = {}  # (what was done, chunk) -> sample -> reason

    def during(self, doing: str, chunk: int) -> dict[int, str]:
        """The chunk's samples that were deadly while this was done with them: sample -> reason. May be added to."""
        return self._found.setdefault((doing, chunk), {})

    def of(self, chunk: int) -> dict[int, str]:
        """The chunk's samples that were deadly to a worker of any role: sample -> reason."""
        return {sample: why for doing in ROLES for sample, why in self._found.get((doing, chunk), {}).items()}


def done_with(why: str) -> str:
    """What was done with a sample when it failed, read from the reason `why`.

    The reason of a reward function that raised does not name it; then the sample was being scored.
    """
    if why.partition(": ")[2].startswith(ENVIRONMENT):
        return CONVERSING
    return next((doing for doing in ROLES if why.startswith(f"error: {doing} it ")), SCORING)
