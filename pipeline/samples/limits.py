"""The limits of a run's samples: how many may fail, and how many groups may be issued to fill a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cluster.faults import RunError
from pipeline.config.loop_config import LoopConfig
from pipeline.config.sections import BatchConfig
from pipeline.samples.deadly import ROLES, DeadlySamples, done_with
from pipeline.samples.ledger import Ledger

_REMEDIES = {
    "reward": "Mend the reward function",
    "environment": "Mend the environment, or raise environment.timeout_s",
}


def check_refills(batch: BatchConfig, ledger: Ledger, step: int, missing: int) -> None:
    """Raises RunError when more groups were issued for a step than `batch.max_refills` allows.

    missing: number of groups that are about to be issued. Without this limit, a task whose samples all get the same
    score would be refilled for ever.
    """
    opened = ledger.of_step(step)
    issued = sum(c.groups for c in opened)
    allowed = batch.prompts * (1 + batch.max_refills)
    if issued + max(missing, 0) <= allowed:
        return
    flat, lost = sum(len(c.flat - c.spoiled_groups()) for c in opened), sum(len(c.spoiled_groups()) for c in opened)
    raise RunError(
        who="rollout",
        phase="filling the step",
        cause=f"of {issued} groups {flat} have no variance in their scores and {lost} lost a member, {missing} "
        f"of {batch.prompts} are still missing, "
        f"and more than batch.max_refills = {batch.max_refills} times the step would be issued besides",
        remedy="choose prompts that are neither too easy nor too hard for the policy or a reward that tells "
        "its answers apart, or raise the limit",
    )


def check_failed(config: LoopConfig, ledger: Ledger, deadly: DeadlySamples) -> None:
    """Raises RunError when more samples failed than `reward.max_failed` allows.

    Samples that a search has found to kill their workers count at once, so a search cannot go on for ever.
    """
    failed = ledger.quarantined | {
        s: why for c in ledger.open.values() for s, why in (deadly.of(c.number) | c.quarantined).items()
    }
    issued = max(ledger.next_group * config.batch.group_size, config.batch.samples)
    if len(failed) > config.reward.max_failed * issued:
        raise too_many(failed, issued, config.reward.max_failed)


def too_many(failed: Mapping[int, str], issued: int, limit: float) -> RunError:
    """The error for too many failed samples: it names the role with most failures, and its first failed sample."""
    of = {sample: done_with(why) for sample, why in failed.items()}
    [(doing, count)] = Counter(of.values()).most_common(1)
    role, sample = ROLES[doing], next(sample for sample in failed if of[sample] == doing)
    others = f" ({count} of them by the {role})" if count < len(failed) else ""
    return RunError(
        who=role,
        phase=doing.removesuffix(" of"),
        cause=f"{len(failed)} of {issued} samples are quarantined{others}, more than reward.max_failed = {limit:g} "
        f"allows; sample {sample}: {failed[sample]}",
        remedy=f"{_REMEDIES.get(role, f'See what the {role} workers{chr(39)} logs end with')}, or raise "
        "reward.max_failed if such failures are expected",
    )
