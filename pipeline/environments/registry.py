"""Loads environments and partners by name: one of this package's environments, or the user's own by import path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actors.config import MODEL_PARTNER
from actors.reward.worker import load_function, user_code
from pipeline.environments.checks import CheckedEnvironment
from pipeline.environments.environment import Environment
from pipeline.environments.model_partner import PartnerSpec
from pipeline.environments.partner import Partner

ENVIRONMENTS = {
    "world": "pipeline.environments.world.environment:World",
    "twenty-questions": "pipeline.environments.twenty_questions.game:TwentyQuestions",
    MODEL_PARTNER: "pipeline.environments.model_partner:ModelPartner",
}


def load_environment(name: str, partner: PartnerSpec | None = None) -> CheckedEnvironment:
    """Make an environment by its name in `ENVIRONMENTS` or by import path; all its answers are checked.

    partner: the language model that the recipe names as partner; the environment is made with it as its one argument.
    Raises ValueError that lists the names, or says why the environment cannot be made.
    """
    if name not in ENVIRONMENTS and ":" not in name:
        raise ValueError(
            f"environment: must be one of {', '.join(ENVIRONMENTS)} or an import path package.module:name, got {name!r}"
        )
    given = () if partner is None else (partner,)
    made = _made(ENVIRONMENTS.get(name, name), "environment", ("reset", "step", "close"), *given)
    environment: Environment = made
    return CheckedEnvironment(environment, name)


def load_partner(name: str) -> Partner:
    """Make a partner by import path. Raises ValueError that says why it cannot be made."""
    partner: Partner = _made(name, "partner", ("reply",))
    return partner


def _made(path: str, field: str, methods: tuple[str, ...], *arguments: Any) -> Any:
    make: Callable[..., Any] = load_function(path, field=field)
    what = "of one argument, since environment.partner is given" if arguments else "without arguments"
    with user_code(f"{field}: must be a class or function {what}, got {path!r}"):
        made = make(*arguments)
    lacking = [method for method in methods if not callable(getattr(made, method, None))]
    if lacking:
        raise ValueError(
            f"{field}: must have the methods {', '.join(methods)}, got {path!r} without {', '.join(lacking)}; see "
            f"pipeline/environments/{field}.py"
        )
    return made
