"""The choice of options in a rollout worker: by a manager's published head, among those that the environment offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from actors.manager.option_head import OptionHead
from cluster.faults import ContractError


class ManagerChooser:
    """Chooses an option for each turn of the conversations of one call; implements `OptionChooser`."""

    def __init__(
        self,
        head: OptionHead,
        names: Sequence[str],
        tokens: Sequence[int],
        offers: Callable[[int], Sequence[str]],
        *,
        seed: int,
        greedy: bool,
    ) -> None:
        """names, tokens: of the options, K each. offers(sample_id): what the environment offers now; nothing: all.

        greedy: take the likeliest option.
        """
        self._head, self._names, self._tokens, self._offers = head, tuple(names), tuple(tokens), offers
        self._seed, self._greedy = seed, greedy
        self._offered: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}

    def choose(
        self,
        features: npt.NDArray[np.float32],
        sample_ids: npt.NDArray[np.int64],
        turns: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
        """Choose options for N turns that begin now; returns them and their log-probs, (N,) each.

        Raises ContractError where the environment offers an option that the manager does not have.
        """
        offered = np.stack([self._mask(int(sample)) for sample in sample_ids])
        for sample, turn, mask in zip(sample_ids, turns, offered, strict=True):
            self._offered[int(sample), int(turn)] = mask
        found = self._head.choose(features, offered, sample_ids, turns, seed=self._seed, greedy=self._greedy)
        return found.options, found.logprobs

    def token_of(self, option: int) -> int:
        """The control token of an option."""
        return self._tokens[option]

    def offered(self, sample_id: int, turns: int) -> npt.NDArray[np.bool_]:
        """What was on offer in the first `turns` turns of a conversation, (turns, K)."""
        rows = [self._offered[sample_id, turn] for turn in range(turns)]
        return np.stack(rows) if rows else np.zeros((0, len(self._names)), np.bool_)

    def _mask(self, sample_id: int) -> npt.NDArray[np.bool_]:
        given = self._offers(sample_id)
        strange = [name for name in given if name not in self._names]
        if strange:
            raise ContractError(
                f"environment: must offer options that manager.options names, got {strange[0]!r}; they are "
                f"{', '.join(self._names)}"
            )
        return np.array([not given or name in given for name in self._names])
