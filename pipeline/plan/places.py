"""Places for the processes of each stage, on this machine or on the cluster that is joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.placement import NodeResources, Placement, RoleDemand, cpus_that_fit, place, shortages
from cluster.session import check_address, cluster_address
from pipeline.config.run_config import RunConfig
from pipeline.evaluation.evaluate import examiners
from pipeline.folder.manifests import StageName
from pipeline.loop.wiring import demands


def placements(config: RunConfig, stages: Sequence[StageName]) -> dict[str, Placement]:
    """Name -> placement, of each set of processes that these stages start one after the other."""
    sized = with_cpus(config, cpus_per_bundle(config))
    return {name: place(sized.cluster, roles) for name, roles in demands_of(config, stages).items()}


def demands_of(config: RunConfig, stages: Sequence[StageName]) -> dict[str, list[RoleDemand]]:
    """What these stages ask of the cluster, one after the other."""
    asking: dict[str, list[RoleDemand]] = {}
    if "sft" in stages:
        asking["sft"] = [
            RoleDemand(
                role="finetune.learner", workers=config.finetune.learner.ranks, gpus=config.finetune.learner.gpus
            )
        ]
    if "reward" in stages and config.reward_model.pairs == "sampled":
        asking["comparisons"] = comparers(config)
    if "reward" in stages:
        asking["reward"] = [
            RoleDemand(
                role="reward_model.learner",
                workers=config.reward_model.learner.ranks,
                gpus=config.reward_model.learner.gpus,
            )
        ]
    if "rl" in stages:
        asking["rl"] = demands(config)
    if "evaluate" in stages:
        asking["evaluate"] = examiners(config.evaluation)
    return asking


def comparers(config: RunConfig) -> list[RoleDemand]:
    """What sampling comparisons asks of the cluster."""
    return [RoleDemand(role="comparer", workers=config.rollout.workers, gpus=config.rollout.gpus, fewest=1)]


def cpus_per_bundle(config: RunConfig) -> int:
    """As the recipe says, or so that reinforcement learning uses this machine."""
    return config.cluster.cpus_per_bundle or place(config.cluster, demands(config)).bundles[0].cpus


def sized_for(
    config: RunConfig, stages: Sequence[StageName], nodes: Sequence[NodeResources], say: Callable[[str], None]
) -> RunConfig:
    """The configuration with as many CPUs a bundle as fit these nodes in each stage, if it leaves them open."""
    cluster = config.cluster
    asked_for = demands_of(config, stages).values()
    cpus = cluster.cpus_per_bundle or min(
        cpus_that_fit(roles, share_devices=cluster.share_devices, nodes=nodes) for roles in asked_for
    )
    if not cpus:
        say("no node has room for all bundles yet, so each gets 1 CPU; to have more, set cluster.cpus_per_bundle")
    return with_cpus(config, max(cpus, 1))


def with_cpus(config: RunConfig, cpus: int) -> RunConfig:
    """The recipe with so many CPUs a bundle."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"cpus_per_bundle": cpus})})


def check_places(config: RunConfig, stages: Sequence[StageName]) -> None:
    """Raises ValueError for a bad address, and for GPUs that a local Ray could not give to these stages."""
    address = cluster_address(config.cluster)
    if address:
        check_address(address)
        return
    seats = placements(config, stages)
    if not any(bundle.gpus for placement in seats.values() for bundle in placement.bundles):
        return
    gpus = gpus_here()
    for placement in seats.values():
        # a local Ray counts as many CPUs as it needs
        here = NodeResources(name="this machine", cpus=placement.cpus, gpus=gpus)
        if shortages(placement, [here]):
            keys = ", ".join(
                dict.fromkeys(f"{_KEYS.get(slot.role, slot.role)}.gpus" for slot in placement.slots if slot.gpus)
            )
            asked_for = sum(bundle.gpus for bundle in placement.bundles)
            raise ValueError(
                f"{keys}: must be at most the {gpus} GPUs of this machine, got {asked_for:g} in all; lower it, or join "
                "a cluster by cluster.address"
            )


_KEYS = {"comparer": "rollout", "examiner": "evaluation"}  # role -> section, where they are not called alike


def gpus_here() -> int:
    """GPUs that torch sees on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
