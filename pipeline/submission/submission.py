"""What is asked of `raylign submit`, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

ACTIONS = ("run", "sft", "reward", "train")  # commands that a job can be, the default first


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is to be submitted, or to be attached to or stopped: then there is no config.

    run_dir: an absolute path on the cluster. what: the command that the job runs, such as `run`. python: the
    interpreter there. cpus, labels: of the node of its driver. wait: whether to follow it to its end.
    """

    address: str
    run_dir: PurePosixPath
    what: str = "run"
    recipe: str = ""
    config: RunConfig | None = None
    python: str = "python"
    cpus: float = 0.0
    labels: Mapping[str, str] | None = None
    wait: bool = True

    @classmethod
    def of(cls, *, address: str, run_dir: str, **more: Any) -> Self:
        """Raises ValueError for an address or a run folder that cannot be one."""
        if not address.startswith(("http://", "https://")):
            raise ValueError(
                f"--address: must be the dashboard of a cluster, such as http://HEAD:8265, got {address or 'none'}"
            )
        path = PurePosixPath(run_dir)
        if not path.is_absolute():
            raise ValueError(
                "--run-dir: must be an absolute path that all nodes of the cluster see, such as /shared/runs/first, "
                f"got {run_dir or 'none'}"
            )
        return cls(address=address.rstrip("/"), run_dir=path, **more)


def labels_of(given: Sequence[str]) -> dict[str, str]:
    """Labels from words KEY=VALUE. Raises ValueError for another word."""
    pairs = [word.partition("=") for word in given]
    for word, (key, _, value) in zip(given, pairs, strict=True):
        if not (key and value):
            raise ValueError(f"--driver-label: must be KEY=VALUE, got {word!r}; such as ray.io/market-type=on-demand")
    return {key: value for key, _, value in pairs}
