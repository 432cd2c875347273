"""What the suite's own way to start Ray's workers promises: only the imports are done beforehand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.session import Session


class Process:
    """Tells of the process that it lives in."""

    def tell(self) -> dict[str, Any]:
        parent = Path("/proc", str(os.getppid()), "cmdline").read_text().split("\0")
        packages = {name.partition(".")[0] for name in sys.modules}  # cluster is imported with this class
        return {
            "parent": [Path(each).name for each in parent if each.endswith(".py")],
            "own": packages & {"actors", "pipeline"},
            "torch": "torch" in sys.modules,
            "leads": os.getpgrp() == os.getpid(),
            "nice": os.nice(0),
            "GIVEN": os.environ.get("GIVEN"),
            "folder": os.getcwd(),
        }


@pytest.mark.parametrize("given", [None, "by the runtime environment"])
def test_a_worker_is_forked_and_has_what_ray_gave_it(given: str | None, ray_session: Session) -> None:
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"GIVEN": given}}} if given else {}
    handle: Any = ray.remote(Process).options(num_cpus=0, **options).remote()
    assert ray.get(handle.tell.remote(), timeout=300) == {
        "parent": ["forked_workers.py"],
        "own": set(),
        "torch": True,
        "leads": True,
        "nice": min(19, os.nice(0) + 15),
        "GIVEN": given,
        "folder": os.getcwd(),
    }
    ray.kill(handle)
