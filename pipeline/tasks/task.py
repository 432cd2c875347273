"""The protocol of a task: prompts, demonstrations, a tokenizer and a reward.

A task returns *text as the model reads it*: role markers and spaces are in place. So nothing downstream knows a
template, and training, rollouts and chat cannot lay a dialogue out differently.

Left out: streaming from disk. A task's texts fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from actors.reward.worker import user_code

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
T = TypeVar("T")


class DataError(ValueError):
    """A mistake in the data that a recipe names, as opposed to a mistake in a user's code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and the response to imitate, as text the model reads, without the end-of-text token at its end."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prompt and replies to it, the best first, as text the model reads, without the end-of-text token."""

    prompt: str
    replies: tuple[str, ...]  # at least two, all different: chosen and rejected, or a whole ranking
    margin: float = 0.0  # by how much the best is better, if the data say so


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt as text the model reads, and the metadata that its reward function receives (JSON values only)."""

    text: str
    metadata: dict[str, Any]


@runtime_checkable
class Task(Protocol):
    """Data and a goal: a class without arguments, named in a recipe by registry name or import path.

    Three more methods are optional: `comparisons(split)`, a list of `Comparison` that a reward model learns from;
    `shorter(prompt)`, ever shorter texts that may stand for a prompt with too many tokens; and `continuation(line)`,
    the text that follows a reply when the other side of a conversation says a line, which is `layout(line)` without it.
    So is an attribute: `measures`, name -> import path of a function that an evaluation calls as it calls a reward
    function, and that gives each reply a number in [0, 1], such as 1 if it is a sentence.
    """

    name: str
    reward: str
    """Import path of the reward function, `package.module:name`; "" if the recipe must name the reward."""

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Write a Hugging Face tokenizer of at most `vocabulary` tokens, for a model trained from scratch."""
        ...

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """The texts that supervised fine-tuning imitates (`train`) and is measured on (`heldout`)."""
        ...

    def prompts(self, split: Split) -> list[PromptText]:
        """The prompts of training (`train`) and evaluation (`heldout`), in a fixed order, without repetition."""
        ...

    def layout(self, line: str) -> str:
        """Prompt text for a line that a person typed."""
        ...


def prompts_of(task: Task, split: Split) -> list[PromptText]:
    """The task's prompts. Raises ValueError when there are none, one has another type, or the task's code raises."""
    return _listed(f"prompts({split!r}) of {task.name!r}", lambda: task.prompts(split), PromptText)


def demonstrations_of(task: Task, split: Split) -> list[Demonstration]:
    """The task's demonstrations. Raises ValueError as `prompts_of` does."""
    return _listed(f"demonstrations({split!r}) of {task.name!r}", lambda: task.demonstrations(split), Demonstration)


def comparisons_of(task: Task, split: Split) -> list[Comparison]:
    """The task's comparisons.

    Raises ValueError as `prompts_of` does, and when one has fewer than two replies or equal replies.
    """
    give = getattr(task, "comparisons", None)
    if give is None:
        raise ValueError(
            f"task: must have comparisons to learn a reward model from, got {task.name!r} without; give it a method "
            "comparisons(split)"
        )
    found = _listed(f"comparisons({split!r}) of {task.name!r}", lambda: give(split), Comparison)
    for number, comparison in enumerate(found):
        if len(set(comparison.replies)) < max(2, len(comparison.replies)):
            raise ValueError(
                f"task: comparison {number} of {task.name!r} must have at least 2 replies, all different, got "
                f"{comparison.replies!r:.100}"
            )
    return found


def shorter_of(task: Task) -> Callable[[str], Iterable[str]]:
    """The function that gives ever shorter texts for a prompt with too many tokens; of most tasks it gives none."""
    return getattr(task, "shorter", lambda prompt: ())


def measures_of(task: Task) -> Mapping[str, str]:
    """Name -> import path of each function that measures replies in an evaluation; of most tasks there is none."""
    measures: Mapping[str, str] = getattr(task, "measures", {})
    return measures


def continuation_of(task: Task) -> Callable[[str], str]:
    """The function that lays out what the other side of a conversation says after a reply."""
    lay_out: Callable[[str], str] = getattr(task, "continuation", task.layout)
    return lay_out


def _listed(what: str, give: Callable[[], Iterable[T]], kind: type[T]) -> list[T]:
    with user_code(f"task: {what} must give a list of {kind.__name__}", but=DataError):
        found = list(give())
    stranger = next((number for number, value in enumerate(found) if not isinstance(value, kind)), None)
    if stranger is not None:
        raise ValueError(
            f"task: {what} must give a list of {kind.__name__}, got a {type(found[stranger]).__name__} as number "
            f"{stranger}"
        )
    if not found:
        raise ValueError(f"task: {what} must give at least one {kind.__name__}, got none")
    return found
