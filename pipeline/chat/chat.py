"""The chat: one conversation with each model of a run, in lockstep, told as events while it happens.

    line, /prompt, /again --Chat--> Option, Piece ..., End, Score ... of each side, and the partner's lines

Both sides get the same prompt, seed and sample id. Where the run has an environment, its partner answers each side on
its own; a person who types a line in the middle plays the partner from then on. Left out: screens
(terminal.py, web.py).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from actors.config import RewardConfig, SamplingConfig
from actors.reward.scoring import Scoring, what_went_wrong
from actors.reward.worker import RewardFunction, user_code
from pipeline.chat.side import Ids, Reply, Side
from pipeline.environments.served import ServedEnvironment
from pipeline.tasks.task import Task

Kind = Literal["prompt", "option", "piece", "end", "score", "partner", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened. side: of which model, "" for both.

    prompt: the conversation begins with `text`. option: the manager chose `text`. piece: more of the reply. end: the
    reply is over; text: "" or why it was cut off. score: `text` is the judge, `value` its reward, None if it failed
    for the reason in `detail`. partner: the partner said `text`. note: a remark for the person.
    """

    kind: Kind
    side: str = ""
    text: str = ""
    value: float | None = None
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What scores a reply: the reward model, or the exact rule of the task."""

    name: str
    function: RewardFunction
    config: RewardConfig


@dataclass(slots=True, kw_only=True)
class Chat:
    """A chat with the models of one run. prompts: held-out ones, (tokens, metadata) each."""

    task: Task
    sides: Sequence[Side]
    judges: Sequence[Judge]
    prompts: Sequence[tuple[Ids, Mapping[str, Any]]]
    environment: ServedEnvironment | None
    sampling: SamplingConfig
    max_turns: int
    seed: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    drawn: int = 0  # replies asked for so far: each gets its own random numbers
    luck: random.Random = field(init=False)
    is_open: bool = False  # a conversation has begun
    is_played: bool = False  # a person is the partner
    chance: int = 0  # the environment's seed in this conversation

    def __post_init__(self) -> None:
        self.luck = random.Random(self.seed)

    def say(self, line: str) -> Iterator[Event]:
        """A line of the person: the partner's next line in an open conversation, else a prompt of its own."""
        with user_code(f"task: must lay out a line that a person types, got {self.task.name!r}"):
            layout = self.task.layout(line) if self.environment is None or not self.is_open else ""
        if layout:
            [tokens] = self.sides[0].codec.encode_prompts([layout])
            yield from self._open(tokens, {})
        else:
            self._play(line)
        yield from self._answers()

    def prompt(self) -> Iterator[Event]:
        """Begin a new conversation with a random held-out prompt."""
        tokens, metadata = self.prompts[self.luck.randrange(len(self.prompts))]
        yield from self._open(tokens, metadata)
        yield from self._answers()

    def go_on(self) -> Iterator[Event]:
        """The models reply to what the environment's partner said last; without a conversation, begin one."""
        if not self.is_open or self.environment is None:
            yield from self.prompt()
        else:
            yield from self._answers()

    def again(self) -> Iterator[Event]:
        """Sample the last replies again, with other random numbers."""
        if not any(side.replies for side in self.sides):
            yield Event(kind="note", text="nothing was said yet; type a line, or /prompt")
            return
        for side in self.sides:
            if side.replies:
                side.take_back()
        if self.environment is not None and not self.is_played:
            yield from self._begin_episodes(again=True)
        yield from self._answers()

    def reset(self) -> Iterator[Event]:
        """End the conversation."""
        self._close()
        for side in self.sides:
            side.begin([])
        self.is_open = self.is_played = False
        yield Event(kind="note", text="a new conversation")

    def _open(self, tokens: Ids, metadata: Mapping[str, Any]) -> Iterator[Event]:
        self._close()
        for side in self.sides:
            side.begin(tokens)
        self.metadata, self.is_open, self.is_played = metadata, True, False
        self.chance = self.luck.randrange(2**31)
        [text] = self.sides[0].codec.decode_prompts([tokens], special=False)
        yield Event(kind="prompt", text=text.strip())
        if self.environment is not None:
            yield from self._begin_episodes(again=False)

    def _begin_episodes(self, *, again: bool) -> Iterator[Event]:
        """Begin the environment's side of each conversation. again: it hears the replies so far once more.

        Environments are repeatable, so it says the same as before, which is in the tokens already.
        """
        assert self.environment is not None
        self._close()
        for side in self.sides:
            first = side.replies[0].begun_at if again and side.replies else len(side.tokens)
            [text] = side.codec.decode_prompts([side.tokens[:first]])
            [side.episode], [turn] = self.environment.reset([text], [dict(self.metadata)], [self.chance])
            if turn.failure:
                yield Event(kind="note", side=side.name, text=f"the environment cannot go on from here: {turn.failure}")
                side.episode = None
                continue
            if turn.text and not again:
                side.hear(self.environment.continuation(turn.text))
                yield Event(kind="partner", side=side.name, text=turn.text)
            side.offered = turn.options
            for reply in side.replies if again else ():
                [turn] = self.environment.step([side.episode], [reply.text])
                side.offered = turn.options

    def _play(self, line: str) -> None:
        """The person says the partner's next line; the environment knows nothing of it, so it has ended."""
        assert self.environment is not None
        self._close()
        self.is_played = True
        text = self.environment.continuation(line)
        for side in self.sides:
            if side.replies:  # what the environment answered last is replaced by the person's line
                last = side.replies[-1]
                del side.tokens[len(last.context) + len(last.tokens) :]
            side.is_over, side.offered = False, ()
            side.hear(text)

    def _answers(self) -> Iterator[Event]:
        """A reply of each side, a token of each in turn; then scores, and what the partner says."""
        self.drawn += 1
        speaking = []
        for side in self.sides:
            if side.is_over:
                yield Event(
                    kind="note", side=side.name, text="this conversation is over; /prompt or /reset begins another"
                )
            else:
                speaking.append((side, side.reply(self.sampling, seed=self.seed, sample_id=self.drawn)))
        before = {side.name: len(side.replies) for side, _ in speaking}
        running, first = list(speaking), {side.name for side, _ in speaking}
        try:
            while running:
                for one in list(running):
                    side, pieces = one
                    try:
                        text = next(pieces)
                    except StopIteration:
                        running.remove(one)
                        yield Event(kind="end", side=side.name, text=self._cut(side.replies[-1]))
                        continue
                    except (ValueError, FloatingPointError) as error:
                        running.remove(one)
                        side.is_over = True
                        yield Event(kind="note", side=side.name, text=str(error))
                        continue
                    kind: Kind = "option" if side.name in first else "piece"
                    first.discard(side.name)
                    if text:
                        yield Event(kind=kind, side=side.name, text=text)
        finally:
            for _, pieces in speaking:
                pieces.close()
        for side, _ in speaking:
            if len(side.replies) > before[side.name]:
                yield from self._scores(side)
                yield from self._partner(side)

    def _cut(self, reply: Reply) -> str:
        if reply.has_ended:
            return ""
        return "" if self.sampling.stop else f"cut off after {len(reply.tokens)} tokens"

    def _scores(self, side: Side) -> Iterator[Event]:
        reply = side.replies[-1]
        [prompt] = side.codec.decode_prompts([reply.context])
        for judge in self.judges:
            scoring = Scoring(judge.function, judge.config, time.monotonic(), math.inf)
            try:
                [(reward, status, detail)] = scoring.batch([(prompt, reply.text, dict(self.metadata))])
            except ValueError as error:
                reward, status, detail = math.nan, "error", str(error)
            good = status == "ok"
            yield Event(
                kind="score",
                side=side.name,
                text=judge.name,
                value=reward if good else None,
                detail="" if good else f"{status}: {detail}",
            )

    def _partner(self, side: Side) -> Iterator[Event]:
        """The environment's reward of the last reply, and its answer."""
        if self.environment is None or self.is_played or side.episode is None:
            return
        [turn] = self.environment.step([side.episode], [side.replies[-1].text])
        if turn.failure:
            side.is_over = True
            yield Event(kind="score", side=side.name, text="environment", detail=turn.failure)
            return
        yield Event(kind="score", side=side.name, text="environment", value=float(turn.reward))
        note = f" ({turn.info['note']})" if "note" in turn.info else ""
        if turn.text:
            yield Event(kind="partner", side=side.name, text=f"{turn.text}{note}")
        side.offered = turn.options
        side.is_over = turn.over or len(side.replies) >= self.max_turns
        if side.is_over:
            yield Event(kind="note", side=side.name, text="the conversation is over")
        else:
            side.hear(self.environment.continuation(turn.text))

    def _close(self) -> None:
        """Release the environment's conversations."""
        for side in self.sides:
            if side.episode is not None and self.environment is not None:
                episode, side.episode = side.episode, None
                try:
                    self.environment.close([episode])
                except Exception as error:
                    raise ValueError(
                        f"environment: must be able to close, but it raised {what_went_wrong(error)}"
                    ) from error
