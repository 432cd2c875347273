"""Wiring: which plain classes become which pools and gangs, from the configuration. The only file that names them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.config import RewardConfig
from cluster.events import Pump
from cluster.faults import RunError, classify, last_lines
from cluster.gang import Gang, Ticket
from cluster.handshake import Fingerprint
from cluster.placement import Placement, RoleDemand, plan_placement, usable_cores
from cluster.pool import Pool, Work
from cluster.spawn import Placed
from pipeline.config import RunConfig

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The processes of a run. `reference` and `critic` exist only where the algorithm needs them."""

    rollout: Pool
    reward: Pool
    reference: Pool | None
    critic: Gang | None
    policy: Gang
    assembler: Pool
    models: dict[str, str] = field(default_factory=dict)
    """Of each gang, the checksum of the model it was started with."""

    @property
    def gangs(self) -> dict[str, Gang]:
        """The learners, by role."""
        return {gang.role: gang for gang in (self.policy, self.critic) if gang is not None}

    @property
    def pools(self) -> list[Pool]:
        return [pool for pool in (self.rollout, self.reward, self.reference, self.assembler) if pool is not None]

    def start(self) -> None:
        """Start every process side by side and wait until all are ready."""
        for pool in self.pools:
            pool.start()
        self.start_gangs()
        for pool in self.pools:
            pool.wait_ready()

    def start_gangs(self) -> None:
        """The learners alone, side by side."""
        for gang in self.gangs.values():
            gang.start()
        for name, gang in self.gangs.items():
            self.models[name] = gang.connect()[0].checksum

    def close(self) -> None:
        for gang in self.gangs.values():
            gang.close()
        for pool in self.pools:
            pool.close()


def demands(config: RunConfig) -> list[RoleDemand]:
    """What each role of reinforcement learning asks of the cluster."""
    asked = [
        RoleDemand(role="policy", workers=config.policy.ranks, gpus=config.policy.gpus, turn="learn"),
        RoleDemand(role="rollout", workers=config.rollout.workers, gpus=config.rollout.gpus),
        RoleDemand(role="reward", workers=config.reward.workers, gpus=config.reward.gpus),
    ]
    if config.algorithm.needs_reference:
        asked.append(RoleDemand(role="reference", workers=config.reference.workers, gpus=config.reference.gpus))
    if config.algorithm.needs_critic:
        asked.append(RoleDemand(role="critic", workers=config.critic.ranks, gpus=config.critic.gpus, turn="learn"))
    return asked


def place(config: RunConfig, asked: list[RoleDemand]) -> Placement:
    """Roles to bundles; needs `cluster.cpus_per_bundle` resolved or the local core count."""
    return plan_placement(asked, share_devices=config.cluster.share_devices, cpus_per_bundle=config.cluster.cpus_per_bundle, local_cpus=usable_cores())


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where actors of a stage are started: the bundles, the event pump, and what every worker must match."""

    placed: Placed
    pump: Pump
    fingerprint: Fingerprint
    timeout_s: float

    def map(self, pool: Pool, phase: str, sends: Sequence[Callable[[Any, int], tuple[ObjectRef, ...]]]) -> list[tuple[Any, tuple[ObjectRef, ...]]]:
        """Give each call to whichever worker of the pool is free; (report, data) of each, in the order given."""
        found: dict[int, tuple[Any, tuple[ObjectRef, ...]]] = {}
        for number, send in enumerate(sends):

            def done(report: Any, data: tuple[ObjectRef, ...], attempt: int, number: int = number) -> None:
                found[number] = (report, data)

            pool.submit(Work(phase=f"{phase} {number}", send=send, on_done=done, timeout_s=self.timeout_s))
        self.pump.run_until(lambda: len(found) == len(sends), timeout_s=2 * self.timeout_s, waiting_for=phase)
        return [found[number] for number in range(len(sends))]

    def fetch(self, refs: Sequence[ObjectRef], phase: str) -> list[Any]:
        """The objects themselves: for what is small and has to be shown, such as held-out replies; never for experience."""
        import ray

        try:
            values: list[Any] = ray.get(list(refs), timeout=self.timeout_s)
        except ray.exceptions.RayError as error:
            raise RunError("driver", phase, f"its results cannot be fetched: {last_lines(error)}", fault=classify(error)) from error
        return values

    def finish(self, ticket: Ticket, waiting_for: str) -> Any:
        """Serve events until the call is done; its first report."""
        self.pump.run_until(lambda: ticket.done, timeout_s=2 * self.timeout_s, waiting_for=waiting_for)
        return ticket.results()[0]

    def pool(self, role: str, size: int, config: RunConfig, cls: type, /, **arguments: Any) -> Pool:
        return Pool(role, lambda index: self.placed.spawn(cls, role, index, **arguments), size, self.pump, config.cluster, self.fingerprint)

    def beside(self, role: str, config: RunConfig, cls: type) -> Pool:
        """A pool of one on the driver's own node, outside the placement."""
        return Pool(role, lambda index: self.placed.spawn_beside(cls, role, index), 1, self.pump, config.cluster, self.fingerprint)

    def gang(self, role: str, ranks: int, config: RunConfig, cls: type, /, **arguments: Any) -> Gang:
        def spawn(rank: int) -> Any:
            return self.placed.spawn(cls, role, rank, rank=rank, ranks=ranks, timeout_s=config.cluster.peer_timeout_s, **arguments)

        return Gang(role, spawn, ranks, self.pump, config.cluster, self.fingerprint)


def declare_roles(config: RunConfig, stage: Stage, model: str, reward: RewardConfig) -> Roles:
    """Every pool and gang of reinforcement learning, not yet started.

    model: folder or name of the policy to begin from; it is the reference and, unless critic.start says otherwise, the critic's trunk, too.
    reward: what scores, by function or model.
    """
    from actors.learner import Learner
    from actors.reference import ReferenceWorker
    from actors.reward import RewardWorker
    from actors.rollout import RolloutWorker
    from pipeline.assemble import Assembler

    algorithm, temperature = config.algorithm, config.sampling.temperature
    updates = config.steps * config.batch.epochs * config.batch.minibatches
    learner = {"path": model, "temperature": temperature, "objective": algorithm, "total_updates": updates, "seed": config.seed}
    critic = learner | ({"path": reward.model} if config.critic.start == "reward" else {})
    return Roles(
        policy=stage.gang("policy", config.policy.ranks, config, Learner, role="policy", config=config.policy, **learner),
        critic=stage.gang("critic", config.critic.ranks, config, Learner, role="critic", config=config.critic, **critic) if algorithm.needs_critic else None,
        rollout=stage.pool(
            "rollout",
            config.rollout.workers,
            config,
            RolloutWorker,
            path=model,
            config=config.rollout,
            sampling=config.sampling,
            seed=config.seed,
            untie_head=config.policy.trainable == "heads",
        ),
        reward=stage.pool("reward", config.reward.workers, config, RewardWorker, config=reward, tokenizer_path=model),
        reference=stage.pool("reference", config.reference.workers, config, ReferenceWorker, path=model, config=config.reference, temperature=temperature)
        if algorithm.needs_reference
        else None,
        assembler=stage.beside("assembler", config, Assembler),
    )
