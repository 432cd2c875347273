"""Reinforcement learning as a stage: start the actors, let the driver train from the newest commit on, export the policy.

starting model + reward --Roles--> Driver.run --> policy/
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from actors.config import RewardConfig
from cluster.events import Pump
from cluster.session import Session
from pipeline.checkpoint import Commit
from pipeline.config import RunConfig
from pipeline.driver import Driver
from pipeline.observe.observer import Observer, read_metrics
from pipeline.observe.progress import Progress
from pipeline.prompts import Asked
from pipeline.roles import Stage, declare_roles, demands, place
from pipeline.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforced:
    """Where the policy is, and its last step's mean reward and KL (nats a rollout; None without a reference)."""

    folder: Path
    steps: int
    reward: float
    kl: float | None


def reinforce(
    config: RunConfig, session: Session, folder: RunFolder, progress: Progress, *, model: str, reward: RewardConfig, prompts: Asked, commit: Commit | None
) -> Reinforced:
    """Train `model` to earn `reward`, from `commit` on where there is one.

    model: folder or hub name of the policy to begin from, which is the reference, too. Raises RunError for what fails, and Stopped when a
    signal asked for it, everything committed.
    """
    progress.stage("start actors", 1)
    placed = session.place(place(config, demands(config)))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
    roles = declare_roles(config, stage, model, reward)
    try:
        with Observer(folder.path, progress) as observer:
            roles.start()
            driver = Driver(config, folder, roles, stage, prompts.train, observer)
            progress.stage("reinforce", config.steps)
            driver.restore(commit)
            driver.run(folder.path / "policy")
    finally:
        roles.close()
        placed.remove()
    last = read_metrics(folder.path)[-1]
    return Reinforced(folder=folder.path / "policy", steps=config.steps, reward=last["reward/mean"], kl=last.get("kl/per_rollout"))
