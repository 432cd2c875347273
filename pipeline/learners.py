"""The policy's and the critic's gangs, as the driver speaks to them: both at once, waiting through the pump, failing by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from actors.learner import UpdatePlan, UpdateReport
from cluster.faults import RunError
from cluster.gang import Gang, Ticket
from cluster.storage import Folder, StoredFile
from pipeline.checkpoint import Commit, shard_url
from pipeline.config import RunConfig
from pipeline.published import PublishedWeights
from pipeline.roles import Roles, Stage

if TYPE_CHECKING:
    from ray import ObjectRef


class Learners:
    """What the driver asks of the gangs. Every method but `infer` returns when all ranks are through, or raises RunError naming the rank to blame."""

    def __init__(self, config: RunConfig, roles: Roles, stage: Stage) -> None:
        self.config = config
        self.roles = roles
        self.stage = stage

    def infer(self, rollouts: Iterable[ObjectRef]) -> dict[str, Ticket]:
        """Begin the critic's values and the policy's own log-probs, each only if the algorithm needs it; role -> ticket."""
        phases = {"critic": "values"} | ({"policy": "proximal log-probs"} if self.config.algorithm.needs_proximal else {})
        asked = {role: gang for role, gang in self.roles.gangs.items() if role in phases}
        return {role: gang.begin(phases[role], lambda rank, _: rank.infer.options(num_returns=2).remote(*rollouts)) for role, gang in asked.items()}

    def inferred(self, tickets: Mapping[str, Ticket], role: str) -> tuple[ObjectRef, ...]:
        """Waits for what `infer` began: a table a rank; none where the role was not asked."""
        if role not in tickets:
            return ()
        ticket = tickets[role]
        self.stage.finish(ticket, f"the {role}'s view of the step")
        return tuple(ticket.refs(rank)[0] for rank in range(self.roles.gangs[role].ranks))

    def update(self, experience: ObjectRef, step: int, kl_coef: float) -> tuple[UpdateReport, UpdateReport | None]:
        """Train both on a step's experience, side by side. kl_coef: as it is in this step. The policy's report and the critic's."""
        batch, algorithm = self.config.batch, self.config.algorithm
        plan = UpdatePlan(
            step=step,
            epochs=batch.epochs,
            minibatches=batch.minibatches,
            seed=self.config.seed,
            aggregation=algorithm.aggregation,
            constant=self.config.sampling.max_new_tokens,
            kl_coef=kl_coef,
            entropy_gradient=algorithm.entropy_coef > 0,
        )
        reports = self._all("update", lambda gang, _: gang.begin("update", lambda rank, __: rank.update.remote(experience, plan)))
        return reports["policy"][0], reports["critic"][0] if "critic" in reports else None

    def publish(self, version: int) -> PublishedWeights:
        """The policy's weights, in the dtype of the rollouts, to be pulled by whoever needs them."""
        dtype, timeout_s = self.config.rollout.dtype, self.config.cluster.call_timeout_s
        ticket = self.roles.policy.begin("publish", lambda rank, _: rank.publish.options(num_returns=2).remote(version, dtype))
        manifest = self.stage.finish(ticket, f"weights of version {version}")
        return PublishedWeights(version=version, checksum=manifest.checksum, holder=(ticket.refs(0)[0],), timeout_s=timeout_s)

    def save(self, where: Callable[[str], str]) -> dict[str, tuple[StoredFile, ...]]:
        """Every rank writes its shard into where(role); role -> files."""
        reports = self._all("commit", lambda gang, role: gang.begin("commit", lambda rank, _: rank.save.remote(where(role))))
        return {role: tuple(report.file for report in of_ranks) for role, of_ranks in reports.items()}

    def restore(self, commit: Commit, folder: Folder) -> None:
        """Every rank reads its share of a commit in `folder`, whatever ranks wrote it. Raises RunError when the model it began with is another one by now."""
        for role, checksum in self.roles.models.items():
            if commit.state.models.get(role, checksum) != checksum:
                cause = f"the model it starts from is not the one that commit {commit.name} belongs to"
                raise RunError(f"{role}[0]", "restore", cause, "Put the model folder back as it was when the run began.")

        def begin(gang: Gang, role: str) -> Ticket:
            url, names = shard_url(folder, commit.name, role), [file.name for file in commit.shards[role]]
            return gang.begin("restore", lambda rank, _: rank.restore.remote(url, names))

        self._all("restore", begin)

    def rebuild(self, roles: Iterable[str]) -> None:
        """Start these gangs anew, at the model they began with."""
        for role in roles:
            self.roles.gangs[role].rebuild()

    def export(self, folder: Path) -> None:
        """The policy in Hugging Face format. Raises RunError when it is not to be found here afterwards."""
        self.roles.policy.call("export", lambda rank, _: rank.export.remote(str(folder)))
        if not (folder / "config.json").is_file():
            cause = f"it wrote {folder} on its own node, and the driver cannot see it"
            raise RunError("policy[0]", "export", cause, "Put --run-dir on a shared filesystem.")

    def _all(self, phase: str, begin: Callable[[Gang, str], Ticket]) -> dict[str, list]:  # type: ignore[type-arg]
        """The same call to all gangs at the same time; role -> its ranks' reports."""
        tickets = {role: begin(gang, role) for role, gang in self.roles.gangs.items()}
        timeout_s = 2 * self.config.cluster.call_timeout_s
        self.stage.pump.run_until(lambda: all(ticket.done for ticket in tickets.values()), timeout_s=timeout_s, waiting_for=f"the learners' {phase}")
        try:
            return {role: ticket.results() for role, ticket in tickets.items()}
        except RunError:
            for ticket in tickets.values():  # nobody will ask for the rest
                ticket.forget()
            raise
