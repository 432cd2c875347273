"""Wiring: makes the pools and gangs of reinforcement learning from plain classes and the configuration.

It is the only file that names all of these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.config import RewardConfig
from cluster.gang import Gang
from cluster.placement import RoleDemand
from cluster.pool import Pool
from cluster.runtime import Runtime
from pipeline.config.loop_config import LoopConfig
from pipeline.environments.served import EnvironmentSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The processes of reinforcement learning.

    `reference` and `critic` exist only if the algorithm needs them, `manager` only where there are options.
    """

    rollout: Pool
    reward: Pool
    reference: Pool | None
    critic: Gang | None
    policy: Gang
    assembler: Pool
    manager: Gang | None = None
    models: dict[str, str] = field(default_factory=dict)
    """Role of a gang -> checksum of its starting model."""

    @property
    def gangs(self) -> dict[str, Gang]:
        """Role -> gang, for each learner."""
        return {gang.role: gang for gang in (self.policy, self.critic, self.manager) if gang is not None}

    @property
    def pools(self) -> list[Pool]:
        return [pool for pool in (self.rollout, self.reward, self.reference, self.assembler) if pool is not None]

    def starting(self) -> str:
        """A line that names the roles whose processes are not ready yet; "" if all are ready."""
        gangs = [name for name, gang in self.gangs.items() if not gang.is_connected]
        pools = [
            f"{pool.role} ({len(pool.workers)} ready)" if pool.workers else pool.role
            for pool in self.pools
            if not pool.is_ready
        ]
        return f"waiting for {', '.join((*gangs, *pools))}" if gangs or pools else ""

    def start(self) -> None:
        """Start every process, in parallel; returns at once."""
        for pool in self.pools:
            pool.start()
        for gang in self.gangs.values():
            gang.start()

    def close(self) -> None:
        for gang in self.gangs.values():
            gang.close()
        for pool in self.pools:
            pool.close()


def demands(config: LoopConfig) -> list[RoleDemand]:
    """The workers and GPUs that each role of reinforcement learning needs."""
    asked = [
        RoleDemand(role="policy", workers=config.policy.ranks, gpus=config.policy.gpus, turn="learn"),
        RoleDemand(
            role="rollout", workers=config.rollout.workers, gpus=config.rollout.gpus, fewest=config.rollout.min_workers
        ),
        RoleDemand(
            role="reward", workers=config.reward.workers, gpus=config.reward.gpus, fewest=config.reward.min_workers
        ),
    ]
    if config.algorithm.needs_reference:
        asked.append(
            RoleDemand(
                role="reference",
                workers=config.reference.workers,
                gpus=config.reference.gpus,
                fewest=config.reference.min_workers,
            )
        )
    if config.algorithm.needs_critic:
        asked.append(RoleDemand(role="critic", workers=config.critic.ranks, gpus=config.critic.gpus, turn="learn"))
    if config.manager.options:
        asked.append(RoleDemand(role="manager", workers=1, gpus=0, turn="learn"))
    return asked


def check_critic(config: LoopConfig, model: str) -> None:
    """Raises ValueError when the critic begins from a reward model whose vocabulary differs from the policy's.

    model: the policy's starting model. A reward model that the run trains begins from `model`, so it needs no check.
    """
    from actors.models.causal_lm import check_same_words

    if config.critic.start == "reward" and config.algorithm.needs_critic and config.reward.model:
        check_same_words(model, config.reward.model, "critic.start")


def declare_roles(
    config: LoopConfig,
    runtime: Runtime,
    model: str,
    reward: RewardConfig,
    environment: EnvironmentSource | None = None,
) -> Roles:
    """Declare every pool and gang of reinforcement learning, without starting any.

    model: folder or hub name of the starting policy. It is also the reference and, unless `critic.start` is "reward",
    the starting model of the critic. reward: the reward function or reward model that scores the samples. environment:
    the other side of conversations, if samples are conversations.
    """
    from pipeline.assembly.assembler import Assembler

    needs = config.algorithm
    return Roles(
        policy=_policy(config, runtime, model),
        critic=_critic(config, runtime, reward.model if config.critic.start == "reward" else model)
        if needs.needs_critic
        else None,
        rollout=_rollout(config, runtime, model, environment),
        reward=_reward(config, runtime, model, reward),
        reference=_reference(config, runtime, model) if needs.needs_reference else None,
        assembler=runtime.beside("assembler", Assembler),
        manager=_manager(config, runtime, model) if config.manager.options else None,
    )


def _policy(config: LoopConfig, runtime: Runtime, model: str) -> Gang:
    from actors.learner.learner import Learner, LearnerSpec
    from actors.learner.trainees.policy import PolicyTrainee

    algorithm = config.algorithm
    spec = LearnerSpec(
        trainee=PolicyTrainee(
            objective=algorithm, temperature=config.sampling.temperature, columns=tuple(algorithm.columns)
        ),
        path=model,
        config=config.policy,
        total_updates=config.updates,
        seed=config.seed,
    )
    return runtime.gang("policy", config.policy.ranks, Learner, spec=spec)


def _critic(config: LoopConfig, runtime: Runtime, model: str) -> Gang:
    from actors.learner.learner import Learner, LearnerSpec
    from actors.learner.trainees.critic import CriticTrainee

    algorithm = config.algorithm
    spec = LearnerSpec(
        trainee=CriticTrainee(objective=algorithm, columns=tuple(algorithm.columns)),
        path=model,
        config=config.critic,
        total_updates=config.updates,
        seed=config.seed,
    )
    return runtime.gang("critic", config.critic.ranks, Learner, spec=spec)


def _manager(config: LoopConfig, runtime: Runtime, model: str) -> Gang:
    from actors.manager.manager import Manager
    from actors.manager.reports import ManagerSpec
    from actors.models.causal_lm import width_of

    start = model if config.manager.start == "demonstrations" else ""
    spec = ManagerSpec(width=width_of(model), config=config.manager, seed=config.seed, start=start)
    return runtime.gang("manager", 1, Manager, spec=spec)


def _rollout(config: LoopConfig, runtime: Runtime, model: str, environment: EnvironmentSource | None) -> Pool:
    from actors.rollout.worker import RolloutWorker

    return runtime.pool(
        "rollout",
        config.rollout.workers,
        RolloutWorker,
        reads=[model, config.environment.partner],
        path=model,
        config=config.rollout,
        sampling=config.sampling,
        seed=config.seed,
        untie_head=config.policy.trainable == "heads",
        talk=config.environment,
        environment=environment,
        manager=config.manager,
    )


def _reward(config: LoopConfig, runtime: Runtime, model: str, reward: RewardConfig) -> Pool:
    from actors.reward.worker import RewardWorker

    return runtime.pool(
        "reward",
        config.reward.workers,
        RewardWorker,
        reads=[model, reward.model],
        config=reward,
        tokenizer_path=model,
        conversations=bool(config.environment.name),
    )


def _reference(config: LoopConfig, runtime: Runtime, model: str) -> Pool:
    from actors.reference import ReferenceWorker

    return runtime.pool(
        "reference",
        config.reference.workers,
        ReferenceWorker,
        reads=[model],
        path=model,
        config=config.reference,
        temperature=config.sampling.temperature,
    )
