"""The metrics of a step: the reports of its phases as one flat record.

Every number of the record appears in `metrics.jsonl`, TensorBoard and `replay`. The driver's log shows only the metrics
listed in `pipeline/observe/metrics.py: _LOGGED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from actors.learner.learner import UpdateReport
from actors.manager.reports import ManagerReport
from cluster.pool import Pool
from pipeline.loop.phases import Update
from pipeline.observe.metrics import StepMetrics
from pipeline.samples.collector import CollectionCounts
from pipeline.samples.ledger import Account

_OF_MANAGER = (
    *("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "grad_norm"),
    *("ratio_deviation", "advantage_std", "explained_variance", "skipped"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What was counted and timed in a step.

    account: the totals of the ledger. collected: what the pools did. seconds: phase -> seconds. incidents: as
    `Incidents` counts them.
    """

    account: Account
    collected: CollectionCounts
    seconds: Mapping[str, float]
    incidents: Mapping[str, float]


def step_metrics(update: Update, counts: StepCounts, *, version: int, kl_coef: float) -> StepMetrics:
    """Gather the reports of a step's phases into one record.

    version: of the weights after the update. kl_coef: of the KL penalty in this step. KL and entropy are in nats, times
    in seconds.
    """
    summary, policy, collected = update.summary, update.policy, counts.collected
    total = sum(counts.seconds.values())
    values = {
        "reward/mean": summary.reward_mean,
        "reward/std": summary.reward_std,
        "reward/shaped_mean": summary.shaped_mean,
        "reward/flat_groups": summary.flat_groups,
        "kl/per_rollout": summary.kl_per_rollout,
        "kl/per_token": summary.kl_per_token,
        "kl/bounded_fraction": summary.kl_bounded,
        "kl/coef": kl_coef,
        "advantage/std": summary.advantage_std,
        "return/mean": summary.return_mean,
        "value/mean": summary.value_mean,
        "value/explained_variance": summary.explained_variance,
        "rollout/response_tokens": summary.response_tokens,
        "rollout/stopped": summary.stopped,
        "rollout/token_distinct_2": summary.token_distinct_2,
        "rollout/tokens_per_second": collected.action_tokens / max(collected.generate_s, 1e-9),
        "policy/ratio_deviation": policy.ratio_deviation,
        "policy/logprob_gap_mean": policy.logprob_gap,
        "policy/logprob_gap_max": policy.logprob_gap_max,
        "staleness/versions": version - 1 - summary.version_mean,
        "staleness/versions_max": float(version - 1 - summary.version_min),
        **{f"staleness/{name}": value for name, value in asdict(policy.staleness).items()},
        "time/step": total,
        "time/tokens_per_second": summary.action_tokens / max(total, 1e-9),
        **learner_values("policy", policy),
        **(learner_values("critic", update.critic) if update.critic else {}),
        **(manager_values(update.manager) if update.manager else {}),
        **{f"conversation/{name}": value for name, value in summary.conversation.items()},
        **{f"option/{name}": value for name, value in summary.option.items()},
        **{f"time/{phase}": value for phase, value in counts.seconds.items()},
        **{f"ledger/{name}": float(value) for name, value in asdict(counts.account).items()},
        **{f"incident/{name}": value for name, value in counts.incidents.items()},
    }
    return StepMetrics(step=update.batch.step, version=version, values=values)


def learner_values(role: str, report: UpdateReport) -> dict[str, float]:
    """The numbers of a learner's report, under their names in the metrics."""
    return {
        f"{role}/loss": report.loss,
        f"{role}/grad_norm": report.grad_norm,
        f"{role}/grad_norm_max": report.grad_norm_max,
        f"{role}/learning_rate": report.learning_rate,
        f"{role}/skipped_updates": float(report.skipped),
        **{f"{role}/{name}": value for name, value in report.statistics.items()},
    }


def manager_values(report: ManagerReport) -> dict[str, float]:
    """The numbers of the manager's report, and of its discriminator's, under their names in the metrics; in nats."""
    values = {f"manager/{name}": float(getattr(report, name)) for name in _OF_MANAGER}
    if (heard := report.discriminator) is not None:
        values |= {
            "manager/discriminator_loss": heard.loss,
            "manager/discriminator_accuracy": heard.accuracy,
            "manager/diversity_reward": heard.reward,
        }
    return values


class Incidents:
    """Counts of the failures that the run recovered from, and the bytes that it committed."""

    def __init__(self, pools: Sequence[Pool], say: Callable[[str, str], None]) -> None:
        """say(kind, text): tells the user, once for each kind."""
        self.pools = pools
        self.say = say
        self.committed_bytes = 0  # since the last step's metrics
        self.rolled_back = 0  # recoveries since this process began

    def of_step(self, collected: CollectionCounts, unplaced: int) -> dict[str, float]:
        """The counts of a step, under their names in the metrics.

        Counted since the step before: committed bytes, split batches, searches. Counted since this process began:
        replaced workers, rollbacks. Counted now: absent workers, and those that wait for a node (`unplaced`).
        """
        replaced, absent = (sum(getattr(pool, count) for pool in self.pools) for count in ("replaced", "absent"))
        if replaced:
            self.say(
                "replaced",
                "a worker was lost and replaced, and its work done again (incident/replaced_workers; log/driver.log)",
            )
        if absent:
            self.say(
                "absent",
                "a worker does not get ready; the run goes on without it and tries again (incident/absent_workers; "
                "log/driver.log)",
            )
        if unplaced:
            self.say(
                "unplaced",
                "not every worker has a node; the run goes on with fewer (incident/unplaced_workers; log/driver.log)",
            )
        committed_bytes, self.committed_bytes = self.committed_bytes, 0
        return {
            "committed_bytes": committed_bytes,
            "batches_split": collected.batches_split,
            "searches": collected.searches,
            "replaced_workers": replaced,
            "absent_workers": absent,
            "unplaced_workers": unplaced,
            "rolled_back": self.rolled_back,
        }
