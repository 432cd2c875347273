"""The result of a run, for its last lines in the terminal and for its callers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation.results import Evaluation
from pipeline.folder.manifests import StageName


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a run.

    stages: the result of each stage, by name. evaluation: None if it was not asked for, or was done earlier. seconds:
    wall-clock time of this start.
    """

    run_dir: Path
    stages: dict[StageName, dict[str, Any]]
    evaluation: Evaluation | None
    seconds: float
