"""Names of a recipe or a command on the Hugging Face hub, and whether the hub has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from actors.hub import Kind, is_cached, is_path, problems
from pipeline.config.run_config import RunConfig
from pipeline.data.sources import is_hub, sources_of

_POLICY, _JUDGE = (
    "must be a folder or hub name of a causal language model",
    "must be a folder or hub name of a sequence classifier",
)
_RULES = {
    "model.path": _POLICY,
    "reward.model": _JUDGE,
    "environment.partner": _POLICY,
    "--policy": _POLICY,
    "--baseline": _POLICY,
    "--reward-model": _JUDGE,
}
_ON_HUB = re.compile(r"hf://(?P<kind>datasets|models)?/?(?P<name>[\w.-]+/[\w.-]+)")


def on_hub(config: RunConfig) -> dict[str, str]:
    """Key -> name of every repository of the hub that a recipe names."""
    models = {
        "model.path": config.model.path,
        "reward.model": config.reward.model,
        "environment.partner": config.environment.partner,
    }
    found = {key: name for key, name in models.items() if name and not is_path(name)}
    return found | {
        f"data.{kind}": source
        for kind, source in sources_of(config.data).items()
        if is_hub(source) or _ON_HUB.match(source)
    }


def not_here(remote: Mapping[str, str]) -> dict[str, str]:
    """Those of the repositories that are not in the cache. A data set counts as one that is not."""
    return {key: name for key, name in remote.items() if not (key in _RULES and is_cached(name))}


def check_hub(remote: Mapping[str, str]) -> None:
    """Raises ValueError for the first repository that is neither in the cache nor given by the hub.

    remote: key of a recipe, or option -> name.
    """
    if not remote:
        return
    repositories = {key: _repository(key, name) for key, name in remote.items()}
    missing = problems(dict(repositories.values()))
    for key, name in remote.items():
        if problem := missing.get(repositories[key][0]):
            if key in _RULES:
                raise ValueError(
                    f"{key}: {_RULES[key]}, got {name!r}: there is no such folder; as for the Hugging Face hub: "
                    f"{problem}"
                )
            raise ValueError(
                f"{key}: must be a file here or a data set of the Hugging Face hub, got {name!r}: "
                f"there is no such file; as for the Hugging Face hub: {problem}; "
                "mend the path, go online, or download its files and give their path"
            )


def _repository(key: str, name: str) -> tuple[str, Kind]:
    if key in _RULES:
        return name, "model"
    if match := _ON_HUB.match(name):
        return match["name"], "dataset" if match["kind"] == "datasets" else "model"
    return name.partition(":")[0], "dataset"
