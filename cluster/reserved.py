"""Reservations of bundles on a cluster: Ray's placement groups, asked for and looked at without waiting.

A head that is busy or restarts answers later: nothing here raises for it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cluster.placement import Bundle

log = logging.getLogger(__name__)

_NODE_LABEL = "ray.io/node-id"


class Reservations:
    """Asks Ray."""

    def reserve(
        self, bundles: Sequence[Bundle], labels: Sequence[Mapping[str, str]], avoided: Collection[str]
    ) -> Any | None:
        """Ask for bundles together, all or nothing; returns the group, at once, or None if Ray does not answer.

        labels: of the node of each. avoided: ids of nodes that they must not be on.
        """
        from ray.exceptions import RayError
        from ray.util.placement_group import placement_group

        selectors = [dict(of_bundle) for of_bundle in labels]
        if avoided:
            for selector in selectors:
                selector[_NODE_LABEL] = f"!in({','.join(sorted(avoided))})"
        try:
            return placement_group(
                [{"CPU": bundle.cpus, "GPU": bundle.gpus} for bundle in bundles],
                strategy="PACK",
                bundle_label_selector=selectors if any(selectors) else None,
            )
        except (RayError, OSError) as error:
            log.warning("bundles cannot be asked for now: %s", error)
            return None

    def places(self, group: Any) -> dict[int, str]:
        """Position -> node id, of the bundles of a group; empty unless it is whole, as far as Ray knows."""
        from ray.exceptions import RayError
        from ray.util.placement_group import placement_group_table

        try:
            table = placement_group_table(group)
        except (RayError, RuntimeError, OSError) as error:
            log.info("a reservation cannot be looked at: %s", error)
            return {}
        return dict(table["bundles_to_node_id"]) if table.get("state") == "CREATED" else {}

    def remove(self, group: Any) -> None:
        """Give a group back; processes that are still there are killed. It goes with the driver at the latest."""
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        try:
            remove_placement_group(group)
        except (RayError, RuntimeError, OSError) as error:
            log.warning("a reservation cannot be given back now: %s", error)
