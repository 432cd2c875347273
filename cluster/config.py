"""Settings of the cluster floor, and the frozen base every configuration class of the project derives from.

Torch-free and Ray-free: the command line imports this to answer `--help` in well under a second.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Frozen, typed, closed: an unknown key is an error, and a field's docstring is its one description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ClusterConfig(Config):
    """Where the run's processes live and how long anybody waits for them."""

    address: str = ""
    """Ray cluster to join (`auto`, or host:port). Empty: RAY_ADDRESS if it is set, else a local Ray of this run."""

    share_devices: bool = True
    """Roles that take turns share one bundle of devices. False gives every worker devices of its own."""

    cpus_per_bundle: int = Field(default=0, ge=0)
    """CPUs of one bundle; the processes in it share them as torch threads. 0: this machine's cores over the bundles, fixed at the start of the run."""

    start_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for Ray itself to start or answer, in seconds."""

    place_timeout_s: float = Field(default=30.0, gt=0)
    """Longest wait for the cluster to reserve the bundles, in seconds. Raise it where an autoscaler must first add nodes."""

    ready_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for a started process to load its model and report ready, in seconds."""

    call_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one call to a worker or a learner, in seconds; what expires is named with its actor and phase."""

    pulse_timeout_s: float = Field(default=60.0, gt=0)
    """Longest silence of a process, in seconds. Each gives ten signs of life in that time, whatever it computes; one that gives none is replaced."""

    peer_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait of a learner rank for its peers in one collective operation, and for a rank's answer once another has answered, in seconds."""

    max_attempts: int = Field(default=3, ge=1)
    """Times one piece of work is given to a pool before the run stops with the last error."""

    max_replacements: int = Field(default=8, ge=0)
    """Workers one pool may lose and replace in a run before it stops as unhealthy."""

    max_rebuilds: int = Field(default=3, ge=0)
    """Times the learners are rebuilt in a row, without a commit in between, before the run stops with the last error."""
