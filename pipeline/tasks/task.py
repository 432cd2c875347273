"""What a task is: prompts, demonstrations, a tokenizer and the reward that says what is wanted.

A task hands out *text as the model reads it*: role markers and spaces are already in place, so nothing downstream
knows a template, and training, rollouts and chat cannot lay a dialogue out differently.

`PromptStream` is the order in which prompts are drawn: a pure function of the seed, so a data cursor is one integer.

Left out: streaming from disk. A task's prompts are text and fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.experience import Prompts
from actors.reward import load_function, user_code
from pipeline.data.config import DataConfig
from pipeline.data.problems import DataError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
T = TypeVar("T")

TASKS = {
    "smalltalk": "pipeline.tasks.smalltalk:SmallTalk",
    "walks": "pipeline.tasks.walks:RandomWalks",
}
FILES = "files"  # the task that is read from what `data` in the recipe names


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and how to answer it, as text the model reads; the end-of-text token that follows the response is not written."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prompt and replies to it, the best first; as text the model reads; the end-of-text token is not written."""

    prompt: str
    replies: tuple[str, ...]  # at least two, all different: chosen and rejected, or a whole ranking
    margin: float = 0.0  # by how much the best is better, if the data say so


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt as text the model reads, and what the reward function is told of it (JSON values only)."""

    text: str
    metadata: dict[str, Any]


@runtime_checkable
class Task(Protocol):
    """Data and a goal. An implementation is a class without arguments, named by registry name or import path.

    Two more methods are used where a task has them: `comparisons(split)`, a list of `Comparison` that a reward model learns from, and
    `shorter(prompt)`, the ever shorter texts that may stand for a prompt with too many tokens.
    """

    name: str
    reward: str
    """Import path of the reward function, `package.module:name`; "" where the recipe must name the reward."""

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Write a Hugging Face tokenizer of at most `vocabulary` tokens for this task's text, for a model trained from nothing."""
        ...

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """What supervised fine-tuning imitates (`train`) and is measured on (`heldout`)."""
        ...

    def prompts(self, split: Split) -> list[PromptText]:
        """What the policy is trained (`train`) and evaluated (`heldout`) on, in a fixed order, without repetition."""
        ...

    def layout(self, line: str) -> str:
        """What a person typed, as prompt text."""
        ...


def load_task(name: str, data: DataConfig | None = None, model: str = "") -> Task:
    """A task by its name in `TASKS`, or by import path. Raises ValueError naming the choices, or why it cannot be made.

    data, model: of the task "files": the recipe's sources, and the model's folder or hub name, whose chat template lays them out if it has one.
    """
    if name == FILES:
        from pipeline.data.files import Files

        return Files(data or DataConfig(), model)
    if name not in TASKS and ":" not in name:
        raise ValueError(f"task: must be one of {', '.join([*TASKS, FILES])} or an import path package.module:name, got {name!r}")
    make = load_function(TASKS.get(name, name), field="task")
    with user_code(f"task: must be a class without arguments, got {name!r}"):
        task = make()
    if not isinstance(task, Task):
        lacking = [member for member in ("name", "reward", "build_tokenizer", "demonstrations", "prompts", "layout") if not hasattr(task, member)]
        raise ValueError(f"task: must make a Task, got {name!r} without {', '.join(lacking)}; see pipeline/tasks/task.py")
    return task


def prompts_of(task: Task, split: Split) -> list[PromptText]:
    """The task's prompts. Raises ValueError when they are none, or not what `Task` says, or cannot be had."""
    return _listed(f"prompts({split!r}) of {task.name!r}", lambda: task.prompts(split), PromptText)


def demonstrations_of(task: Task, split: Split) -> list[Demonstration]:
    """The task's demonstrations. Raises ValueError when they are none, or not what `Task` says, or cannot be had."""
    return _listed(f"demonstrations({split!r}) of {task.name!r}", lambda: task.demonstrations(split), Demonstration)


def comparisons_of(task: Task, split: Split) -> list[Comparison]:
    """The task's comparisons. Raises ValueError when it has none, or they are not what `Comparison` says, or cannot be had."""
    give = getattr(task, "comparisons", None)
    if give is None:
        raise ValueError(f"task: must have comparisons to learn a reward model from, got {task.name!r} without; give it a method comparisons(split)")
    found = _listed(f"comparisons({split!r}) of {task.name!r}", lambda: give(split), Comparison)
    for number, comparison in enumerate(found):
        if len(set(comparison.replies)) < max(2, len(comparison.replies)):
            raise ValueError(f"task: comparison {number} of {task.name!r} must have at least 2 replies, all different, got {comparison.replies!r:.100}")
    return found


def shorter_of(task: Task) -> Callable[[str], Iterable[str]]:
    """What may stand for a prompt that has too many tokens, ever shorter; nothing where the task does not say."""
    return getattr(task, "shorter", lambda prompt: ())


def _listed(what: str, give: Callable[[], Iterable[T]], kind: type[T]) -> list[T]:
    with user_code(f"task: {what} must give a list of {kind.__name__}", but=DataError):
        found = list(give())
    stranger = next((number for number, value in enumerate(found) if not isinstance(value, kind)), None)
    if stranger is not None:
        raise ValueError(f"task: {what} must give a list of {kind.__name__}, got a {type(found[stranger]).__name__} as number {stranger}")
    if not found:
        raise ValueError(f"task: {what} must give at least one {kind.__name__}, got none")
    return found


def encode_demonstration(demonstration: Demonstration, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids); the response ends with the end-of-text token.

    The two are encoded apart, so a prompt has the same ids in supervised fine-tuning as in rollouts.
    """
    prompt = tokenizer.encode(demonstration.prompt, add_special_tokens=False)
    return prompt, [*tokenizer.encode(demonstration.response, add_special_tokens=False), tokenizer.eos_token_id]


class PromptStream:
    """An endless order over a task's prompts: one permutation after the other, each a function of (seed, epoch) alone.

    Group c of the run gets prompt `permutation(c // n)[c % n]`, n prompts in all; so resuming needs to know c, no more.
    """

    def __init__(self, prompts: Sequence[PromptText], tokenizer: Any, *, seed: int, max_prompt_tokens: int, context: int, max_new_tokens: int) -> None:
        """Tokenise every prompt once. context: longest sequence the model takes.

        Raises ValueError when there are no prompts, or naming the first that is empty or too long.
        """
        if not prompts:
            raise ValueError("task: must have at least one prompt, got none; there is nothing to draw from")
        tokens = [tokenizer.encode(_text(number, prompt), add_special_tokens=False) for number, prompt in enumerate(prompts)]
        for number, ids in enumerate(tokens):
            _check_length(number, len(ids), max_prompt_tokens=max_prompt_tokens, context=context, max_new_tokens=max_new_tokens)
        self.seed = seed
        self._rows = pa.table(
            {"tokens": pa.array(tokens, pa.list_(pa.int32())), "metadata": [_metadata(number, prompt) for number, prompt in enumerate(prompts)]}
        )
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return int(self._rows.num_rows)

    def draw(self, groups: range) -> Prompts:
        """The prompts of these groups of the run, a row each, in order."""
        rows = self._rows.take(pa.array([self._row(group) for group in groups], pa.int64()))
        return Prompts.of({"group_id": list(groups), "tokens": rows["tokens"], "metadata": rows["metadata"]})

    def _row(self, group: int) -> int:
        epoch, place = divmod(group, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self))
        return int(self._order[place])


def permutation(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """A random order of n things, (n,). Sorts raw Philox numbers: NumPy promises those for ever, but not `Generator.permutation`."""
    return np.argsort(np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n), kind="stable")


def _text(number: int, prompt: PromptText) -> str:
    if not isinstance(prompt.text, str):
        raise ValueError(f"task: prompt {number} must be text, got a {type(prompt.text).__name__}")
    return prompt.text


def _metadata(number: int, prompt: PromptText) -> str:
    try:
        return json.dumps(prompt.metadata, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task: prompt {number} must have metadata of JSON values only, got {prompt.metadata!r:.100}: {error}") from error


def _check_length(number: int, length: int, *, max_prompt_tokens: int, context: int, max_new_tokens: int) -> None:
    if length == 0:
        raise ValueError(f"task: prompt {number} must have at least 1 token, got 0; remove it")
    if length > max_prompt_tokens:
        raise ValueError(
            f"batch.max_prompt_tokens: prompt {number} must have at most {max_prompt_tokens} tokens, got {length}; raise the limit or shorten the prompt"
        )
    if length + max_new_tokens > context:
        raise ValueError(
            f"sampling.max_new_tokens: prompt {number} must leave room for {max_new_tokens} new tokens in the model's context of {context}, "
            f"got {length} prompt tokens; {f'set it to at most {context - length}, or ' if length < context else ''}shorten the prompt"
        )
