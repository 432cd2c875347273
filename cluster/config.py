"""Settings of the cluster floor, and the frozen base class of every configuration of the project.

Torch-free and Ray-free: the command line imports this to answer `--help` in well under a second.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST_WORKERS = 4096  # processes of one role: more than anybody has, and few enough to be placed quickly
# a time-out; operating systems count milliseconds in 31 bits, which is 24 days
Seconds = Annotated[float, Field(gt=0, le=1_000_000)]
# of a node, as Ray has them
_VALUE = r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
Label = Annotated[str, Field(pattern=rf"^[A-Za-z0-9./_-]+=!?({_VALUE}|in\({_VALUE}(,{_VALUE})*\))$")]
LongSeconds = Annotated[float, Field(ge=0.1, le=1_000_000)]  # a time-out that is checked in coarser steps


class Config(BaseModel):
    """Frozen, typed, closed: an unknown key is an error, and a field's docstring is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ClusterConfig(Config):
    """Where the processes of a run live, and how long the run waits for them."""

    address: str = ""
    """Ray cluster to join (`auto`, or host:port). Empty: RAY_ADDRESS if it is set, else a local Ray of this run."""

    share_devices: bool = True
    """Let roles that take turns share one bundle of devices. False: every worker has its own devices."""

    cpus_per_bundle: int = Field(default=0, ge=0, le=MOST_WORKERS)
    """CPUs of one bundle; the processes in it share them as torch threads.

    0: this machine's cores divided by the number of bundles; on a cluster, the most with which all bundles fit its
    nodes. Decided once, at the start of the run.
    """

    storage: str = ""
    """URL of a folder to which the run folder is copied after each commit and stage, such as s3://bucket/runs/first.

    From there the run can go on anywhere. Empty: the run folder alone. Credentials never belong here.
    """

    storage_timeout_s: Seconds = 300.0
    """Longest time in which the storage must take or give one file, all attempts together, in seconds."""

    start_timeout_s: Seconds = 60.0
    """Longest wait for Ray itself to start or answer, in seconds."""

    place_timeout_s: Seconds = 30.0
    """Longest wait for the cluster to reserve the bundles, in seconds; raise it if an autoscaler must add nodes."""

    node_timeout_s: Seconds = 600.0
    """Longest wait for another node, in seconds, when the learners or the last worker of a pool have lost theirs."""

    learner_labels: tuple[Label, ...] = ()
    """Labels of the nodes that may hold learners, KEY=VALUE each, such as ray.io/market-type=on-demand."""

    worker_labels: tuple[Label, ...] = ()
    """Labels of the nodes that may hold workers which sit with no learner. Empty: any node."""

    ready_timeout_s: Seconds = 300.0
    """Longest wait for a started process to load its model and report ready, in seconds."""

    call_timeout_s: Seconds = 1800.0
    """Longest wait for one call to a worker or a learner, in seconds."""

    pulse_timeout_s: LongSeconds = 60.0
    """Longest silence of a process, in seconds; then it is replaced.

    Each process gives ten signs of life in that time, whatever it computes.
    """

    peer_timeout_s: LongSeconds = 300.0
    """Longest wait of a learner rank for its peers, in seconds.

    It holds for one collective operation, and for a rank's answer once another rank has answered.
    """

    max_attempts: int = Field(default=3, ge=1)
    """Attempts at one piece of work that loses or hangs its worker.

    Then the deadly samples are searched for. If the work has no samples, the run stops with the last error.
    """

    max_replacements: int = Field(default=8, ge=0)
    """Incidents of one pool within `replacement_window_s` before the run stops.

    All workers that are lost with one node, or over one chunk, are one incident.
    """

    replacement_window_s: float = Field(default=3600.0, gt=0)
    """Time for which an incident counts, in seconds."""

    max_rebuilds: int = Field(default=3, ge=0)
    """Rebuilds of the learners in a row, without a commit in between, before the run stops with the last error."""
