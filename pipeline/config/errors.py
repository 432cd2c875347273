"""The words of an error in a recipe: one line a fault, with field, rule, value and the nearest right key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.algorithms import registry
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.ppo import PPO
from pipeline.config.run_config import RunConfig, leaves

NOT_FINITE = "must be a finite number, got {}; where it is a limit, give a large one"


def explain(error: ValidationError, recipe: Mapping[str, Any]) -> str:
    """The errors of pydantic, one line each: field, rule, value, and the nearest right key for an unknown one."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        match fault["type"]:
            case "extra_forbidden":
                lines.append(f"{where}: unknown key{_nearest(where, recipe)}")
            case "missing":
                lines.append(f"{where}: must be given")
            case registry.WHOLE_LINE:
                lines.append(fault["msg"])
            case _ if isinstance(fault["input"], float) and not math.isfinite(fault["input"]):
                lines.append(f"{where}: {NOT_FINITE.format(fault['input'])}")
            case "value_error":
                lines.append(f"{where}: {fault['ctx']['error']}, got {shown(fault['input'])}")
            case _:
                lines.append(f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {shown(fault['input'])}")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value in at most 80 characters."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python writes none of more than 4,300 digits
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(where: str, recipe: Mapping[str, Any]) -> str:
    import difflib

    keys = leaves(RunConfig, algorithm=_algorithm_of(recipe))
    if where in leaves(RunConfig):
        return "; another algorithm has it"
    sections = {key.rpartition(".")[0] for key in keys if "." in key}
    close = difflib.get_close_matches(where, [*sections, *keys], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _algorithm_of(recipe: Mapping[str, Any]) -> type[Algorithm]:
    """The class that a recipe names; the default's where it names none."""
    section = recipe.get("algorithm")
    name = section.get("name") if isinstance(section, Mapping) else None
    try:
        return registry.algorithm_class(name) if isinstance(name, str) else PPO
    except ValueError:
        return PPO
