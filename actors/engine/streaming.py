"""One reply of the built-in engine, token by token as it is sampled, for a person who reads along.

The tokens are those that `TorchEngine.generate` gives for the same request. Left out: several requests, and partners: a
chat continues with the tokens so far as the next prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.engine.decoder import Decoder
from actors.engine.protocol import Request
from actors.engine.slot_run import SlotRun

if TYPE_CHECKING:
    import numpy.typing as npt

    from actors.config import SamplingConfig


class _StreamedRun(SlotRun):
    """The same steps as `SlotRun.completions`, with a pause after each sampled token."""

    def tokens_sampled(self) -> Iterator[int]:
        self.admit()
        while (speaking := np.flatnonzero(self.request >= 0)).size:
            self.sample(speaking)
            yield int(self.tokens[speaking[0], self.count[speaking[0]] - 1])
            self.finish(speaking)
            if (self.request >= 0).any():
                self.decode()


@torch.inference_mode()
def stream(
    engine: Decoder, prompt: npt.NDArray[np.int32], sampling: SamplingConfig, *, seed: int, sample_id: int
) -> Iterator[int]:
    """Sample a reply to a prompt (P,), and yield each token at once; the stop token is one of them.

    Raises ValueError for a prompt without tokens, or one that leaves no room for a reply; FloatingPointError when the
    logits are not finite. Closing the iterator ends the reply.
    """
    if not 0 < len(prompt) < engine.context:
        raise ValueError(
            f"prompt: must have 1 to {engine.context - 1} tokens, so that the model's context of {engine.context} has "
            f"room for a reply, got {len(prompt)}; begin a new conversation, or shorten the prompt"
        )
    request = Request(sample_id=sample_id, group_id=0, prompt=prompt)
    yield from _StreamedRun(engine, [request], sampling, seed, None).tokens_sampled()


@torch.inference_mode()
def last_state(engine: Decoder, prompt: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The state of a prompt's last token, (1, D) float32, from which a manager chooses an option."""
    state: npt.NDArray[np.float32] = engine.prefill([prompt])[0].hidden.float().cpu().numpy()[None]
    return state
