"""Prompts within a model's limits: one that is too long loses its oldest exchanges, since a dialogue's end is what is answered, or is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.data.problems import DataError
from pipeline.tasks.task import PromptText, Task, shorter_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Prompts that fit, in their order. whole, shortened: how many of them are as they were, and are not. Of the others the numbers, counted from 0.

    merged: after shortening they are what an earlier prompt is. excluded: too long even so.
    """

    prompts: tuple[PromptText, ...]
    whole: int
    shortened: int
    merged: tuple[int, ...]
    excluded: tuple[int, ...]


def fit_prompts(task: Task, prompts: list[PromptText], tokenizer: Any, *, max_prompt_tokens: int, context: int, max_new_tokens: int) -> Fitted:
    """The prompts of a task that may be asked, as `PromptStream` takes them.

    A task that does not say how to shorten (it has no method `shorter`) promises that its prompts fit, so they are handed on as they are.
    Raises DataError when none fits.
    """
    if not hasattr(task, "shorter"):
        return Fitted(prompts=tuple(prompts), whole=len(prompts), shortened=0, merged=(), excluded=())
    limit = min(max_prompt_tokens, context - max_new_tokens)
    lengths = [len(ids) for ids in tokenizer([prompt.text for prompt in prompts], add_special_tokens=False)["input_ids"]]
    kept = {prompt.text: prompt for prompt, length in zip(prompts, lengths, strict=True) if 0 < length <= limit}
    whole, merged, excluded = len(kept), [], []
    order = {text: number for number, text in enumerate(prompt.text for prompt in prompts)}
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if 0 < length <= limit:
            continue
        text = next((text for text in shorter_of(task)(prompt.text) if 0 < len(tokenizer.encode(text, add_special_tokens=False)) <= limit), None)
        if text is None:
            excluded.append(number)
        elif text in kept:
            merged.append(number)
        else:
            kept[text] = PromptText(text=text, metadata=prompt.metadata)
            order[text] = number
    if not kept:
        raise DataError(
            f"batch.max_prompt_tokens: must let at least one prompt through, got {limit} (no more than model.context - sampling.max_new_tokens), "
            f"and the shortest has {min(lengths)} tokens; raise it"
        )
    fitting = tuple(kept[text] for text in sorted(kept, key=order.__getitem__))
    return Fitted(prompts=fitting, whole=whole, shortened=len(kept) - whole, merged=tuple(merged), excluded=tuple(excluded))
