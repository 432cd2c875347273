"""The model of the built-in engine: it runs prompts in batches, then one token for each slot at a time.

Shapes: S slots, V vocabulary, D width, T padded prompt length, P prompt length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.device import torch_dtype
from actors.engine.packed_weights import pack_linears
from actors.engine.slots import (
    ALIGN,
    ATTENTION,
    Prefill,
    PromptCache,
    SlotCache,
    align,
    check_windows,
    register_attention,
)
from actors.models.causal_lm import context_of, load_causal_lm
from actors.models.suppressed import suppress, suppressed_tokens
from actors.models.tokenizer import load_tokenizer
from actors.models.usage import ends_of
from actors.weights import copy_parameters

if TYPE_CHECKING:
    from actors.config import RolloutConfig

PREFILL_TOKENS = 256  # tokens of one prefill batch: enough for the matrix products to run at full speed


class Decoded(NamedTuple):
    """What the model says after one token in each slot."""

    hidden: Tensor  # (S, D) state of the token, after the final norm
    logits: Tensor  # (S, V) float32, of the next token


class Decoder:
    """A causal LM in this process, with keys and values in slots; raises ValueError if there is none at `path`."""

    def __init__(self, path: str, config: RolloutConfig, device: torch.device, *, untie_head: bool = False) -> None:
        register_attention()
        self.tokenizer: Any = load_tokenizer(path)
        self.model: Any = load_causal_lm(path, torch_dtype(config.dtype), untie_head=untie_head, attention=ATTENTION)
        self.model.to(device)
        pack_linears(self.model)
        never = suppressed_tokens(self.model)
        self.suppressed = None if never is None else never.to(device)
        self.slots = config.slots
        self.device = device
        self.context = context_of(path)
        self.ends = np.array(ends_of(path, self.tokenizer))
        check_windows(self.model, path)
        self._trunk = self.model.base_model

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy these weights into the model, all or none; tied parameters appear once.

        Raises ValueError naming a parameter that is unknown, missing or of another shape.
        """
        copy_parameters(self.model, named)

    def prefill(self, prompts: Sequence[Any]) -> list[Prefill]:
        """Run prompts of one padded length T through the model, in a batch whose shape depends on T alone."""
        width = align(len(prompts[0]))
        ids = np.zeros((prefill_rows(width), width), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        positions = torch.arange(width, device=self.device).clamp(max=self.context - 1).expand(len(ids), -1)
        cache = PromptCache()
        hidden = self._hidden(torch.from_numpy(ids), positions, None, cache)
        # the rows of the head's batch; their number is always the same
        last = torch.arange(PREFILL_TOKENS // ALIGN, device=self.device).clamp(max=len(prompts) - 1)
        ends = torch.tensor([len(p) - 1 for p in prompts], device=self.device)[last]
        states = hidden[last, ends]  # (16, D)
        logits = self._logits(states)
        keys, values = cache.stacked()
        return [
            Prefill(length=len(p), keys=keys[:, i], values=values[:, i], hidden=states[i], logits=logits[i])
            for i, p in enumerate(prompts)
        ]

    def decode(self, tokens: Tensor, positions: Tensor, longest: int, cache: SlotCache) -> Decoded:
        """Run one token in each slot: tokens (S,) at positions (S,). longest: the largest position."""
        mask = cache.open(positions, longest)
        hidden = self._hidden(tokens[:, None], positions[:, None], mask, cache)[:, 0]
        return Decoded(hidden, self._logits(hidden))

    def _hidden(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: PromptCache | SlotCache) -> Tensor:
        out = self._trunk(
            input_ids=ids.to(self.device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _logits(self, hidden: Tensor) -> Tensor:
        return suppress(self.model.get_output_embeddings()(hidden).float(), self.suppressed)


def prefill_rows(width: int) -> int:
    """The number of prompts in a prefill batch; it depends on their padded length alone, and so do their bits."""
    return max(1, PREFILL_TOKENS // width)
