"""Adapters between our environments and Gymnasium's, in both directions.

`DialogueEnv` turns any of our environments into a `gymnasium.Env` with text observations and actions, so that other
libraries can play it. `gymnasium_environment` turns any `gymnasium.Env` into one of our environments.

Left out: Gymnasium's vector environments. Here `Lockstep` plays many conversations at once.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from pipeline.environments.environment import Environment, Episode, Turn
from pipeline.environments.lockstep import Lockstep
from pipeline.tasks.task import PromptText

MOST_CHARACTERS = 4096
CHARACTERS = string.printable
_NUMBER = re.compile(r"-?\d+")


class DialogueEnv(gymnasium.Env[str, str]):
    """A dialogue as a gymnasium environment: an action is a reply, an observation is the line said next.

    The first observation is a random prompt, followed by the environment's opening text. The info holds the available
    options as "options". A failure of the environment raises RuntimeError.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  gymnasium declares it so

    def __init__(
        self,
        environment: Environment,
        prompts: Sequence[PromptText],
        render_mode: str | None = None,
        most_characters: int = MOST_CHARACTERS,
        characters: str = CHARACTERS,
    ) -> None:
        """most_characters, characters: length limit and character set of the observation and action spaces."""
        if not prompts:
            raise ValueError("prompts: must be at least one, got none")
        self._environment, self._prompts = environment, tuple(prompts)
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Text(most_characters, min_length=0, charset=characters)
        self.action_space = gymnasium.spaces.Text(most_characters, min_length=0, charset=characters)
        self._episodes: list[Episode] = []
        self._lines: list[str] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a dialogue. options: {"prompt": PromptText} sets the prompt; otherwise it is drawn by chance."""
        super().reset(seed=seed)
        self.close()
        drawn = self._prompts[int(self.np_random.integers(len(self._prompts)))]
        prompt = (options or {}).get("prompt", drawn)
        episodes, [turn] = self._environment.reset([prompt], [int(self.np_random.integers(2**31))])
        self._episodes = list(episodes)
        self._lines = [prompt.text + turn.text]
        return self._lines[0], _info(turn)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Give a reply. Raises RuntimeError if no dialogue has begun, or if the environment fails."""
        if not self._episodes:
            raise RuntimeError("step: a dialogue must have begun, got none; call reset first")
        [turn] = self._environment.step(self._episodes, [action])
        self._lines += [action, turn.text]
        if turn.over:
            self.close()
        return turn.text, float(turn.reward), turn.terminated, turn.truncated, _info(turn)

    def render(self) -> str | None:
        """What was said so far, one line each; None unless the render mode is "ansi"."""
        return "\n".join(self._lines) if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Release the dialogue, if one has begun."""
        if self._episodes:
            self._environment.close(self._episodes)
            self._episodes = []


def gymnasium_environment(
    make: Callable[[], gymnasium.Env[Any, Any]],
    describe: Callable[[Any], str] | None = None,
    read: Callable[[str], Any] | None = None,
    timeout_s: float | None = None,
) -> Lockstep:
    """Turn a gymnasium environment into one of ours; each conversation plays an instance of its own.

    describe: turns an observation into text; by default text stays as it is, and anything else becomes JSON. read:
    turns a reply into an action, and raises ValueError if it holds none; by default it takes the whole reply for a Text
    space, the first whole number for a Discrete one. A reply without an action gets an error text and a reward of 0,
    and the game does not move.
    """
    return Lockstep(lambda: GymnasiumConversation(make(), describe or describe_observation, read), timeout_s)


class GymnasiumConversation:
    """One game of a gymnasium environment; see `gymnasium_environment`."""

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        describe: Callable[[Any], str],
        read: Callable[[str], Any] | None,
    ) -> None:
        self._env, self._describe = env, describe
        self._read = read or (lambda reply: read_action(env.action_space, reply))

    def begin(self, prompt: PromptText, seed: int) -> Turn:
        """The first observation."""
        observation, _ = self._env.reset(seed=seed)
        return Turn(text=self._describe(observation))

    def answer(self, reply: str) -> Turn:
        """The next observation."""
        try:
            action = self._read(reply)
        except ValueError as error:
            return Turn(text=f"error: {error}", info={"no_action": True})
        observation, reward, terminated, truncated, _ = self._env.step(action)
        return Turn(
            text=self._describe(observation),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated) and not terminated,
            info={"no_action": False},
        )

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def describe_observation(observation: Any) -> str:
    """The observation as text: text as it is, anything else as JSON."""
    return observation if isinstance(observation, str) else json.dumps(observation, default=_plain)


def read_action(space: gymnasium.Space[Any], reply: str) -> Any:
    """Read an action from a reply. Raises ValueError if it holds none, TypeError for a space of another kind."""
    if isinstance(space, gymnasium.spaces.Text):
        return reply
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise TypeError(f"read: must be given for an action space such as {space}; only Text and Discrete are known")
    found = _NUMBER.search(reply)
    if found is None or not space.contains(int(found[0])):
        raise ValueError(f"an action must be a number from {space.start} to {space.start + space.n - 1}")
    return int(found[0])


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"describe: must be given for an observation that holds a {type(value).__name__}")


def _info(turn: Turn) -> dict[str, Any]:
    if turn.failure:
        raise RuntimeError(f"the environment failed: {turn.failure}")
    return {**turn.info, "options": turn.options}
