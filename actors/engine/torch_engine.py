"""The built-in engine: a Hugging Face causal LM, with full or sliding-window attention, in a fixed number of slots.

Shapes: S slots, V vocabulary, T padded prompt length, P prompt length, A sampled tokens.

A prompt is computed once and copied into the slots of its group's samples. When a request is complete, the next one
takes its slot at once. Every step decodes all S slots, free ones included, because the rounding in one slot would
otherwise depend on how many slots are in use. So a completion is a function of (weights, request, sampling, seed), and
of the partner's answers and the options if there are any. The time of these answers and the other slots change no bit.

A conversation keeps its slot, with its keys and values. The tokens of an answer are fed one at each step, as sampled
tokens are; so is the control token of an option.

Left out: `transformers.generate` (it concatenates its caches and cannot reuse a slot), compilation (on CPU it takes
longer than the run it would speed up), a smaller batch when requests run out, beams, and logits processors that a
learner could not recompute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from actors.engine.decoder import Decoder
from actors.engine.protocol import Completion, OptionChooser, Partner, Request
from actors.engine.slot_run import SlotRun

if TYPE_CHECKING:
    from actors.config import SamplingConfig


class TorchEngine(Decoder):
    """Generates samples with a causal LM in this process; raises ValueError if there is none at `path`."""

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        seed: int,
        partner: Partner | None = None,
        chooser: OptionChooser | None = None,
        pause_after: int = 0,
    ) -> list[Completion]:
        """Complete every request, in the order given; see `Engine`.

        Raises ValueError naming the sample whose prompt leaves no room for a turn in the model's context, ValueError
        for a control token that the model does not suppress, and FloatingPointError naming the sample whose logits or
        features are not finite.
        """
        assert chooser is None or partner is not None, "chooser: must come with a partner, got it without"
        assert not pause_after or partner is None, "pause_after: must be 0 with a partner, who waits for whole turns"
        room = self.context - (chooser is not None)
        for request in requests:
            if len(request.prompt) == 0:
                raise ValueError(
                    f"prompt: must have at least one token, got none for sample {request.sample_id}; drop empty prompts"
                )
            if len(request.prompt) >= room:
                with_token = "" if chooser is None else " without the control token"
                raise ValueError(
                    f"prompt: must be shorter than the model's context of {room} tokens{with_token}, got "
                    f"{len(request.prompt)} tokens"
                    f" for sample {request.sample_id}; shorten the prompts or drop the long ones"
                )
        if not requests:
            return []
        return SlotRun(self, requests, sampling, seed, partner, chooser, pause_after).completions()
