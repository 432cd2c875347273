"""Partners, who talk with the policy, and the conversations that they are part of.

A partner only says the next line; a judge gives the reward; `PartnerConversation` joins the two. So a partner (a
script, a search in real dialogues, a language model) can be replaced without changing the reward.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import log, sqrt
from random import Random
from typing import Any, Protocol, runtime_checkable

from pipeline.environments.environment import Turn
from pipeline.environments.lockstep import Lockstep
from pipeline.tasks.task import PromptText

Judge = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
"""A reward function like the pipeline's: (prompts, replies, metadata) to one number for each reply."""
_WORD = re.compile(r"\w+")


@runtime_checkable
class Partner(Protocol):
    """Says the next line of a conversation; it keeps no state between calls, and uses only its arguments."""

    def reply(self, lines: Sequence[str], random: Random) -> str | None:
        """The answer to the last of these lines, or None to end the conversation.

        lines: the lines since the prompt, alternately the policy's and the partner's; the first and the last are the
        policy's. random: the conversation's random numbers; all chance must come from them.
        """
        ...


class ScriptedPartner:
    """Says the lines of a script one after the other, whatever the policy says, and leaves at the script's end."""

    def __init__(self, script: Sequence[str]) -> None:
        self._script = tuple(script)

    def reply(self, lines: Sequence[str], random: Random) -> str | None:
        said = len(lines) // 2
        return self._script[said] if said < len(self._script) else None


class RetrievalPartner:
    """Answers with the recorded answer to the most similar line; it never repeats one, and leaves when none is left.

    Similarity is the cosine of word counts, weighted by log(1 + N / number of lines that have the word), with N lines
    in all. One of several equally similar lines is drawn by chance.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        """pairs: (line, the answer to it). Raises ValueError if there is none."""
        if not pairs:
            raise ValueError("pairs: must be at least one line with its answer, got none")
        self._answers = [answer for _, answer in pairs]
        counts = [_counts(line) for line, _ in pairs]
        spread = Counter(word for words in counts for word in words)
        self._weights = {word: log(1 + len(counts) / lines) for word, lines in spread.items()}
        self._vectors = [self._unit(words) for words in counts]

    def reply(self, lines: Sequence[str], random: Random) -> str | None:
        heard, said = self._unit(_counts(lines[-1])), set(lines[1::2])
        closeness = {
            place: sum(weight * heard.get(word, 0.0) for word, weight in vector.items())
            for place, vector in enumerate(self._vectors)
            if self._answers[place] not in said
        }
        if not closeness:
            return None
        closest = max(closeness.values())
        return self._answers[random.choice([place for place, close in closeness.items() if close == closest])]

    def _unit(self, counts: Counter[str]) -> dict[str, float]:
        vector = {word: count * self._weights.get(word, 0.0) for word, count in counts.items()}
        length = sqrt(sum(weight * weight for weight in vector.values())) or 1.0
        return {word: weight / length for word, weight in vector.items()}


class PartnerConversation:
    """One conversation with a partner, in which each reply gets its own reward from the judge.

    It is terminated when the partner leaves, and truncated after `max_replies` replies of the policy.
    """

    def __init__(self, partner: Partner, judge: Judge, max_replies: int = 8) -> None:
        """judge: gets the prompt followed by all lines so far, one to a line; the reply; and the prompt's metadata."""
        self._partner, self._judge, self._max_replies = partner, judge, max_replies
        self._lines: list[str] = []

    def begin(self, prompt: PromptText, seed: int) -> Turn:
        """An empty turn: nothing is added to the prompt, and the policy speaks first."""
        self._prompt, self._random = prompt, Random(seed)
        return Turn()

    def answer(self, reply: str) -> Turn:
        """The partner's next line, with the judge's reward of the reply."""
        said = "\n".join([self._prompt.text, *self._lines])
        [score] = self._judge([said], [reply], [self._prompt.metadata])
        self._lines.append(reply)
        line = self._partner.reply(tuple(self._lines), self._random)
        if line is None:
            return Turn(reward=float(score), terminated=True)
        self._lines.append(line)
        return Turn(text=line, reward=float(score), truncated=len(self._lines) // 2 >= self._max_replies)

    def close(self) -> None:
        """It holds nothing."""


def partner_environment(
    partner: Partner, judge: Judge, max_replies: int = 8, timeout_s: float | None = None
) -> Lockstep:
    """An environment of conversations with a partner.

    timeout_s: seconds that the partner and the judge may take for a reply; None for a partner that only computes.
    """
    if max_replies < 1:
        raise ValueError(f"max_replies: must be >= 1, got {max_replies}")
    return Lockstep(lambda: PartnerConversation(partner, judge, max_replies), timeout_s)


def _counts(line: str) -> Counter[str]:
    return Counter(_WORD.findall(line.lower()))
