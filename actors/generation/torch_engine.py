"""The built-in engine: any Hugging Face causal LM with full attention, decoded in a fixed number of slots.

Shapes: S slots, V vocabulary, T padded prompt length, P prompt length, A sampled tokens.

A prompt is computed once and copied into the slots of its group's samples; a row that ends makes room for the next request at
once; every step decodes all S rows, idle ones included, since a row's bits would otherwise depend on how many others are left.
The schedule is a function of the requests and of what they yield, so `generate` is one of (weights, requests, sampling, seed).

What was left out: `transformers.generate` (concatenates its caches and cannot refill a row), compilation (longer than the run it
would speed up, on CPU), shrinking the batch when requests run out, beams, and processors of logits that a learner could not recompute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.device import torch_dtype
from actors.generation.engine import Completion, Request
from actors.generation.packed import pack_linears
from actors.generation.sampler import sample, uniforms
from actors.generation.slots import ALIGN, ATTENTION, Prefilled, PromptCache, SlotCache, align, register_attention
from actors.generation.stopping import StopStrings
from actors.model import load_causal_lm, load_tokenizer

if TYPE_CHECKING:
    from actors.config import RolloutConfig, SamplingConfig

PREFILL_TOKENS = 256  # enough for the matrix products to run at full speed


class TorchEngine:
    """Generates with a causal LM in this process. Raises ValueError when there is none at `path`."""

    def __init__(self, path: str, config: RolloutConfig, device: torch.device, *, untie_head: bool = False) -> None:
        register_attention()
        self.tokenizer: Any = load_tokenizer(path)
        self.model: Any = load_causal_lm(path, torch_dtype(config.dtype), untie_head=untie_head, attention=ATTENTION)
        self.model.to(device)
        pack_linears(self.model)
        self.slots = config.slots
        self.device = device
        self.context = _context(self.model.config)
        self._trunk = self.model.base_model

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy these parameters in, all or none; tied ones appear once. Raises ValueError naming one that is unknown, missing or of another shape."""
        own, new = dict(self.model.named_parameters()), dict(named)
        for name in sorted(own.keys() ^ new.keys()):
            kind = "missing" if name in own else "unknown to the model"
            raise ValueError(f"weights: must hold the model's {len(own)} parameters, {name!r} is {kind}; publish the model that the pool was given")
        for name, tensor in new.items():
            if own[name].shape != tensor.shape:
                raise ValueError(f"weights: {name!r} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        with torch.no_grad():
            for name, tensor in new.items():
                own[name].copy_(tensor)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, *, seed: int) -> list[Completion]:
        """Complete every request, in the order given; see `Engine`.

        Raises ValueError naming the sample whose prompt leaves no room for a token in the model's context, and FloatingPointError
        naming the sample whose logits are not finite.
        """
        for request in requests:
            if len(request.prompt) == 0:
                raise ValueError(f"prompt: must have at least one token, got none for sample {request.sample_id}; drop empty prompts")
            if len(request.prompt) >= self.context:
                raise ValueError(
                    f"prompt: must be shorter than the model's context of {self.context} tokens, got {len(request.prompt)} tokens"
                    f" for sample {request.sample_id}; shorten the prompts or drop the long ones"
                )
        return _Run(self, requests, sampling, seed).completions() if requests else []

    def prefill(self, prompts: Sequence[Any]) -> list[Prefilled]:
        """Run prompts of one padded length T through the model, in a batch whose shape depends on T alone."""
        width = align(len(prompts[0]))
        ids = np.zeros((prefill_rows(width), width), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        positions = torch.arange(width, device=self.device).clamp(max=self.context - 1).expand(len(ids), -1)
        cache = PromptCache()
        hidden = self._hidden(torch.from_numpy(ids), positions, None, cache)
        last = torch.arange(PREFILL_TOKENS // ALIGN, device=self.device).clamp(max=len(prompts) - 1)  # rows of the head's batch: always as many
        ends = torch.tensor([len(p) - 1 for p in prompts], device=self.device)[last]
        logits = self._logits(hidden[last, ends])
        keys, values = cache.stacked()
        return [Prefilled(length=len(p), keys=keys[:, i], values=values[:, i], logits=logits[i]) for i, p in enumerate(prompts)]

    def decode(self, tokens: Tensor, positions: Tensor, longest: int, cache: SlotCache) -> Tensor:
        """One token a row at its position, (S,) each -> logits of the next, (S, V) float32."""
        mask = cache.open(positions, longest)
        return self._logits(self._hidden(tokens[:, None], positions[:, None], mask, cache)[:, 0])

    def _hidden(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: PromptCache | SlotCache) -> Tensor:
        out = self._trunk(input_ids=ids.to(self.device), position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden).float()  # type: ignore[no-any-return]


def prefill_rows(width: int) -> int:
    """Prompts of one prefill. Depends on their padded length alone, and so then do their bits."""
    return max(1, PREFILL_TOKENS // width)


def _context(config: Any) -> int:
    """Longest sequence the model can attend to in full; a sliding window counts as its end."""
    return min(int(config.max_position_embeddings), int(getattr(config, "sliding_window", None) or config.max_position_embeddings))


class _Group:
    """Requests that share a prompt, and how many of them are under way."""

    def __init__(self, prompt: Any) -> None:
        self.prompt = prompt
        self.waiting: deque[int] = deque()  # indices of requests
        self.prefilled: Prefilled | None = None


class _Run:
    """One call of `generate`: which request sits in which slot, and what it has sampled so far.

    A free slot has `request` -1. Arrays are indexed by slot.
    """

    def __init__(self, engine: TorchEngine, requests: Sequence[Request], sampling: SamplingConfig, seed: int) -> None:
        self.engine, self.requests, self.sampling, self.seed = engine, requests, sampling, seed
        self.stop = StopStrings(engine.tokenizer, sampling.stop) if sampling.stop else None
        self.eos = engine.tokenizer.eos_token_id
        self.groups = _groups(requests)
        self.unprefilled = {width: [g for g in self.groups if align(len(g.prompt)) == width] for width in {align(len(g.prompt)) for g in self.groups}}
        self.done: list[Completion | None] = [None] * len(requests)
        slots, longest = engine.slots, sampling.max_new_tokens
        self.request = np.full(slots, -1)
        self.prompt_length = np.zeros(slots, np.int64)
        self.count = np.zeros(slots, np.int64)  # tokens sampled so far
        self.limit = np.zeros(slots, np.int64)  # tokens it may sample
        self.uniform = np.zeros((slots, longest))
        self.tokens = np.zeros((slots, longest), np.int32)
        self.logprobs = np.zeros((slots, longest), np.float32)
        self.cache: SlotCache | None = None
        self.logits = torch.empty(0)

    def completions(self) -> list[Completion]:
        self.admit()
        while (active := np.flatnonzero(self.request >= 0)).size:
            tokens = self.sample(active)
            self.finish(active)
            if self.groups or (self.request >= 0).any():
                self.decode(tokens)
                self.admit()
        return [c for c in self.done if c is not None]

    def admit(self) -> None:
        """Fill the free slots with the next requests."""
        free = np.flatnonzero(self.request < 0)
        while free.size and self.groups:
            group = self.groups[0]
            prompt = self._prefilled(group)
            slots, free = free[: len(group.waiting)], free[len(group.waiting) :]
            if self.cache is None:
                self.cache = SlotCache(self.engine.slots, prompt)
                self.logits = prompt.logits.new_zeros((self.engine.slots, prompt.logits.shape[0]))
            self.cache.admit(slots, prompt)
            self.logits[torch.from_numpy(slots).to(self.logits.device)] = prompt.logits
            for slot in slots:
                self._seat(int(slot), group.waiting.popleft())
            if not group.waiting:
                self.groups.popleft()

    def sample(self, active: Any) -> Tensor:
        """One more token for every active slot; returns all slots' tokens (S,)."""
        uniform = torch.from_numpy(self.uniform[np.arange(len(self.count)), np.minimum(self.count, self.uniform.shape[1] - 1)])
        tokens, logprobs = sample(self.logits, uniform.to(self.logits.device), self.sampling)
        drawn = logprobs.cpu().numpy()[active]
        if not np.isfinite(drawn).all():
            bad = self.requests[int(self.request[active[~np.isfinite(drawn)][0]])]
            raise FloatingPointError(f"logits of sample {bad.sample_id} are not finite; the weights have diverged")
        self.tokens[active, self.count[active]] = tokens.cpu().numpy()[active]
        self.logprobs[active, self.count[active]] = drawn
        self.count[active] += 1
        return tokens

    def finish(self, active: Any) -> None:
        """Free the slots whose row has reached its end."""
        counts = self.count[active]
        stopped = self.tokens[active, counts - 1] == self.eos
        if self.stop is not None:
            stopped |= self.stop.reached([self.tokens[slot, :count] for slot, count in zip(active, counts, strict=True)])
        for slot in active[stopped | (counts == self.limit[active])]:
            index, count = int(self.request[slot]), int(self.count[slot])
            self.done[index] = Completion(
                sample_id=self.requests[index].sample_id,
                tokens=self.tokens[slot, :count].copy(),
                logprobs=self.logprobs[slot, :count].copy(),
                finish="stop" if stopped[active == slot][0] else "length",
            )
            self.request[slot] = -1

    def decode(self, tokens: Tensor) -> None:
        """Logits of every row's next token. An idle row computes a token at its position 0, which nobody reads."""
        assert self.cache is not None
        positions = np.where(self.request >= 0, self.prompt_length + self.count - 1, 0)
        self.logits = self.engine.decode(tokens, torch.from_numpy(positions).to(self.engine.device), int(positions.max()), self.cache)

    def _seat(self, slot: int, index: int) -> None:
        request, longest = self.requests[index], self.sampling.max_new_tokens
        self.request[slot] = index
        self.prompt_length[slot] = len(request.prompt)
        self.count[slot] = 0
        self.limit[slot] = min(longest, self.engine.context - len(request.prompt))
        self.uniform[slot] = uniforms(self.seed, request.sample_id, longest)

    def _prefilled(self, group: _Group) -> Prefilled:
        """The group's prompt, prefilled together with the next ones of the same padded length."""
        if group.prefilled is None:
            queue = self.unprefilled[align(len(group.prompt))]
            rows = prefill_rows(align(len(group.prompt)))
            batch, queue[:] = queue[:rows], queue[rows:]
            assert batch[0] is group
            for one, prefilled in zip(batch, self.engine.prefill([g.prompt for g in batch]), strict=True):
                one.prefilled = prefilled
        assert group.prefilled is not None
        return group.prefilled


def _groups(requests: Sequence[Request]) -> deque[_Group]:
    groups: deque[_Group] = deque()
    for index, request in enumerate(requests):
        if index == 0 or request.group_id != requests[index - 1].group_id:
            groups.append(_Group(request.prompt))
        assert np.array_equal(groups[-1].prompt, request.prompt), f"group {request.group_id}: its requests must share one prompt"
        groups[-1].waiting.append(index)
    return groups
