"""A task and environments of conversations, named by import path, for runs with an untrained model of bytes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from forked_workers import FOLDER
from pipeline.environments.environment import Turn
from pipeline.tasks.task import Demonstration, PromptText, Split

OPENINGS = ("Hello", "Who is there?", "Listen", "What now", "Ah", "Tell me", "So", "No")


class Chatter:
    """Openings; each is a row with its own number in the metadata."""

    name = "chatter"
    reward = ""

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        raise AssertionError("runs of this task begin with a model")

    def demonstrations(self, split: Split) -> list[Demonstration]:
        return []

    def prompts(self, split: Split) -> list[PromptText]:
        return [PromptText(text=text, metadata={"row": row}) for row, text in enumerate(OPENINGS)]

    def layout(self, line: str) -> str:
        return f"[{line}]"


class Mirror:
    """Says each reply backwards, for one to four turns, as the row says; the more vowels, the better."""

    pause_s = 0.002

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[list[Any], list[Turn]]:
        rows = [int(prompt.metadata["row"]) for prompt in prompts]
        return [{"row": row, "turns": 0, "length": 1 + row % 4} for row in rows], [Turn()] * len(rows)

    def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
        time.sleep(self.pause_s)
        return [self.turn(episode, reply) for episode, reply in zip(episodes, replies, strict=True)]

    def turn(self, episode: Any, reply: str) -> Turn:
        episode["turns"] += 1
        return Turn(
            text=reply[::-1],
            reward=sum(letter in "aeiou" for letter in reply.lower()) / 4 - 0.125,
            terminated=episode["turns"] == episode["length"],
            info={"letters": len(reply)},
        )

    def close(self, episodes: Sequence[Any]) -> None:
        """It holds nothing."""


class Picky(Mirror):
    """The same, with other options on offer in each turn: all three, two of them, one."""

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[list[Any], list[Turn]]:
        episodes, turns = super().reset(prompts, seeds)
        return episodes, [replace(turn, options=self.offer(0)) for turn in turns]

    def turn(self, episode: Any, reply: str) -> Turn:
        return replace(super().turn(episode, reply), options=self.offer(episode["turns"]))

    def offer(self, turn: int) -> tuple[str, ...]:
        return ("soft", "loud", "short")[turn % 3 :]


def held() -> Path:
    """A folder that tests and Ray's workers know: while it is there, `Held` waits in it."""
    return Path(os.environ[FOLDER], "held")


class Held(Mirror):
    """The same, but it waits in a second turn while it is told to, so that a process can be killed in the middle of
    conversations, however fast the machine is.
    """

    def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
        while held().is_dir() and any(episode["turns"] for episode in episodes):
            with suppress(OSError):  # it was let go this very moment
                (held() / "waits").touch()
            time.sleep(0.02)
        return super().step(episodes, replies)


class Deadly(Mirror):
    """Kills its process in the second turn of one row."""

    def turn(self, episode: Any, reply: str) -> Turn:
        if (episode["row"], episode["turns"]) == (3, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().turn(episode, reply)


class Broken(Mirror):
    """Raises in one row, always."""

    def turn(self, episode: Any, reply: str) -> Turn:
        if episode["row"] == 5:
            return Turn(failure="error: the partner has no answer")
        return super().turn(episode, reply)


def is_loud(options: list[str], replies: list[str]) -> list[float]:
    """A check: a loud reply has a capital letter, any other has none."""
    return [
        float((option == "loud") == any(letter.isupper() for letter in reply))
        for option, reply in zip(options, replies, strict=True)
    ]
