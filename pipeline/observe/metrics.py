"""A step in numbers: one flat record, written to `metrics.jsonl` and TensorBoard alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.learner import UpdateReport
    from pipeline.assemble import AssemblyReport
    from pipeline.collector import Collected
    from pipeline.ledger import Account


def is_repeatable(name: str) -> bool:
    """Whether a metric is a function of the recipe alone; the others measure time, or what the run went through."""
    return not name.startswith(("time/", "incident/")) and name != "rollout/tokens_per_second"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one step did. `values` are grouped by a slash: reward/mean, kl/coef, policy/loss, time/learn, ledger/trained ..."""

    step: int
    version: int
    values: dict[str, float]

    @classmethod
    def of(
        cls,
        *,
        step: int,
        version: int,
        kl_coef: float,
        summary: AssemblyReport,
        policy: UpdateReport,
        critic: UpdateReport | None,
        account: Account,
        collected: Collected,
        seconds: Mapping[str, float],
        incidents: Mapping[str, float],
    ) -> StepMetrics:
        """Gather the reports of a step. KL and entropy in nats, times in seconds; incidents: what the run went through, which no recipe says."""
        total = sum(seconds.values())
        values = {
            "reward/mean": summary.reward_mean,
            "reward/std": summary.reward_std,
            "reward/shaped_mean": summary.shaped_mean,
            "kl/per_rollout": summary.kl_per_rollout,
            "kl/per_token": summary.kl_per_token,
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
            "time/step": total,
            "time/tokens_per_second": summary.action_tokens / max(total, 1e-9),
            **learner_values("policy", policy),
            **(learner_values("critic", critic) if critic else {}),
            **{f"time/{phase}": value for phase, value in seconds.items()},
            **{f"ledger/{name}": float(value) for name, value in asdict(account).items()},
            **{f"incident/{name}": value for name, value in incidents.items()},
        }
        return cls(step=step, version=version, values=values)

    def record(self) -> dict[str, float | None]:
        """One line of metrics.jsonl. JSON knows neither nan nor infinity: what is not a number is null."""
        return {"step": self.step, "version": self.version, **{name: value if math.isfinite(value) else None for name, value in self.values.items()}}


def learner_values(role: str, report: UpdateReport) -> dict[str, float]:
    """The part of a step that a learner's report is, by the names it has in the metrics."""
    return {
        f"{role}/loss": report.loss,
        f"{role}/grad_norm": report.grad_norm,
        f"{role}/grad_norm_max": report.grad_norm_max,
        f"{role}/learning_rate": report.learning_rate,
        f"{role}/skipped_updates": float(report.skipped),
        **{f"{role}/{name}": value for name, value in report.statistics.items()},
    }
