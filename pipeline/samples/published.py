"""A published version of the weights: its number, its checksum, and the reference to pull it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ray import ObjectRef

    from actors.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """Sent with every chunk; a worker pulls the weights only if its own have another checksum."""

    version: int
    checksum: str
    holder: tuple[ObjectRef]  # in a tuple, so that Ray passes the reference and not the weights
    timeout_s: float
    manager: Mapping[str, npt.NDArray[np.float32]] | None = None  # the head that chooses options, if there is one

    def fetch(self) -> Weights:
        """Pull the weights out of the object store. Raises ray.exceptions.GetTimeoutError after timeout_s seconds."""
        import ray

        weights: Weights = ray.get(self.holder[0], timeout=self.timeout_s)
        return weights
