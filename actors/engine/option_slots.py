"""The options of the conversations in the slots: which slot waits for one, and what was chosen so far.

Shapes: S slots, N turns, D width of the features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.protocol import OptionChooser

Floats = npt.NDArray[np.float32]


class OptionSlots:
    """Arrays are indexed by slot.

    beginning: the slot begins a turn as soon as its tokens are fed, and has no option for it yet. ending: its
    conversation was broken off, and is complete as soon as its tokens are fed.
    """

    def __init__(self, chooser: OptionChooser, slots: int, suppressed: Tensor | None) -> None:
        """suppressed: the tokens that the model never generates."""
        self.beginning = np.zeros(slots, np.bool_)
        self.ending = np.zeros(slots, np.bool_)
        self._chooser = chooser
        self._suppressed = frozenset() if suppressed is None else frozenset(suppressed.tolist())
        self._turns: list[list[tuple[int, float, Floats]]] = [[] for _ in range(slots)]  # option, log-prob, features

    def seat(self, slot: int) -> None:
        """Forget the slot's last conversation."""
        self.beginning[slot] = self.ending[slot] = False
        self._turns[slot] = []

    def choose(
        self,
        slots: npt.NDArray[np.int64],
        features: Floats,
        sample_ids: npt.NDArray[np.int64],
        turns: npt.NDArray[np.int32],
    ) -> list[int]:
        """The control tokens of the turns that begin in these N slots; for the rest see `OptionChooser.choose`.

        Raises ValueError for a control token that the model does not suppress: the policy could say it, too.
        """
        options, logprobs = self._chooser.choose(features, sample_ids, turns)
        tokens = [self._chooser.token_of(int(option)) for option in options]
        for slot, option, logprob, row in zip(slots, options, logprobs, features, strict=True):
            self._turns[slot].append((int(option), float(logprob), row))
        if spoken := [token for token in tokens if token not in self._suppressed]:
            raise ValueError(
                "model.path: must have the control tokens of options in suppress_tokens of its generation_config.json, "
                f"got none for token {spoken[0]}; write the model with `add_option_tokens`"
            )
        self.beginning[slots] = False
        return tokens

    def chosen(self, slot: int) -> dict[str, npt.NDArray[Any]]:
        """The fields of a `Completion` about the options of the slot's conversation, which has had a turn."""
        options, logprobs, features = zip(*self._turns[slot], strict=True)
        return {
            "options": np.array(options, np.int16),
            "option_logprobs": np.array(logprobs, np.float32),
            "features": np.stack(features),
        }


def features_of(hidden: Tensor, slots: npt.NDArray[np.int64], sample_ids: npt.NDArray[np.int64]) -> Floats:
    """Rows of the states (S, D) for these slots, (N, D).

    Raises FloatingPointError naming the sample whose state is not finite.
    """
    rows: Floats = hidden[torch.from_numpy(slots).to(hidden.device)].float().cpu().numpy()
    if not (finite := np.isfinite(rows).all(1)).all():
        sample = int(sample_ids[finite.argmin()])
        raise FloatingPointError(f"features of sample {sample} are not finite; the weights have diverged")
    return rows
