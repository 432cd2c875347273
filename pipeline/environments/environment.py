"""The protocol of an environment: the other side of conversations, which answers the policy and rewards its replies.

    episodes, turns = environment.reset(prompts, seeds)     n conversations begin
    turns = environment.step(episodes, replies)             some of them get a reply each, and answer with a turn
    environment.close(episodes)                             each conversation is released, however it ended

An environment takes and returns text, never tokens: the caller encodes each line once and appends it. A prompt is the
conversation so far, as the model reads it; it comes from a task. A turn's text is the bare line, without role markers.
One call serves many conversations, but any of them may be stepped without the others, so that none waits for a slow
one.

Different conversations may be stepped by several threads at once, since a slow answer must not hold up the others.

An environment must be repeatable: the same prompt, seed and replies give the same turns, whatever other calls come in
between and in whatever order. All samples of one prompt begin in the same state; a seed decides what happens later.

Left out: tokens, role templates, retries. They belong to the caller that runs the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pipeline.tasks.task import PromptText

Episode = Any
"""A conversation that has begun: any object by which the environment recognises it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The environment's answer to one reply, or its opening from `reset`.

    text:       what the environment says next; it is appended to the reply, or to the prompt. May be empty.
    reward:     reward of the reply before it; 0 in the turn of `reset`.
    terminated: the conversation is over by the environment's own rules; the value of what follows is 0.
    truncated:  the conversation was cut off from outside, such as by a limit; what would follow still has a value.
    options:    the sub-tasks that a high-level policy may choose from for the next reply; empty: no hierarchy.
    info:       JSON values for metrics and logs; nothing is trained on them. Numbers have a mean in the metrics; "note"
                is shown after the line in evaluations, and "subtask" is what the reply before it carried out.
    failure:    why the environment failed, or ""; it may begin with "error: " or "timeout: ". A failed conversation has
                no reward, and is not trained on.

    Example, a turn without a reward: Turn(text="Hm. My exam went badly.", options=("comfort", "ask")).
    """

    text: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    options: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def over(self) -> bool:
        """Whether no reply can follow."""
        return self.terminated or self.truncated or bool(self.failure)


@runtime_checkable
class Environment(Protocol):
    """The other side of many conversations; a recipe names its class, or a function without arguments that makes it.

    One more method is optional: `load()`, called once in each worker before the first conversation, and outside every
    deadline, to load what is large.
    """

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[Sequence[Episode], Sequence[Turn]]:
        """Begin a conversation for each prompt; returns the episodes and the opening turn of each.

        seeds: one for each conversation; all chance in a conversation must come from its seed alone. Raises ValueError
        for a prompt that it cannot continue.
        """
        ...

    def step(self, episodes: Sequence[Episode], replies: Sequence[str]) -> Sequence[Turn]:
        """Answer one reply in each of these conversations, none of which is over; the turns are in the same order."""
        ...

    def close(self, episodes: Sequence[Episode]) -> None:
        """Release what these conversations hold; called once for each, even for one that is not over."""
        ...


class Conversation(Protocol):
    """The other side of one conversation; `Lockstep` makes an environment of many."""

    def begin(self, prompt: PromptText, seed: int) -> Turn:
        """The turn before the first reply."""
        ...

    def answer(self, reply: str) -> Turn:
        """The turn after a reply."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...
