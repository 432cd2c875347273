"""The stage of reinforcement learning: start the actors, train from the given commit on, export the policy.

starting model + reward --Roles--> Driver.run --> policy/
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from actors.config import RewardConfig
from cluster.placement import place
from cluster.runtime import Runtime
from cluster.session import Session
from cluster.stopping import StopRequest
from pipeline.config.loop_config import LoopConfig
from pipeline.encoding.prompts import RunPrompts
from pipeline.environments.served import EnvironmentSource
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.commits import Commit
from pipeline.loop.driver import Driver
from pipeline.loop.wiring import declare_roles, demands
from pipeline.observe.observer import Observer, read_metrics
from pipeline.observe.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforceInputs:
    """What the training begins from, besides its settings.

    model: folder or hub name of the starting policy, which is also the reference. reward: what scores the samples.
    environment: the other side of conversations, if samples are conversations. commit: the state to go on from; None
    begins at step 0.
    """

    model: str
    reward: RewardConfig
    environment: EnvironmentSource | None
    prompts: RunPrompts
    commit: Commit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforceResult:
    """The folder of the exported policy, and numbers of the training.

    steps: number of all steps. reward: mean reward of the last step. kl: KL of the last step, in nats per rollout; None
    if it was not measured.
    """

    folder: Path
    steps: int
    reward: float
    kl: float | None


def reinforce(
    config: LoopConfig,
    session: Session,
    folder: RunFolder,
    progress: Progress,
    inputs: ReinforceInputs,
    stop: StopRequest | None = None,
) -> ReinforceResult:
    """Train the policy of the inputs on their reward; with a commit, go on from it.

    stop: the stop request of the whole run. Raises RunError for a failure that cannot be recovered from, and Stopped,
    with everything committed, when a signal asked for it.
    """
    progress.stage("start actors", 1)
    progress.phase("waiting for a place on the cluster")
    placed = session.place(place(config.cluster, demands(config)), progress.remark)
    runtime = Runtime.of(session, placed, config.cluster)
    roles = declare_roles(config, runtime, inputs.model, inputs.reward, inputs.environment)

    def say_who_is_missing() -> None:
        if progress.name == "start actors" and (missing := roles.starting()):
            progress.phase(missing)

    runtime.pump.add_tick(say_who_is_missing, every_s=0.5)
    try:
        with Observer(folder.path, progress) as observer:
            roles.start()
            progress.phase("loading the weights")
            driver = Driver(config, folder, roles, runtime, inputs.prompts.train, observer, stop)
            driver.begin(inputs.commit)
            progress.stage("reinforce", config.steps)
            progress.rewind(driver.state.step)
            driver.run(folder.path / "policy")
    finally:
        roles.close()
        placed.remove()
    last = read_metrics(folder.path)[-1]
    return ReinforceResult(
        folder=folder.path / "policy", steps=config.steps, reward=last["reward/mean"], kl=last.get("kl/per_rollout")
    )
