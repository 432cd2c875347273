"""The order in which prompts are drawn: a pure function of the seed, so a data cursor is one integer."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.experience import Prompts
from actors.models.text import TextCodec
from pipeline.tasks.task import PromptText


class PromptStream:
    """An endless order over a task's prompts: one permutation after another, each a function of (seed, epoch) alone.

    Group c of the run gets prompt `permutation(c // n)[c % n]` of n prompts, so resuming needs to know only c.
    """

    def __init__(
        self,
        prompts: Sequence[PromptText],
        codec: TextCodec,
        *,
        seed: int,
        max_prompt_tokens: int,
        context: int,
        max_new_tokens: int,
    ) -> None:
        """Tokenise every prompt once. context: longest sequence the model takes.

        Raises ValueError when there are no prompts, or naming the first that is empty or too long.
        """
        if not prompts:
            raise ValueError("task: must have at least one prompt, got none; there is nothing to draw from")
        tokens = codec.encode_prompts([_text(number, prompt) for number, prompt in enumerate(prompts)])
        for number, ids in enumerate(tokens):
            _check_length(
                number, len(ids), max_prompt_tokens=max_prompt_tokens, context=context, max_new_tokens=max_new_tokens
            )
        self.seed = seed
        self._rows = pa.table(
            {
                "tokens": pa.array(tokens, pa.list_(pa.int32())),
                "metadata": [_metadata(number, prompt) for number, prompt in enumerate(prompts)],
            }
        )
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        """The number of prompts in one epoch."""
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
    """A random permutation of 0 ... n - 1, (n,).

    It sorts raw Philox numbers, which never change with NumPy's version; `Generator.permutation` may.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n), kind="stable")


def _text(number: int, prompt: PromptText) -> str:
    if not isinstance(prompt.text, str):
        raise ValueError(f"task: prompt {number} must be text, got a {type(prompt.text).__name__}")
    return prompt.text


def _metadata(number: int, prompt: PromptText) -> str:
    try:
        return json.dumps(prompt.metadata, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"task: prompt {number} must have metadata of JSON values only, got {prompt.metadata!r:.100}: {error}"
        ) from error


def _check_length(number: int, length: int, *, max_prompt_tokens: int, context: int, max_new_tokens: int) -> None:
    if length == 0:
        raise ValueError(f"task: prompt {number} must have at least 1 token, got 0; remove it")
    if length > max_prompt_tokens:
        raise ValueError(
            f"batch.max_prompt_tokens: prompt {number} must have at most {max_prompt_tokens} tokens, got {length}; "
            "raise the limit or shorten the prompt"
        )
    if length + max_new_tokens > context:
        raise ValueError(
            f"sampling.max_new_tokens: prompt {number} must leave room for {max_new_tokens} new tokens in the model's "
            f"context of {context}, "
            f"got {length} prompt tokens; "
            f"{f'set it to at most {context - length}, or ' if length < context else ''}shorten the prompt"
        )
