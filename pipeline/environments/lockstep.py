"""An environment made of single conversations, so that a user need only write one conversation.

If there is a deadline, each conversation answers in its own thread. A slow conversation then delays the others until
the deadline at most. An exception or a missed deadline is a failure of that conversation alone.

    consumes   replies, in the caller's thread
    waits for  all conversations of a call, at most `timeout_s`
    unblocked  by their answers, or the deadline; a late conversation keeps its thread, and is closed when it answers
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from actors.reward.scoring import what_went_wrong
from pipeline.environments.environment import Conversation, Turn
from pipeline.tasks.task import PromptText

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Seat:
    """A conversation in an environment. over: no reply may follow. closed: the caller has released it."""

    conversation: Conversation | None = None  # until it begins
    over: bool = False
    closed: bool = False
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _released: bool = False

    def take(self, call: Callable[[], Turn]) -> Turn:
        """Call the conversation and return its turn; an exception becomes a turn with a failure."""
        with self._busy:
            try:
                turn = call() if not self.closed else Turn(failure="error: given up before it began")
            except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code; it becomes a status
                turn = Turn(failure=f"error: {what_went_wrong(error)}")
        if self.closed:  # the caller gave it up while it was busy
            self._release()
        return turn

    def close(self) -> None:
        """Release the conversation, now or as soon as it answers."""
        self.over = self.closed = True
        self._release()

    def _release(self) -> None:
        """Close the conversation once; if it is busy, the thread that is busy with it closes it later."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            if self.conversation is not None and not self._released:
                self._released = True
                self.conversation.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code; the others are still to be closed
            log.warning("a conversation could not be closed: %s", what_went_wrong(error))
        finally:
            self._busy.release()


class Lockstep:
    """An environment that keeps one `Conversation` object for each episode."""

    def __init__(self, make: Callable[[], Conversation], timeout_s: float | None = None) -> None:
        """make: makes a conversation; called once for each episode.

        timeout_s: seconds that a conversation may take to begin or to answer. None, for conversations that only
        compute: they are called one after the other, without threads.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s: must be above 0, got {timeout_s}; None sets no deadline")
        self._make = make
        self._timeout_s = timeout_s

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[list[Seat], list[Turn]]:
        """Begin a conversation for each prompt."""
        seats = [Seat() for _ in prompts]
        calls = [partial(self._begin, *beginning) for beginning in zip(seats, prompts, seeds, strict=True)]
        return seats, self._turns(seats, calls)

    def step(self, episodes: Sequence[Seat], replies: Sequence[str]) -> list[Turn]:
        """Answer one reply in each conversation. Raises ValueError for a conversation that is over."""
        for place, seat in enumerate(episodes):
            if seat.over:
                raise ValueError(f"step: a conversation must not be over, got one that is at place {place}")
        conversations = [seat.conversation for seat in episodes if seat.conversation is not None]
        calls = [partial(talk.answer, reply) for talk, reply in zip(conversations, replies, strict=True)]
        return self._turns(episodes, calls)

    def close(self, episodes: Sequence[Seat]) -> None:
        """Close these conversations."""
        for seat in episodes:
            seat.close()

    def _begin(self, seat: Seat, prompt: PromptText, seed: int) -> Turn:
        seat.conversation = self._make()
        return seat.conversation.begin(prompt, seed)

    def _turns(self, seats: Sequence[Seat], calls: Sequence[Callable[[], Turn]]) -> list[Turn]:
        if self._timeout_s is None:
            turns = [seat.take(call) for seat, call in zip(seats, calls, strict=True)]
        else:
            turns = _at_once(seats, calls, self._timeout_s)
        for seat, turn in zip(seats, turns, strict=True):
            seat.over = turn.over
        return turns


def _at_once(seats: Sequence[Seat], calls: Sequence[Callable[[], Turn]], timeout_s: float) -> list[Turn]:
    answers: dict[int, Turn] = {}

    def take(place: int) -> None:
        answers[place] = seats[place].take(calls[place])

    threads = [threading.Thread(target=take, args=(place,), daemon=True) for place in range(len(seats))]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    silent = Turn(failure=f"timeout: no answer within {timeout_s:g} s")
    return [answers.get(place, silent) for place in range(len(seats))]
