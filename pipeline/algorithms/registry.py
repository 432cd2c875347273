"""The algorithms that a recipe can name: those of this folder by their names, and a user's own by import path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.reinforce_baseline import ReinforceBaseline
from pipeline.algorithms.reinforce_pp import ReinforcePP
from pipeline.algorithms.rloo import RLOO

ALGORITHMS: dict[str, type[Algorithm]] = {
    kind.model_fields["name"].default: kind
    for kind in (PPO, Reinforce, ReinforceBaseline, A2C, RLOO, GRPO, ReinforcePP)
}
WHOLE_LINE = "whole_line"
"""The type of a pydantic error whose message names field, rule, value and remedy already."""


def algorithm_class(name: str) -> type[Algorithm]:
    """The class that `algorithm.name` says.

    Raises ValueError, naming the field, for a name that is neither in this folder nor the import path of an algorithm.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" not in name:
        known = ", ".join(map(repr, ALGORITHMS))
        raise ValueError(
            f"algorithm.name: must be one of {known}, or the import path of your own, package.module:name, got {name!r}"
        )
    from actors.reward.worker import load_function

    found: Any = load_function(name, "algorithm.name")
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        what = f"a class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ValueError(
            f"algorithm.name: must name a subclass of pipeline.algorithms.base.Algorithm, got {name!r}, which is "
            f"{what}; derive it from Algorithm or from one of the algorithms in pipeline/algorithms"
        )
    if found.model_fields["name"].annotation is not str:
        raise ValueError(
            f"algorithm.name: must name a class that leaves the type of `name` as it is, got {name!r}, which has "
            "another; remove it from the class, since the import path is the name"
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(
            f"algorithm.name: must name a class that defines {missing}, got {name!r}, which does not; "
            "see pipeline/algorithms/README.md"
        )
    return found


def _algorithm(given: Any) -> Algorithm:
    """The section `algorithm` of a recipe as an instance of the class that its `name` says.

    An instance keeps its settings and gets the name by which a recipe would find its class.
    """
    if isinstance(given, Algorithm):
        return given if _has_its_name(given) else given.model_copy(update={"name": _import_path(type(given))})
    if not isinstance(given, Mapping):
        raise PydanticKnownError("model_type", {"class_name": "Algorithm"})
    if "name" not in given:
        raise _fault(given, "missing")
    name = given["name"]
    if not isinstance(name, str):
        raise _fault(name, "string_type")
    try:
        kind = algorithm_class(name)
    except ValueError as error:
        raise PydanticCustomError(WHOLE_LINE, "{line}", {"line": str(error)}) from error
    return kind.model_validate(dict(given))


def _fault(given: Any, kind: str) -> ValidationError:
    return ValidationError.from_exception_data("Algorithm", [InitErrorDetails(type=kind, loc=("name",), input=given)])


def _has_its_name(algorithm: Algorithm) -> bool:
    try:
        return algorithm_class(algorithm.name) is type(algorithm)
    except ValueError:
        return False


def _import_path(kind: type[Algorithm]) -> str:
    """Raises ValueError for a class inside of another or of a function, which no recipe could name."""
    if "." in kind.__qualname__:
        raise ValueError(
            f"algorithm: must be of a class at the top of its module, got {kind.__qualname__}; move it there"
        )
    return f"{kind.__module__}:{kind.__qualname__}"


AnyAlgorithm = Annotated[SerializeAsAny[Algorithm], PlainValidator(_algorithm)]
