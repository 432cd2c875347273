"""The settings that may change between two starts of a run: those for which earlier commits stay valid.

Every setting has one kind, in one table. A setting that changes no weight may change freely, and the change is
reported. A setting that changes results only by rounding must be allowed by name. Any other change is another run. Left
out: guesses of what the user meant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from cluster.config import Config
from pipeline.config.run_config import RunConfig


@dataclass(frozen=True, slots=True)
class Kind:
    """The effect of a change of a setting, in words.

    free: it needs no --allow-change. same: the run gives the same result, except for rounding.
    """

    words: str
    free: bool = False
    same: bool = False


SAME_BITS = Kind("gives the same weights", free=True, same=True)
SAME_POLICY = Kind("gives the same policy, measured otherwise", free=True)
ROUNDING = Kind("gives the same weights except for rounding", same=True)
# fewer steps than are done are refused in pipeline/run/start.py
LENGTH = Kind("makes the learning-rate schedules end at that step from now on", free=True)
ANOTHER_RUN = Kind("not in a run that has begun")

_GANG = {
    **dict.fromkeys(("ranks", "gpus", "zero_stage", "micro_batch_size", "pack_tokens"), ROUNDING),
    **dict.fromkeys(
        (
            "dtype",
            "trainable",
            "learning_rate",
            "schedule",
            "warmup_fraction",
            "betas",
            "adam_epsilon",
            "weight_decay",
            "max_grad_norm",
        ),
        ANOTHER_RUN,
    ),
}
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("task", "seed", "data", "model", "algorithm", "shaping", "sampling", "batch"), ANOTHER_RUN),
    **dict.fromkeys(("manager", "max_staleness", "schedule"), ANOTHER_RUN),
    "algorithm.kl_every": SAME_BITS,
    "steps": LENGTH,
    **dict.fromkeys(("commit_every", "keep_commits"), SAME_BITS),
    **{f"finetune.{key}": ANOTHER_RUN for key in ("epochs", "early_stop", "batch_size")},
    **{
        f"reward_model.{key}": ANOTHER_RUN
        for key in ("epochs", "early_stop", "batch_size", "standardise", "pairs", "samples")
    },
    **{f"{stage}.checkpoint_every": SAME_BITS for stage in ("finetune", "reward_model")},
    **{
        f"{gang}.{key}": kind
        for gang in ("policy", "critic", "finetune.learner", "reward_model.learner")
        for key, kind in _GANG.items()
    },
    "critic.start": ANOTHER_RUN,
    **{f"environment.{key}": ANOTHER_RUN for key in ("name", "partner", "max_turns")},
    **{f"environment.{key}": SAME_BITS for key in ("timeout_s", "attempts")},
    **{f"rollout.{key}": SAME_BITS for key in ("workers", "min_workers")},
    "rollout.gpus": ROUNDING,
    **{f"rollout.{key}": ANOTHER_RUN for key in ("dtype", "chunk_size", "slots", "segment_tokens")},
    **{f"reward.{key}": ANOTHER_RUN for key in ("function", "model", "label")},
    **{f"reward.{key}": SAME_BITS for key in ("workers", "min_workers", "timeout_s", "max_failed")},
    **{f"reward.{key}": ROUNDING for key in ("gpus", "batch_size")},
    **{f"reference.{key}": SAME_BITS for key in ("workers", "min_workers")},
    "reference.dtype": ANOTHER_RUN,
    **{f"reference.{key}": ROUNDING for key in ("gpus", "batch_size")},
    **{f"evaluation.{key}": SAME_POLICY for key in ("prompts", "samples", "best_of", "demonstrations")},
    **{f"evaluation.{key}": SAME_BITS for key in ("shown", "workers", "gpus")},
    # both decide the number of threads of a learner
    **{f"cluster.{key}": ROUNDING for key in ("cpus_per_bundle", "share_devices")},
    **{
        f"cluster.{key}": SAME_BITS
        for key in (
            "address",
            "storage",
            "storage_timeout_s",
            "start_timeout_s",
            "place_timeout_s",
            "node_timeout_s",
            "learner_labels",
            "worker_labels",
            "ready_timeout_s",
            "call_timeout_s",
            "peer_timeout_s",
            "pulse_timeout_s",
            "max_attempts",
            "max_replacements",
            "replacement_window_s",
            "max_rebuilds",
        )
    },
}

_OF_DATA = ("data.comparisons", "data.demonstrations", "data.prompts")
_MODELS = {"model.path": "model ", "reward.model": "reward model ", "environment.partner": "partner model "}
"""Setting that names a model -> prefix of the names of its checksums."""

OTHER_DATA = {
    "data": "changes the course of the run from here on; what is done stays as it is",
    "model": "is used only if its weights are those that the commits were made from",
}
"""The effect of `--allow-change data` and `--allow-change model`: of other contents, under whatever file name."""


def kind_of(key: str) -> Kind:
    """The kind of a setting: its own, or its section's."""
    while key not in KINDS and "." in key:
        key = key.rpartition(".")[0]
    return KINDS.get(key, ANOTHER_RUN)


def is_same_result(key: str) -> bool:
    """Whether a run gives the same result, except for rounding, whatever the setting."""
    return kind_of(key).same


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """key -> (value before, value after) of every setting that differs; None where it is missing."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def completed(before: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Recorded settings, and the defaults of those that the release which recorded them did not have.

    A new setting's default is what was done before there was the setting, so that older runs can be gone on with.
    """
    found = dict(before)
    for name, field in type(config).model_fields.items():
        own, known = getattr(config, name), before.get(name, {})
        if isinstance(own, Config) and isinstance(known, Mapping):
            found[name] = completed(known, own)
        elif name not in before and not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return found


def paths_changed(before: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """Setting -> former path, of each data file and model that has another path now."""
    changed = differences(before, config.model_dump(mode="json"))
    return {key: old for key, (old, new) in changed.items() if key in (*_OF_DATA, *_MODELS) and old and new}


def moved(paths: Mapping[str, str], data_before: Mapping[str, str], data_now: Mapping[str, str]) -> dict[str, str]:
    """Those of `paths_changed` that have the same contents at another path.

    data_before, data_now: name -> checksum of data and models, at the last start and now. Contents without a checksum,
    such as a model of the hub, are not known to be the same.
    """

    def is_same(key: str) -> bool:
        now, before = (_contents(key, data) for data in (data_now, data_before))
        return bool(now) and now == before

    return {key: path for key, path in paths.items() if is_same(key)}


def _contents(key: str, data: Mapping[str, str]) -> dict[str, str]:
    """The checksums of the contents of a setting; for a data file those of all data, because a split uses all."""
    if key in _MODELS:
        return {name: checksum for name, checksum in data.items() if name.startswith(_MODELS[key])}
    return {name: checksum for name, checksum in data.items() if owner_of(name) == "data"}


def check_changes(
    before: Mapping[str, Any], config: RunConfig, allowed: Collection[str], same: Collection[str] = ()
) -> list[str]:
    """One line for each change, with its effect. same: settings whose paths have the same contents as before.

    Raises ValueError with all differences when one is neither free nor allowed.
    """
    changed = differences(completed(before, config), config.model_dump(mode="json"))
    if not all(key in same or _may_change(key, allowed) for key in changed):
        lines = [
            f"  {key}: {old!r} -> {new!r}   {_SAME if key in same else _verdict(key, allowed)}"
            for key, (old, new) in changed.items()
        ]
        raise ValueError(
            "\n".join(["the settings must be those that the run was begun with, but they differ:", *lines, _REMEDY])
        )
    return [
        f"{key}: {old!r} -> {new!r}, which {_SAME if key in same else kind_of(key).words}"
        for key, (old, new) in changed.items()
    ]


_SAME = "holds the same"
_REMEDY = "Put config.toml back as it was, allow what may change, or begin a new run with `raylign run`."


def _may_change(key: str, allowed: Collection[str]) -> bool:
    kind = kind_of(key)
    return kind.free or (key in allowed and kind is not ANOTHER_RUN)


def _verdict(key: str, allowed: Collection[str]) -> str:
    kind = kind_of(key)
    if kind is ANOTHER_RUN:
        return kind.words + (", unless it holds the same" if key in (*_OF_DATA, *_MODELS) else "")
    return "(allowed)" if _may_change(key, allowed) else f"{kind.words}: --allow-change {key}"


def check_data_changes(before: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str]) -> list[str]:
    """One line for each change in the contents of data and models, with its effect.

    before, now: name -> checksum, at the last start and now; a name that one of the two lacks is not compared. Raises
    ValueError with all differences when one is not allowed, by `data` or `model`.
    """
    changed = {name: (old, now[name]) for name, old in before.items() if name in now and now[name] != old}
    if any(owner_of(name) not in allowed for name in changed):
        lines = [f"  {name}: {old} -> {new}   {_data_verdict(name, allowed)}" for name, (old, new) in changed.items()]
        raise ValueError(
            "\n".join(
                [
                    "data and models must hold what they held when the run was last started, but they differ:",
                    *lines,
                    _DATA_REMEDY,
                ]
            )
        )
    return [f"{name}: {old} -> {new}, which {_effect(name)}" for name, (old, new) in changed.items()]


_DATA_REMEDY = "Put the files back as they were, allow it, or begin a new run with `raylign run`."


def owner_of(name: str) -> str:
    """The name by which a change of this checksum is allowed: `data` or `model`."""
    return "model" if "model" in name.split() else "data"


def _effect(name: str) -> str:
    """The effect of other contents; a partner was never part of the commits, so it is used whatever its weights."""
    return OTHER_DATA["data" if name.startswith(_MODELS["environment.partner"]) else owner_of(name)]


def _data_verdict(name: str, allowed: Collection[str]) -> str:
    owner = owner_of(name)
    return "(allowed)" if owner in allowed else f"{_effect(name)}: --allow-change {owner}"
