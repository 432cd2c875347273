"""The dtypes of a run: `auto` is decided once, and emulated bfloat16 is warned of, with its cost on this machine.

The driver's machine decides. Left out: the workers' machines, which may differ; then a recipe should name its dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from actors.config import DtypeChoice
from cluster.signals import load
from pipeline.config.run_config import RunConfig


class Field(NamedTuple):
    """A dtype of a recipe, and the GPUs of the role that computes in it. is_used: whether the run has that role."""

    key: str
    dtype: DtypeChoice
    gpus: float
    is_used: bool


def settle(config: RunConfig) -> RunConfig:
    """The configuration without any `auto`: bfloat16 where the role's device has arithmetic for it, else float32.

    Raises ValueError where a role is to have a GPU and this machine has none to ask.
    """
    if any(field.dtype == "auto" for field in dtypes_of(config)):
        load("torch")
    for field in dtypes_of(config):
        if field.dtype == "auto":
            config = _with_dtype(
                config, field.key, "bfloat16" if field.is_used and _computes_bfloat16(field) else "float32"
            )
    return config


def emulated(config: RunConfig) -> list[str]:
    """One line for each kind of device that would emulate bfloat16, with the slowdown measured here; else empty."""
    from actors.device import bfloat16_slowdown, computes_bfloat16

    lines = []
    asked = [field for field in dtypes_of(config) if field.is_used and field.dtype == "bfloat16"]
    for name, some in (
        ("CPU", [f for f in asked if not f.gpus]),
        ("GPU", [f for f in asked if f.gpus and _sees_gpu()]),
    ):
        if some and not computes_bfloat16(some[0].gpus) and (factor := bfloat16_slowdown(some[0].gpus)) > 1:
            keys = ", ".join(f"{field.key}.dtype" for field in some)
            lines.append(
                f"{keys}: bfloat16 is emulated on this machine's {name}, where a matrix product takes {factor:.3g} "
                "times as long as in float32; "
                "use float32, or auto, which decides by the machine"
            )
    return lines


def dtypes_of(config: RunConfig) -> Iterator[Field]:
    """Every dtype of a recipe."""
    algorithm, finetune, reward_model = config.algorithm, config.finetune, config.reward_model
    yield Field("policy", config.policy.dtype, config.policy.gpus, is_used=True)
    yield Field("rollout", config.rollout.dtype, config.rollout.gpus, is_used=True)
    yield Field("reference", config.reference.dtype, config.reference.gpus, is_used=True)  # by evaluation, too
    yield Field("critic", config.critic.dtype, config.critic.gpus, is_used=algorithm.needs_critic)
    yield Field("finetune.learner", finetune.learner.dtype, finetune.learner.gpus, is_used=finetune.epochs > 0)
    yield Field(
        "reward_model.learner", reward_model.learner.dtype, reward_model.learner.gpus, is_used=reward_model.epochs > 0
    )


def _with_dtype(config: RunConfig, key: str, dtype: DtypeChoice) -> RunConfig:
    section, _, learner = key.partition(".")
    old = getattr(config, section)
    new = old.model_copy(
        update={"learner": old.learner.model_copy(update={"dtype": dtype})} if learner else {"dtype": dtype}
    )
    return config.model_copy(update={section: new})


def _computes_bfloat16(field: Field) -> bool:
    from actors.device import computes_bfloat16

    if field.gpus and not _sees_gpu():
        raise ValueError(
            f"{field.key}.dtype: must be float32 or bfloat16 where {field.key}.gpus is {field.gpus:g} and this machine "
            "has no GPU to ask, got 'auto'; name one"
        )
    return computes_bfloat16(field.gpus)


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
