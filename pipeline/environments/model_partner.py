"""A language model as partner: frozen, on an engine of its own, with one call of it for many conversations.

    policy --reply--> ModelPartner --text, from the partner's side--> PartnerModel --line--> policy

The partner keeps the weights it began with, whatever the policy learns; their checksum stands with each of its lines.
A line depends on (weights, prompt, seed, replies) alone. It is sampled with the recipe's `sampling`: the same
temperature, longest line and stop strings as the policy's replies.

    it has nothing to say             terminated: the partner has left
    its context is full               truncated, since what would follow still has a value
    it fails                          a failure, of that conversation alone

The reward comes from `[reward]`, which judges the whole conversation, or from a class of yours with a method `reward`:

    class Grateful(ModelPartner):
        def reward(self, prompt, lines):
            return float("thank" in lines[-1].lower())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from actors.config import RolloutConfig, SamplingConfig
from actors.rollout.partner_model import Line, PartnerModel
from pipeline.environments.environment import Turn
from pipeline.environments.partner_view import Marks, PartnerView
from pipeline.tasks.task import PromptText


@dataclass(frozen=True, slots=True, kw_only=True)
class PartnerSpec:
    """What a partner is made of.

    path: folder or hub name of a causal LM with its tokenizer. marks: around its lines in the policy's text. sampling:
    of its lines. rollout: slots, dtype and device of its engine.
    """

    path: str
    marks: Marks = field(default_factory=Marks)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(slots=True, kw_only=True, eq=False)
class Talk:
    """A conversation with the partner. lines: since the prompt, alternately the policy's and the partner's."""

    prompt: PromptText
    seed: int
    lines: list[str] = field(default_factory=list)


class ModelPartner:
    """The environment; a class of yours may override `reward`."""

    def __init__(self, spec: PartnerSpec) -> None:
        """Reads nothing yet."""
        self._spec = spec

    def reward(self, prompt: PromptText, lines: Sequence[str]) -> float:
        """The reward of the policy's last reply; here 0, since `[reward]` judges.

        lines: since the prompt, alternately the policy's and the partner's. The last is the partner's answer to the
        reply; it is empty where the partner has left.
        """
        return 0.0

    def load(self) -> None:
        """Load the partner's weights. Raises ValueError when there are none."""
        self._model.load()

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[list[Talk], list[Turn]]:
        """Begin a conversation for each prompt: its last line is the partner's, and the policy speaks first."""
        talks = [Talk(prompt=prompt, seed=seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return talks, [self._opening(talk) for talk in talks]

    def step(self, episodes: Sequence[Talk], replies: Sequence[str]) -> list[Turn]:
        """The partner's next line in each conversation, by one call of the model."""
        for talk, reply in zip(episodes, replies, strict=True):
            talk.lines.append(reply)
        texts = [self._view.text(talk.prompt, talk.lines) for talk in episodes]
        lines = self._model.say(texts, [_number(talk) for talk in episodes])
        return [self._turn(talk, line) for talk, line in zip(episodes, lines, strict=True)]

    def close(self, episodes: Sequence[Talk]) -> None:
        """They hold nothing."""

    def _opening(self, talk: Talk) -> Turn:
        if self._model.has_room(self._view.text(talk.prompt, [""])):
            return Turn()
        return Turn(failure=f"error: the prompt fills the partner's context of {self._model.context} tokens")

    def _turn(self, talk: Talk, line: Line) -> Turn:
        if line.failure:
            return Turn(failure=line.failure)
        text = self._spec.marks.line(line.text)
        has_left = not (text.strip() or line.is_full)
        talk.lines.append("" if has_left else text)
        note = "the partner has left" if has_left else "the partner's context is full" if line.is_full else ""
        return Turn(
            text=talk.lines[-1],
            reward=self.reward(talk.prompt, tuple(talk.lines)),
            terminated=has_left,
            truncated=line.is_full,
            info={
                "partner": self._model.version,
                "partner_tokens": line.tokens,
                "partner_cut": line.is_cut,
                "partner_left": has_left,
                "partner_full": line.is_full,
            }
            | ({"note": note} if note else {}),
        )

    @cached_property
    def _model(self) -> PartnerModel:
        stops = (*self._spec.sampling.stop, *self._spec.marks.stops)
        sampling = self._spec.sampling.model_copy(update={"stop": stops})
        return PartnerModel(self._spec.path, self._spec.rollout, sampling)

    @cached_property
    def _view(self) -> PartnerView:
        codec = self._model.codec
        return PartnerView(marks=self._spec.marks, tokenizer=codec.tokenizer, clean=codec.without_special)


def _number(talk: Talk) -> int:
    """The key of the random numbers of the partner's next line: a hash of (seed of the conversation, turn)."""
    return int(np.random.SeedSequence((talk.seed, len(talk.lines))).generate_state(1, np.uint64)[0] >> np.uint64(1))
