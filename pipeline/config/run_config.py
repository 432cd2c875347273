"""A run's whole configuration: typed, frozen, closed.

The command line, `run` and `folder` know it; every other room is given the part that it uses.
"""

from __future__ import annotations

from typing import Any

from cluster.config import Config
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.registry import ALGORITHMS
from pipeline.config.loop_config import LoopConfig
from pipeline.config.preparation_config import PreparationConfig
from pipeline.config.sections import EvaluationConfig


class RunConfig(LoopConfig, PreparationConfig):
    """Everything a run depends on.

    Its keys stand in the order of the bases, the last one first: in --help and in config.toml.
    """

    evaluation: EvaluationConfig = EvaluationConfig()


def leaves(model: type[Config], prefix: str = "", algorithm: type[Algorithm] | None = None) -> list[str]:
    """Every key of a configuration, as `section.field`; of the algorithm, those of this one, or of any built-in one."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kinds = _kinds(field.annotation, algorithm)
        keys += [prefix + name] if not kinds else [key for kind in kinds for key in leaves(kind, f"{prefix}{name}.")]
    return keys


def _kinds(annotation: Any, algorithm: type[Algorithm] | None) -> list[type[Config]]:
    """The classes whose fields a section may have; none for what is no section."""
    if not (isinstance(annotation, type) and issubclass(annotation, Config)):
        return []
    if annotation is not Algorithm:
        return [annotation]
    return [algorithm] if algorithm else [*ALGORITHMS.values()]
