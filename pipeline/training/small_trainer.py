"""A `TorchTrainer` whose controller runs in the process that calls `fit`, without helper processes that are not used.

On two cores, each such process costs about one second at every start of the workers. And as long as the controller has
no process of its own, one process makes all placement groups of the training, so the driver can wait for its end
(reservations.py). This is the only file that touches private names of Ray Train (2.60).
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController

_UNUSED = (
    "DatasetsCallback",  # hands out Ray Data's data sets, and this program has none
    "PlacementGroupCleanerCallback",  # removes the last group of a killed controller; reservations.py removes all
)
_AUTOSCALING = ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request")


class SmallTorchTrainer(TorchTrainer):
    """Overrides two methods of the trainer and three of its scaling policy."""

    def __init__(self, *args: Any, is_alone: bool, **options: Any) -> None:
        """is_alone: the cluster is one node, without an autoscaler that could add nodes."""
        super().__init__(*args, **options)
        self._is_alone = is_alone

    def _create_default_callbacks(self) -> list[Any]:
        return [found for found in super()._create_default_callbacks() if type(found).__name__ not in _UNUSED]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self._is_alone:
            for name in _AUTOSCALING:
                setattr(options["scaling_policy"], name, _nothing)
        controller = TrainController(**options)
        asyncio.run(controller.run())
        return controller.get_result()


def _nothing() -> None:
    pass
