"""One call of the built-in engine: requests are generated in a fixed number of slots, one after the other in each.

Shapes: S slots, A tokens after a prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from actors.engine.decoder import Decoder, prefill_rows
from actors.engine.option_slots import OptionSlots, features_of
from actors.engine.protocol import Answer, Completion, OptionChooser, Partner, Request, Turn
from actors.engine.sampler import sample, uniforms
from actors.engine.slots import (
    Prefill,
    SlotCache,
    align,
)
from actors.engine.stop_strings import StopStrings

if TYPE_CHECKING:
    from actors.config import SamplingConfig


class _Group:
    """Requests that share a prompt, and which of them are still waiting for a slot."""

    def __init__(self, prompt: Any) -> None:
        self.prompt = prompt
        self.waiting: deque[int] = deque()  # indices of requests
        self.prefilled: Prefill | None = None


class SlotRun:
    """The state of one call of `generate`: the request in each slot, and the tokens after its prompt so far.

    Arrays are indexed by slot. A free slot has `request` -1. Tokens after a prompt are counted from 0. Those before
    `fed` have gone through the model. When all tokens of a slot are fed, `logits` holds the logits of its next token,
    and `hidden` the state of its last one. So a turn continues where the last answer ended, and nothing is computed
    twice.
    """

    def __init__(
        self,
        engine: Decoder,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        seed: int,
        partner: Partner | None,
        chooser: OptionChooser | None = None,
        pause_after: int = 0,
    ) -> None:
        self.engine, self.requests, self.sampling, self.seed, self.partner = engine, requests, sampling, seed, partner
        self.stop = StopStrings(engine.tokenizer, sampling.stop) if sampling.stop else None
        self.groups = _groups(requests)
        self.unprefilled = {
            width: [g for g in self.groups if align(len(g.prompt)) == width]
            for width in {align(len(g.prompt)) for g in self.groups}
        }
        self.done: list[Completion | None] = [None] * len(requests)
        slots, longest = engine.slots, sampling.max_new_tokens
        width = longest if partner is None else engine.context
        self.request = np.full(slots, -1)
        self.prompt_length = np.zeros(slots, np.int64)
        self.count = np.zeros(slots, np.int64)  # tokens after the prompt
        self.fed = np.zeros(slots, np.int64)  # how many of them have gone through the model
        self.limit = np.zeros(slots, np.int64)  # the `count` at which the turn must end
        self.pause_after = pause_after or longest
        self.pause = np.zeros(slots, np.int64)  # the `count` at which the call leaves it
        self.uniform = np.zeros((slots, longest))  # random numbers of the current turn
        self.tokens = np.zeros((slots, width), np.int32)
        self.logprobs = np.zeros((slots, width), np.float32)
        self.sampled = np.zeros((slots, width), np.bool_)
        self.turns: list[list[int]] = [[] for _ in range(slots)]  # where each turn begins
        self.stopped = np.zeros(slots, np.bool_)  # the last turn ended with a stop token or stop string
        self.waiting = np.zeros(slots, np.bool_)  # the slot waits for an answer
        self.options = None if chooser is None else OptionSlots(chooser, slots, engine.suppressed)
        self.cache: SlotCache | None = None
        self.logits = self.hidden = torch.empty(0)

    def completions(self) -> list[Completion]:
        self.admit()
        while (self.request >= 0).any():
            self.choose()
            speaking = np.flatnonzero((self.request >= 0) & ~self.waiting & (self.fed == self.count))
            self.sample(speaking)
            self.finish(speaking)
            self.listen()
            if self.groups or (self.request >= 0).any():
                self.decode()
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
                self.hidden = prompt.hidden.new_zeros((self.engine.slots, prompt.hidden.shape[0]))
            self.cache.admit(slots, prompt)
            index = torch.from_numpy(slots).to(self.logits.device)
            self.logits[index], self.hidden[index] = prompt.logits, prompt.hidden
            for slot in slots:
                self._seat(int(slot), group.waiting.popleft())
            if not group.waiting:
                self.groups.popleft()

    def choose(self) -> None:
        """Choose the options of the turns that begin now, and complete the conversations that were broken off.

        Both need the state of the last token, so it must be fed.
        """
        if self.options is None:
            return
        fed = (self.request >= 0) & (self.fed == self.count)
        for slot in np.flatnonzero(fed & self.options.ending).tolist():
            self._complete(slot, self._features(np.array([slot]))[0])
        slots = np.flatnonzero(fed & self.options.beginning)
        if not slots.size:
            return
        turns = np.array([len(self.turns[slot]) for slot in slots], np.int32)
        tokens = self.options.choose(slots, self._features(slots), self._sample_ids(slots), turns)
        for slot, token in zip(slots.tolist(), tokens, strict=True):
            self._append(slot, token)
            self._begin_turn(slot)

    def sample(self, speaking: npt.NDArray[np.int64]) -> None:
        """Sample one more token in each of these slots."""
        if not speaking.size:
            return
        starts = np.array([turns[-1] if turns else 0 for turns in self.turns])
        drawing = np.clip(self.count - starts, 0, self.uniform.shape[1] - 1)
        uniform = torch.from_numpy(self.uniform[np.arange(len(drawing)), drawing])
        tokens, logprobs = sample(self.logits, uniform.to(self.logits.device), self.sampling)
        drawn = logprobs.cpu().numpy()[speaking]
        if not np.isfinite(drawn).all():
            bad = self.requests[int(self.request[speaking[~np.isfinite(drawn)][0]])]
            raise FloatingPointError(f"logits of sample {bad.sample_id} are not finite; the weights have diverged")
        self.tokens[speaking, self.count[speaking]] = tokens.cpu().numpy()[speaking]
        self.logprobs[speaking, self.count[speaking]] = drawn
        self.sampled[speaking, self.count[speaking]] = True
        self.count[speaking] += 1

    def finish(self, speaking: npt.NDArray[np.int64]) -> None:
        """End the turns that are complete, and hand them to the partner; without a partner, complete the request."""
        if not speaking.size:
            return
        counts = self.count[speaking]
        stopped = np.isin(self.tokens[speaking, counts - 1], self.engine.ends)
        if self.stop is not None:
            stopped |= self.stop.reached([self._turn(slot) for slot in speaking])
        self.stopped[speaking] = stopped
        over = speaking[stopped | (counts == self.limit[speaking])]
        if self.partner is None:
            for slot in over:
                self._complete(slot)
            paused = speaking[(self.request[speaking] >= 0) & (counts == self.pause[speaking])]
            for slot in paused:
                self._complete(slot, is_paused=True)
        elif over.size:
            self.waiting[over] = True
            self.partner.hear([self._told(slot) for slot in over])

    def listen(self) -> None:
        """Append the answers that are ready to their conversations; wait for one only if no slot can go on."""
        if self.partner is None or not self.waiting.any():
            return
        busy = (self.request >= 0) & (~self.waiting | (self.fed < self.count))
        slots = {self.requests[int(self.request[slot])].sample_id: int(slot) for slot in np.flatnonzero(self.waiting)}
        for answer in self.partner.answers(wait=not busy.any()):
            self._take(slots[answer.sample_id], answer)

    def decode(self) -> None:
        """Feed each slot its first unfed token through the model, to get the logits of the token after it.

        A waiting slot whose tokens are all fed is fed its last token again at the same position, which changes nothing.
        A free slot is fed a token at position 0, and its logits are not used.
        """
        assert self.cache is not None
        seated = self.request >= 0
        places = np.where(seated, np.minimum(self.fed, self.count - 1), 0)
        tokens = np.where(seated, self.tokens[np.arange(len(places)), places], 0).astype(np.int64)
        positions = np.where(seated, self.prompt_length + places, 0)
        device = self.engine.device
        fed, at = torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device)
        self.hidden, self.logits = self.engine.decode(fed, at, int(positions.max()), self.cache)
        self.fed = np.where(seated, places + 1, self.fed)

    def _seat(self, slot: int, index: int) -> None:
        self.request[slot] = index
        self.prompt_length[slot] = len(self.requests[index].prompt)
        self.count[slot] = self.fed[slot] = 0
        self.turns[slot] = []
        self.waiting[slot] = False
        if self.options is not None:
            self.options.seat(slot)
        self._next_turn(slot)
        request = self.requests[index]
        if begun := len(request.begun):  # it was prefilled with the prompt
            self._append(slot, request.begun)
            self.logprobs[slot, :begun], self.sampled[slot, :begun] = request.begun_logprobs, True
            self.fed[slot] = begun
        self.pause[slot] = begun + self.pause_after

    def _next_turn(self, slot: int) -> None:
        """Begin the next turn; with a chooser, wait for its option first."""
        if self.options is None:
            self._begin_turn(slot)
        else:
            self.options.beginning[slot] = True

    def _begin_turn(self, slot: int) -> None:
        request, longest = self.requests[int(self.request[slot])], self.sampling.max_new_tokens
        number, start = len(self.turns[slot]), int(self.count[slot])
        self.turns[slot].append(start)
        self.limit[slot] = min(start + longest, self.engine.context - int(self.prompt_length[slot]))
        self.uniform[slot] = uniforms(self.seed, request.sample_id, (number + 1) * longest)[number * longest :]

    def _take(self, slot: int, answer: Answer) -> None:
        """Append an answer and begin the next turn.

        The conversation ends if there is no answer, no room for the answer and one more token, or nothing to follow.
        """
        self.waiting[slot] = False
        if answer.tokens is None or len(answer.tokens) > self._room(slot) + answer.is_last:
            self._complete(slot)
            return
        self._append(slot, answer.tokens)
        if not answer.is_last:
            self._next_turn(slot)
        elif self.options is None:
            self._complete(slot)
        else:
            self.options.ending[slot] = True

    def _append(self, slot: int, tokens: npt.ArrayLike) -> None:
        """Append tokens that were not sampled."""
        start, end = int(self.count[slot]), int(self.count[slot]) + np.size(tokens)
        self.tokens[slot, start:end] = tokens
        self.logprobs[slot, start:end] = 0
        self.sampled[slot, start:end] = False
        self.count[slot] = end

    def _complete(
        self, slot: int, last_features: npt.NDArray[np.float32] | None = None, *, is_paused: bool = False
    ) -> None:
        """last_features: (D,) state of the last token of a conversation that was broken off."""
        index, count = int(self.request[slot]), int(self.count[slot])
        self.done[index] = Completion(
            sample_id=self.requests[index].sample_id,
            tokens=self.tokens[slot, :count].copy(),
            sampled=self.sampled[slot, :count].copy(),
            logprobs=self.logprobs[slot, :count].copy(),
            turn_starts=tuple(self.turns[slot]),
            finish="paused" if is_paused else "stop" if self.stopped[slot] else "length",
            **({} if self.options is None else self.options.chosen(slot)),
            last_features=last_features,
        )
        self.request[slot] = -1

    def _told(self, slot: int) -> Turn:
        return Turn(
            sample_id=self.requests[int(self.request[slot])].sample_id,
            number=len(self.turns[slot]) - 1,
            tokens=self._turn(slot).copy(),
            finish="stop" if self.stopped[slot] else "length",
            room=self._room(slot),
        )

    def _turn(self, slot: int) -> npt.NDArray[np.int32]:
        return self.tokens[slot, self.turns[slot][-1] : int(self.count[slot])]

    def _room(self, slot: int) -> int:
        turn = 1 if self.options is None else 2  # tokens that the shortest turn needs
        return self.engine.context - int(self.prompt_length[slot]) - int(self.count[slot]) - turn

    def _sample_ids(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.array([self.requests[int(self.request[slot])].sample_id for slot in slots], np.int64)

    def _features(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """States of the last tokens of these slots, (N, D); all their tokens are fed."""
        return features_of(self.hidden, slots, self._sample_ids(slots))

    def _prefilled(self, group: _Group) -> Prefill:
        """The group's prefilled prompt; it is computed together with the next prompts of the same padded length."""
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
        known = np.concatenate([request.prompt, request.begun]) if len(request.begun) else request.prompt
        if index == 0 or request.group_id != requests[index - 1].group_id or len(request.begun):
            groups.append(_Group(known))
        assert np.array_equal(groups[-1].prompt, known), f"group {request.group_id}: its requests must share one prompt"
        groups[-1].waiting.append(index)
    return groups
