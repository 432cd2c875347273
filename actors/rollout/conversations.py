"""The conversations of one call with an environment: text outside, tokens inside.

    engine --Turn--> hear --reply as text--> environment.step, in a thread of its own
    engine <--Answer-- answers <--line, encoded once and appended--'

consumes    turns of the engine, and the environment's answers to them
waits for   the environment, at most `timeout_s` for each answer
unblocked   by the answer or the deadline; a conversation that answers too late is closed then

What was said is never encoded again: a line of the environment is encoded when it is said, and its tokens are appended.
Turns that end together share a call of the environment, so an exception or a missed deadline fails all of them. The
worker therefore has each of these conversations again `alone`, in calls of its own: what fails then does not depend on
its neighbours. An environment that breaks its contract raises, which ends the run.

Left out: the weights and the sampling of tokens (the engine), and how a conversation becomes a row (worker.py).
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from actors.engine.protocol import Answer, Turn
from actors.models.text import TextCodec
from actors.reward.scoring import what_went_wrong

log = logging.getLogger(__name__)

End = Literal["", "terminated", "truncated", "max_turns", "no_room", "failed"]
"""Why a conversation is over.

terminated: by the environment's own rules. truncated: the environment cut it off. max_turns: it has had as many turns
as it may. no_room: the model's context is full. failed: the environment has failed. "": it goes on.
"""
UNFINISHED: tuple[End, ...] = ("truncated", "max_turns")  # what would follow has a value
_SOON_S = 0.002  # an engine that has other work waits so long for an answer: most environments only compute


class EnvironmentTurn(Protocol):
    """The environment's answer to a reply; the fields of `pipeline.environments.environment.Turn` that are used."""

    @property
    def text(self) -> str: ...

    @property
    def reward(self) -> float: ...

    @property
    def terminated(self) -> bool: ...

    @property
    def truncated(self) -> bool: ...

    @property
    def options(self) -> Sequence[str]: ...

    @property
    def info(self) -> Mapping[str, Any]: ...

    @property
    def failure(self) -> str: ...

    @property
    def over(self) -> bool: ...


class Environment(Protocol):
    """The other side of many conversations. Different conversations may be stepped by several threads at once."""

    def reset(
        self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], seeds: Sequence[int]
    ) -> tuple[Sequence[Any], Sequence[EnvironmentTurn]]:
        """Begin a conversation for each prompt; returns the episodes and the opening turn of each."""
        ...

    def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> Sequence[EnvironmentTurn]:
        """Answer one reply in each of these conversations."""
        ...

    def close(self, episodes: Sequence[Any]) -> None:
        """Release what these conversations hold."""
        ...

    def continuation(self, line: str) -> str:
        """The text that follows a reply of the model: this line with its role markers, up to the next reply."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a conversation begins with. seed: of all the environment's chance in it."""

    prompt: str
    metadata: dict[str, Any]
    seed: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Conversation:
    opening: Opening
    episode: Any = None
    line: str = ""  # of the environment, before the first reply
    offers: Sequence[str] = ()  # options for the next reply
    turns: list[dict[str, Any]] = field(default_factory=list)
    end: End = ""
    failure: str = ""
    deadline: float = math.inf  # of the answer that is waited for, if one is
    is_busy: bool = False  # a thread is in a call of the environment
    is_left: bool = False  # nobody waits for it any more: the thread that is busy with it closes it
    is_closed: bool = False

    @property
    def is_waiting(self) -> bool:
        return self.deadline < math.inf


class Conversations:
    """The partner of an engine in one call of `generate`; see the module. To be closed however the call ends."""

    def __init__(
        self,
        environment: Environment,
        codec: TextCodec,
        *,
        max_turns: int,
        timeout_s: float,
        has_manager: bool = False,
        alone: bool = False,
    ) -> None:
        """max_turns: most replies in a conversation. timeout_s: deadline of each answer of the environment.

        alone: no call of the environment is shared by two conversations.
        has_manager: a manager chooses an option before each reply. It judges what was broken off, by the features after
        the last line; without it the critic does, which needs one more token there.
        """
        self._environment, self._codec = environment, codec
        self._max_turns, self._timeout_s, self._has_manager, self._alone = max_turns, timeout_s, has_manager, alone
        self._conversations: dict[int, _Conversation] = {}
        self._replies: dict[int, Turn] = {}  # that are not answered yet
        self._heard: queue.SimpleQueue[tuple[Sequence[int], Sequence[EnvironmentTurn] | BaseException]]
        self._heard = queue.SimpleQueue()
        self._called = -math.inf  # when the environment was called last
        self._lock = threading.Lock()  # of is_busy, is_left and is_closed

    def begin(self, openings: Mapping[int, Opening]) -> dict[int, npt.NDArray[np.int32]]:
        """Begin conversations; returns the tokens of each opening line, which may be none, by sample id.

        A conversation that failed to begin is left out; `record` says why. Raises ContractError for an environment that
        breaks its contract.
        """
        own = {sample: _Conversation(opening=opening) for sample, opening in openings.items()}
        self._conversations |= own
        self._call(list(own), self._reset)
        lines: dict[int, str] = {}
        while any(conversation.is_waiting for conversation in own.values()):
            for sample, said in self._receive(wait=True).items():
                if not self._has_failed(own[sample], said):
                    own[sample].offers, own[sample].line = said.options, said.text
                    lines[sample] = self._environment.continuation(said.text) if said.text else ""
        return self._encoded(lines)

    def hear(self, turns: Sequence[Turn]) -> None:
        """Pass these replies on to the environment; returns at once."""
        replies = self._codec.decode_replies([turn.tokens for turn in turns])
        self._replies |= {turn.sample_id: turn for turn in turns}
        said = {turn.sample_id: reply for turn, reply in zip(turns, replies, strict=True)}

        def step(samples: Sequence[int]) -> Sequence[EnvironmentTurn]:
            episodes = [self._conversations[sample].episode for sample in samples]
            return self._environment.step(episodes, [said[sample] for sample in samples])

        self._call(list(said), step)

    def answers(self, *, wait: bool) -> list[Answer]:
        """The environment's answers that are new; see `Partner`."""
        heard = self._receive(wait=wait)
        turns = {sample: self._replies.pop(sample) for sample in heard}
        for sample, said in heard.items():
            self._note(self._conversations[sample], turns[sample], said)
        lines = {
            sample: self._environment.continuation(said.text)
            for sample, said in heard.items()
            if self._conversations[sample].end in ("", *UNFINISHED)
        }
        tokens = self._encoded(lines)
        answers = [self._answer(turns[sample], tokens.get(sample)) for sample in heard]
        if over := [c for sample in heard if (c := self._conversations[sample]).end]:
            threading.Thread(target=self._release, args=(over,), daemon=True).start()  # closing may take long
        return answers

    def fail(self, sample_id: int, failure: str) -> None:
        """Give up a conversation that cannot be had."""
        self._conversations[sample_id].end, self._conversations[sample_id].failure = "failed", failure

    def has_failed(self, sample_id: int) -> bool:
        """Whether the environment failed in this conversation."""
        return self._conversations[sample_id].end == "failed"

    def offers(self, sample_id: int) -> Sequence[str]:
        """The options on offer for the next reply of a conversation; none: all."""
        return self._conversations[sample_id].offers

    def record(self, sample_id: int) -> dict[str, Any]:
        """What the environment said in a conversation, as JSON values: what `metadata` has as "conversation"."""
        conversation = self._conversations[sample_id]
        return {
            "opening": conversation.line,
            "turns": conversation.turns,
            "end": conversation.end,
            "failure": conversation.failure,
        }

    def close(self) -> None:
        """Close every conversation that is still open; one that the environment is busy with is closed afterwards."""
        self._release(self._conversations.values())

    def _reset(self, samples: Sequence[int]) -> Sequence[EnvironmentTurn]:
        own = [self._conversations[sample] for sample in samples]
        openings = [conversation.opening for conversation in own]
        episodes, turns = self._environment.reset(
            [opening.prompt for opening in openings],
            [opening.metadata for opening in openings],
            [opening.seed for opening in openings],
        )
        for conversation, episode in zip(own, episodes, strict=True):
            conversation.episode = episode
        return turns

    def _call(self, samples: Sequence[int], call: Callable[[Sequence[int]], Sequence[EnvironmentTurn]]) -> None:
        """Call the environment in a thread, or in one for each conversation; what comes of it is received later."""
        for part in [[sample] for sample in samples] if self._alone else [samples]:
            self._call_together(part, call)

    def _call_together(
        self, samples: Sequence[int], call: Callable[[Sequence[int]], Sequence[EnvironmentTurn]]
    ) -> None:
        own = [self._conversations[sample] for sample in samples]
        self._called = time.monotonic()
        for conversation in own:
            conversation.deadline, conversation.is_busy = self._called + self._timeout_s, True

        def run() -> None:
            turns: Sequence[EnvironmentTurn] | BaseException
            try:
                turns = call(samples)
                over = [conversation for conversation, turn in zip(own, turns, strict=True) if turn.over]
            except BaseException as error:  # noqa: BLE001  raised again by who waits
                turns, over = error, []
            with self._lock:
                for conversation in own:
                    conversation.is_busy = False
            self._heard.put((samples, turns))  # before what may hang
            self._release([*over, *(conversation for conversation in own if conversation.is_left)])

        threading.Thread(target=run, daemon=True, name="environment").start()

    def _receive(self, *, wait: bool) -> dict[int, EnvironmentTurn]:
        """What was said since, by sample id; a conversation whose deadline is over gets a failure instead.

        wait: wait for at least one. Otherwise wait only as long as an environment that just computes may take.
        """
        found: dict[int, EnvironmentTurn] = {}
        while not found:
            deadline = min((c.deadline for c in self._conversations.values()), default=math.inf)
            if deadline == math.inf:
                break
            until = deadline if wait else min(deadline, self._called + _SOON_S)
            found = self._within(max(until - time.monotonic(), 0))
            if not wait:
                break
        return found

    def _within(self, seconds: float) -> dict[int, EnvironmentTurn]:
        found: dict[int, EnvironmentTurn] = {}
        try:
            samples, turns = self._heard.get(timeout=seconds) if seconds else self._heard.get_nowait()
            while True:
                if isinstance(turns, BaseException):
                    raise turns
                for sample, turn in zip(samples, turns, strict=True):
                    if self._conversations[sample].is_waiting:  # else it is too late, and was given up
                        found[sample] = turn
                        self._conversations[sample].deadline = math.inf
                samples, turns = self._heard.get_nowait()
        except queue.Empty:
            pass
        now = time.monotonic()
        late = [sample for sample, c in self._conversations.items() if c.deadline <= now]
        for sample in late:
            self._conversations[sample].deadline = math.inf
            found[sample] = _Silence(failure=f"timeout: no answer within {self._timeout_s:g} s")
        return found

    def _note(self, conversation: _Conversation, turn: Turn, said: EnvironmentTurn) -> None:
        if self._has_failed(conversation, said):
            return
        conversation.offers = said.options
        conversation.turns.append({"reward": float(said.reward), "line": said.text, "info": dict(said.info)})
        if said.terminated:
            conversation.end = "terminated"
        elif said.truncated:
            conversation.end = "truncated"
        elif turn.number + 1 >= self._max_turns:
            conversation.end = "max_turns"

    def _has_failed(self, conversation: _Conversation, said: EnvironmentTurn) -> bool:
        if said.failure:
            conversation.end, conversation.failure = "failed", said.failure
        return bool(said.failure)

    def _answer(self, turn: Turn, tokens: npt.NDArray[np.int32] | None) -> Answer:
        """tokens: of what the environment said; None where nothing more belongs into the conversation."""
        conversation = self._conversations[turn.sample_id]
        if tokens is not None and len(tokens) > turn.room:
            conversation.end = "no_room"
        elif tokens is not None and conversation.end in UNFINISHED and not self._has_manager:
            # so that the state before the reply that would follow is one that the critic can be asked about
            tokens = np.append(tokens, np.int32(self._codec.tokenizer.eos_token_id))
        if tokens is not None and len(tokens) and turn.finish == "stop" and tokens[0] == turn.tokens[-1]:
            tokens = tokens[1:]  # a layout begins with the end of the reply, which the policy has said itself
        return Answer(sample_id=turn.sample_id, tokens=tokens, is_last=conversation.end in UNFINISHED)

    def _encoded(self, texts: Mapping[int, str]) -> dict[int, npt.NDArray[np.int32]]:
        tokens = self._codec.encode_continuations(list(texts.values()))
        return {sample: np.array(ids, np.int32) for sample, ids in zip(texts, tokens, strict=True)}

    def _release(self, conversations: Iterable[_Conversation]) -> None:
        """Close these conversations, each once; what is busy is closed by the thread that is busy with it."""
        with self._lock:
            ready = [c for c in dict.fromkeys(conversations) if not (c.is_closed or c.is_busy)]
            for conversation in conversations:
                conversation.is_left = True
            for conversation in ready:
                conversation.is_closed = True
        for conversation in ready:
            try:
                if conversation.episode is not None:
                    self._environment.close([conversation.episode])
            except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code; the others are still to be closed
                log.warning("a conversation could not be closed: %s", what_went_wrong(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Silence:
    """The turn of an environment that has not answered."""

    failure: str
    text: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    options: Sequence[str] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    over: bool = True
