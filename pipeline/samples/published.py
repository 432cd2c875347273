"""Published versions of the weights: number, checksum and reference of each, and those that are still sampled with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


class Versions:
    """The versions that samples are generated with: the newest, and as many before it as `max_staleness`.

    Whoever holds this holds their bytes in the object store.
    """

    def __init__(self, newest: PublishedWeights, older: Iterable[PublishedWeights] = ()) -> None:
        self.newest = newest
        self._all = {one.version: one for one in (*older, newest)}

    def __getitem__(self, version: int) -> PublishedWeights:
        return self._all[version]

    @property
    def older(self) -> tuple[PublishedWeights, ...]:
        """All but the newest, the oldest first."""
        return tuple(self._all[version] for version in sorted(self._all) if version != self.newest.version)

    def with_next(self, newest: PublishedWeights, keep: int) -> Versions:
        """These versions and the next one, of which the `keep` before it are kept."""
        kept = [one for one in self._all.values() if one.version >= newest.version - keep]
        return Versions(newest, kept)
