"""An environment as rollout workers use it: made in the worker's process, its lines laid out as the task's prompts are.

run --EnvironmentSource--> worker --()--> ServedEnvironment = environment + layout of a line
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.config import EnvironmentConfig, RolloutConfig, SamplingConfig
from actors.reward.worker import user_code
from pipeline.environments.checks import CheckedEnvironment
from pipeline.environments.environment import Episode, Turn
from pipeline.environments.model_partner import PartnerSpec
from pipeline.environments.partner_view import Marks
from pipeline.environments.registry import load_environment
from pipeline.tasks.task import PromptText, Task, continuation_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSource:
    """What a worker makes its environment of. lay_out: see `ServedEnvironment`. partner: a language model, if any."""

    name: str
    lay_out: Callable[[str], str]
    partner: PartnerSpec | None = None

    @classmethod
    def of(
        cls, config: EnvironmentConfig, task: Task, rollout: RolloutConfig, sampling: SamplingConfig
    ) -> EnvironmentSource | None:
        """The environment of a recipe, whose lines are laid out as the task's prompts are; None without a name.

        rollout, sampling: how a language model that is the partner is run, and how its lines are sampled. Raises
        ValueError where the task lays no line out for such a partner.
        """
        if not config.name:
            return None
        partner = None
        if config.partner:
            with user_code(f"task: must lay out what an environment says, got {task.name!r}", but=ValueError):
                marks = Marks.of(task)
            partner = PartnerSpec(path=config.partner, marks=marks, sampling=sampling, rollout=rollout)
        return cls(name=config.name, lay_out=continuation_of(task), partner=partner)

    def make(self) -> ServedEnvironment:
        """Make the environment, which loads nothing yet. Raises ValueError that says why it cannot be made."""
        return ServedEnvironment(load_environment(self.name, self.partner), self.lay_out)

    def __call__(self) -> ServedEnvironment:
        """Make the environment and let it load what is large, such as a model. Raises ValueError."""
        made = self.make()
        made.load()
        return made


class ServedEnvironment:
    """An environment and the layout of its lines; implements what `actors.rollout.conversations` asks for."""

    def __init__(self, environment: CheckedEnvironment, lay_out: Callable[[str], str]) -> None:
        """lay_out: gives the text that follows a reply when the environment says a line."""
        self._environment, self._lay_out = environment, lay_out

    def load(self) -> None:
        """Let the environment load what is large."""
        self._environment.load()

    def reset(
        self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], seeds: Sequence[int]
    ) -> tuple[list[Episode], list[Turn]]:
        """Begin a conversation for each prompt."""
        texts = [PromptText(text=text, metadata=own) for text, own in zip(prompts, metadata, strict=True)]
        return self._environment.reset(texts, seeds)

    def step(self, episodes: Sequence[Episode], replies: Sequence[str]) -> list[Turn]:
        """Answer one reply in each of these conversations."""
        return self._environment.step(episodes, replies)

    def close(self, episodes: Sequence[Episode]) -> None:
        """Release these conversations."""
        self._environment.close(episodes)

    def continuation(self, line: str) -> str:
        """The text that follows a reply when the environment says this line."""
        return self._lay_out(line)


def check_environment(source: EnvironmentSource, task: Task, prompts: Sequence[PromptText], timeout_s: float) -> None:
    """Begin a conversation and end it, before a run starts.

    timeout_s: deadline of the environment. Raises ValueError when the environment cannot be made, breaks its contract,
    cannot go on from the first prompt, or does not answer in time.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            _begin_once(source, task, prompts[0])
        except BaseException as error:  # noqa: BLE001  raised again below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ValueError(
            f"environment.timeout_s: must be longer than the environment takes to begin, got {timeout_s:g} s for "
            f"{source.name!r}; raise it, or see whether a server that it needs is there"
        )
    if raised:
        raise raised[0]


def _begin_once(source: EnvironmentSource, task: Task, first: PromptText) -> None:
    environment = source.make()
    episodes, [turn] = environment.reset([first.text], [dict(first.metadata)], [0])
    with user_code(f"environment.name: must be an environment that can be closed, got {source.name!r}"):
        environment.close(episodes)
    if turn.failure:
        raise ValueError(
            f"environment.name: must be an environment that goes on from the prompts of task {task.name!r}, got "
            f"{source.name!r}: {turn.failure}, from {first.text!r:.80}"
        )
    with user_code(f"task: must lay out what an environment says, got {task.name!r}", but=ValueError):
        environment.continuation("Hello.")
