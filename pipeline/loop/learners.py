"""Calls to the learners: the gangs of policy and critic work in parallel, and waits go through the pump."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.config import settled
from actors.learner.learner import UpdatePlan, UpdateReport
from actors.manager.option_head import save_head
from cluster.faults import RunError
from cluster.gang import Gang, Ticket
from cluster.runtime import Runtime
from cluster.shared import check_seen
from cluster.storage import Folder, StoredFile
from pipeline.config.loop_config import LoopConfig
from pipeline.loop.commits import VERSIONS, Commit, shard_url
from pipeline.loop.wiring import Roles
from pipeline.samples.published import PublishedWeights

if TYPE_CHECKING:
    from ray import ObjectRef

    from actors.manager.reports import ManagerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReports:
    """What the learners report of an update; None for one that does not exist."""

    policy: UpdateReport
    critic: UpdateReport | None = None
    manager: ManagerReport | None = None

    @property
    def by_role(self) -> dict[str, Any]:
        """Role -> report."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


_SAME_MODEL = "Put the model folder back as it was when the run began."


class Learners:
    """The learners, which are the gangs of policy and critic.

    Every method except `infer` returns when all ranks are done, or raises RunError, which names the rank at fault.
    """

    def __init__(self, config: LoopConfig, roles: Roles, runtime: Runtime) -> None:
        self.config = config
        self.roles = roles
        self.runtime = runtime
        self.has_moved = False  # whether the weights of a gang may differ from its starting model

    def connect(self, anew: Collection[str] = ()) -> None:
        """Connect the ranks of every gang that is not connected yet; they load the starting model.

        anew: roles whose gangs are killed and started again first. Ranks start and load in parallel. Raises RunError,
        which names the rank at fault; then `connect` may be called again, with the gang of that rank in `anew`.
        """
        for role in anew:
            self.roles.gangs[role].restart()
        self.has_moved = self.has_moved and set(anew) != self.roles.gangs.keys()
        for role, gang in self.roles.gangs.items():
            if not gang.is_connected:
                self._check_model(role, gang.connect()[0].checksum)

    def infer(self, rollouts: Iterable[ObjectRef]) -> dict[str, Ticket]:
        """Begin the critic's values and the policy's log-probs, as far as they are needed; returns role -> ticket."""
        phases = {"critic": "values"} | (
            {"policy": "proximal log-probs"} if self.config.algorithm.needs_proximal else {}
        )
        asked = {role: gang for role, gang in self.roles.gangs.items() if role in phases}
        return {
            role: gang.begin(phases[role], lambda rank, _: rank.infer.options(num_returns=2).remote(*rollouts))
            for role, gang in asked.items()
        }

    def inferred(self, tickets: Mapping[str, Ticket], role: str) -> tuple[ObjectRef, ...]:
        """Wait for a role's call that `infer` began; returns one table per rank, or () if the role was not called."""
        if role not in tickets:
            return ()
        ticket = tickets[role]
        self.runtime.finish(ticket, f"the {role}'s view of the step")
        return tuple(ticket.refs(rank)[0] for rank in range(self.roles.gangs[role].ranks))

    def advise(self, turns: ObjectRef) -> ObjectRef:
        """The manager's advantage of each turn, before it learns from them; a reference of a table `TurnAdvantages`."""
        assert self.roles.manager is not None
        ticket = self.roles.manager.begin(
            "advantages of turns", lambda rank, _: rank.advantages.options(num_returns=2).remote(turns)
        )
        self.runtime.finish(ticket, "the manager's view of the step")
        return ticket.refs(0)[0]

    def update(
        self, experience: ObjectRef, step: int, kl_coef: float, turns: ObjectRef | None = None
    ) -> LearnerReports:
        """Train all gangs on a step's experience, in parallel; returns what rank 0 of each reports.

        kl_coef: the coefficient of the KL penalty in this step. turns: what the manager learns from, if there is one.
        """
        batch, algorithm = self.config.batch, self.config.algorithm
        self.has_moved = True
        plan = UpdatePlan(
            step=step,
            epochs=batch.epochs,
            minibatches=batch.minibatches,
            seed=self.config.seed,
            aggregation=algorithm.aggregation,
            constant=self.config.most_action_tokens,
            kl_coef=kl_coef,
            entropy_gradient=algorithm.entropy_coef > 0,
            total=self.config.updates,
        )

        def begin(gang: Gang, role: str) -> Ticket:
            given = (turns,) if role == "manager" else (experience, plan)
            return gang.begin("update", lambda rank, _: rank.update.remote(*given))

        reports = self._all("update", begin)
        critic, manager = (reports[role][0] if role in reports else None for role in ("critic", "manager"))
        return LearnerReports(policy=reports["policy"][0], critic=critic, manager=manager)

    def publish(self, version: int) -> PublishedWeights:
        """Publish the policy's weights in the dtype of the rollouts; workers pull them when they need them.

        The manager's head is small, and goes with them.
        """
        dtype, timeout_s = settled(self.config.rollout.dtype), self.config.cluster.call_timeout_s
        ticket = self.roles.policy.begin(
            "publish", lambda rank, _: rank.publish.options(num_returns=2).remote(version, dtype), uneven=True
        )
        manifest = self.runtime.finish(ticket, f"weights of version {version}")
        manager = self.roles.manager
        head = manager.call("publish", lambda rank, _: rank.weights.remote())[0] if manager is not None else None
        return PublishedWeights(
            version=version, checksum=manifest.checksum, holder=(ticket.refs(0)[0],), timeout_s=timeout_s, manager=head
        )

    def save(self, where: Callable[[str], str], older: Iterable[PublishedWeights]) -> dict[str, tuple[StoredFile, ...]]:
        """Let every rank write its shard to the URL where(role); returns role -> files of its ranks.

        older: versions that samples in flight need besides the present one; the policy's rank 0 writes them, under
        VERSIONS.
        """
        reports = self._all(
            "commit",
            lambda gang, role: gang.begin("commit", lambda rank, _: rank.save.remote(where(role)), uneven=True),
        )
        files = {role: tuple(report.file for report in of_ranks) for role, of_ranks in reports.items()}
        kept = [self._keep_version(where(VERSIONS), one) for one in older]
        return files | ({VERSIONS: tuple(kept)} if kept else {})

    def _keep_version(self, url: str, published: PublishedWeights) -> StoredFile:
        files = self.roles.policy.call(
            f"commit of version {published.version}",
            lambda rank, _: rank.keep_version.remote(url, published),
            uneven=True,
        )
        file: StoredFile = files[0]
        return file

    def older(self, commit: Commit, folder: Folder) -> tuple[PublishedWeights, ...]:
        """The older versions in a commit, published again by the policy's rank 0."""
        url, timeout_s = shard_url(folder, commit.name, VERSIONS), self.config.cluster.call_timeout_s
        found = []
        for version, file in zip(sorted(commit.state.older), commit.shards.get(VERSIONS, ()), strict=True):
            ticket = self.roles.policy.begin(
                "restore",
                lambda rank, _, name=file.name, number=version: rank.read_version.options(num_returns=2).remote(  # type: ignore[misc]
                    url, name, number
                ),
                uneven=True,
            )
            report = self.runtime.finish(ticket, f"weights of version {version}")
            found.append(
                PublishedWeights(
                    version=version,
                    checksum=report.checksum,
                    holder=(ticket.refs(0)[0],),
                    timeout_s=timeout_s,
                    manager=report.manager,
                )
            )
        return tuple(found)

    def restore(self, commit: Commit, folder: Folder) -> None:
        """Let every rank read its share of a commit in `folder`, also when other ranks wrote the shards.

        Raises RunError when a starting model is not the one that the commit belongs to.
        """
        for role, checksum in self.roles.models.items():
            if commit.state.models.get(role, checksum) != checksum:
                cause = f"the model it starts from is not the one that commit {commit.name} belongs to"
                raise RunError(f"{role}[0]", "restore", cause, _SAME_MODEL)

        def begin(gang: Gang, role: str) -> Ticket:
            url, names = shard_url(folder, commit.name, role), [file.name for file in commit.shards[role]]
            return gang.begin("restore", lambda rank, _: rank.restore.remote(url, names), uneven=True)

        self.has_moved = True
        self._all("restore", begin)

    def export(self, folder: Path) -> None:
        """Export the policy in Hugging Face format; the export is read again and compared with the policy.

        The manager's head is written beside it.

        Raises RunError when the driver does not see the files that rank 0 wrote.
        """
        self.roles.policy.call("export", lambda rank, _: rank.export.remote(str(folder), True), uneven=True)
        files = self.roles.policy.call("export", lambda rank, _: rank.written.remote(str(folder)), uneven=True)[0]
        check_seen("policy[0]", "export", Folder(folder), files)
        if self.roles.manager is not None:
            save_head(folder, self.roles.manager.call("export", lambda rank, _: rank.weights.remote())[0])

    def _check_model(self, role: str, checksum: str) -> None:
        """Raises RunError when the starting model of a gang has changed since the gang was first started."""
        if self.roles.models.setdefault(role, checksum) != checksum:
            raise RunError(
                f"{role}[0]", "start", "the model it starts from has changed since the run was started", _SAME_MODEL
            )

    def _all(self, phase: str, begin: Callable[[Gang, str], Ticket]) -> dict[str, list]:  # type: ignore[type-arg]
        """Make the same call to all gangs in parallel; returns role -> reports of its ranks."""
        tickets = {role: begin(gang, role) for role, gang in self.roles.gangs.items()}
        self.runtime.wait(lambda: all(ticket.done for ticket in tickets.values()), f"the learners' {phase}")
        try:
            return {role: ticket.results() for role, ticket in tickets.items()}
        except RunError:
            for ticket in tickets.values():  # the other results are not needed any more
                ticket.forget()
            raise
