"""A published set of weights, as workers are told of it: a version, a checksum, and where to pull it from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray import ObjectRef

    from actors.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """Sent along with every chunk; a worker pulls the weights only when what it holds has another checksum."""

    version: int
    checksum: str
    holder: tuple[ObjectRef]  # wrapped, so that Ray passes the reference on instead of the weights
    timeout_s: float

    def fetch(self) -> Weights:
        """Pull the weights out of the object store. Raises ray.exceptions.GetTimeoutError after timeout_s seconds."""
        import ray

        weights: Weights = ray.get(self.holder[0], timeout=self.timeout_s)
        return weights
