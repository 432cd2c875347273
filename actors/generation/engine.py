"""What a generation engine is. An engine turns requests into completions on full weights and knows nothing of Ray.

The contract every engine keeps: `generate` depends on the weights, the requests and the sampling alone, never on
what was generated before or on how many other workers there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from actors.config import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to generate. Requests of one group stand side by side and share their prompt."""

    sample_id: int
    group_id: int
    prompt: npt.NDArray[np.int32]  # (P,), P >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Sampled tokens, the stop token or stop string included.

    logprobs[t] = log-prob of tokens[t] under the very distribution it was drawn from: after temperature, top-k and top-p
    (at temperature 0: under the untempered softmax).
    """

    sample_id: int
    tokens: npt.NDArray[np.int32]  # (A,), 1 <= A <= max_new_tokens
    logprobs: npt.NDArray[np.float32]  # (A,)
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """Generates with the weights last loaded."""

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, *, seed: int) -> list[Completion]:
        """Complete every request, in the order given. The random numbers of a sample depend on (seed, sample_id) alone."""
        ...

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy these parameters in, by the names of the model's `named_parameters()`. Raises ValueError on an unknown name or another shape."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer saved beside the model."""
        ...
