"""Which settings may change between two starts of a run: those under which the committed state still means what it meant.

Everything else is another run. Left out: any guess of what was meant; a change is named by the user, key by key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pipeline.config import RunConfig

_SAME_BITS = "gives the same weights"
_SAME_POLICY = "gives the same policy, measured otherwise"
_ROUNDING = "gives the same weights but for rounding"
_COURSE = "changes the course of the run from here on"

HARMLESS: dict[str, str] = {
    "steps": _COURSE,  # schedules are spread over them
    "commit_every": _SAME_BITS,
    "keep_commits": _SAME_BITS,
    **{f"evaluation.{key}": _SAME_BITS for key in ("shown", "workers", "gpus")},
    **{f"evaluation.{key}": _SAME_POLICY for key in ("prompts", "samples", "best_of", "demonstrations")},
    "rollout.workers": _SAME_BITS,
    "rollout.gpus": _ROUNDING,
    "reward.workers": _SAME_BITS,
    "reward.gpus": _ROUNDING,
    "reward.batch_size": _ROUNDING,
    "reward.timeout_s": _SAME_BITS,
    "reward.max_failed": _SAME_BITS,
    "reference.workers": _SAME_BITS,
    "reference.gpus": _ROUNDING,
    "reference.batch_size": _ROUNDING,
    "cluster.cpus_per_bundle": _ROUNDING,
    **{
        f"cluster.{key}": _SAME_BITS
        for key in (
            "address", "share_devices", "start_timeout_s", "place_timeout_s", "ready_timeout_s", "call_timeout_s", "peer_timeout_s", "pulse_timeout_s",
            "max_attempts", "max_replacements", "max_rebuilds",
        )
    },
    **{
        f"{learner}.{key}": _ROUNDING
        for learner in ("policy", "critic", "finetune.learner", "reward_model.learner")
        for key in ("ranks", "gpus", "zero_stage", "micro_batch_size", "pack_tokens")
    },
    "finetune.checkpoint_every": _SAME_BITS,
    "reward_model.checkpoint_every": _SAME_BITS,
}  # fmt: skip


def is_same_result(key: str) -> bool:
    """Whether a setting leaves what a run makes as it is, but for rounding."""
    return HARMLESS.get(key) in (_SAME_BITS, _ROUNDING)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """key -> (value before, value after) of every setting that differs; None where there was or is none."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def check_changes(before: Mapping[str, Any], config: RunConfig, allowed: Collection[str]) -> list[str]:
    """What each allowed change means, a line each. Raises ValueError with all differences when one is not allowed."""
    changed = differences(before, config.model_dump(mode="json"))
    if any(key not in allowed or key not in HARMLESS for key in changed):
        lines = [f"  {key}: {old!r} -> {new!r}   {_verdict(key, allowed)}" for key, (old, new) in changed.items()]
        raise ValueError("\n".join(["the settings must be those that the run was begun with, but they differ:", *lines, _REMEDY]))
    return [f"{key}: {old!r} -> {new!r}, which {HARMLESS[key]}" for key, (old, new) in changed.items()]


_REMEDY = "Put config.toml back as it was, allow what may change, or begin a new run with `raylign run`."


def _verdict(key: str, allowed: Collection[str]) -> str:
    if key not in HARMLESS:
        return "not in a run that has begun"
    return "(allowed)" if key in allowed else f"{HARMLESS[key]}: --allow-change {key}"
