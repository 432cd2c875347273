"""The files with which clusters are started, as data: Ray's launcher, KubeRay, Compose, the Dockerfiles."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CLUSTERS, KUBERAY, DOCKER = ROOT / "cluster" / "clusters", ROOT / "cluster" / "kuberay", ROOT / "docker"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION: str = PROJECT["project"]["version"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
MARKET = "ray.io/market-type"  # Ray's own label of a node: on-demand or spot


def read(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text())


def documents(path: Path) -> dict[str, Any]:
    """Kind -> Kubernetes object of that kind."""
    found = list(yaml.safe_load_all(path.read_text()))
    assert len({each["kind"] for each in found}) == len(found)
    return {each["kind"]: each for each in found}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, its text) of a Dockerfile, comments left out, continued lines joined."""
    lines = [line for line in (DOCKER / dockerfile).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, text.strip()) for name, _, text in pairs]


def last_stage(dockerfile: str) -> dict[str, str]:
    """Instruction -> its last text in the stage that becomes the image."""
    found = instructions(dockerfile)
    start = max(number for number, (name, _) in enumerate(found) if name == "FROM")
    return dict(found[start:])


def runs_in(text: str) -> Iterator[list[str]]:
    """The arguments of each `raylign run`, `train` and `submit` in a README or an entrypoint."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?<![\w`])raylign ((?:run|train|submit) .*)", line)
        if found and not re.search("--(attach|stop)", line):
            yield shlex.split(found[1], comments=True)


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Name -> value, of a container's environment."""
    return {each["name"]: each["value"] for each in container.get("env", [])}


def user_of(dockerfile: str) -> str:
    """The number of an image's user."""
    (uid,) = [text.removeprefix("UID=") for name, text in instructions(dockerfile) if name == "ARG" and "UID=" in text]
    return uid
