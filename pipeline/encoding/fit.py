"""Prompts within a model's limits: one that is too long loses its oldest exchanges, or is left out."""

from __future__ import annotations

from dataclasses import dataclass

from actors.models.text import TextCodec
from pipeline.tasks.task import DataError, PromptText, Task, shorter_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFit:
    """The prompts that fit, in their order, and what became of the others.

    whole, shortened: how many of `prompts` are unchanged, and how many lost something. merged: numbers, from 0, of
    prompts that equal another one after shortening. excluded: numbers of prompts that are too long even so.
    """

    prompts: tuple[PromptText, ...]
    whole: int
    shortened: int
    merged: tuple[int, ...]
    excluded: tuple[int, ...]


def fit_prompts(
    task: Task,
    prompts: list[PromptText],
    codec: TextCodec,
    *,
    max_prompt_tokens: int,
    context: int,
    max_new_tokens: int,
) -> PromptFit:
    """The prompts of a task that fit the limits, shortened where that is needed and possible.

    A task without a method `shorter` promises that its prompts fit, so they are returned unchanged. Raises DataError
    when none fits.
    """
    if not hasattr(task, "shorter"):
        return PromptFit(prompts=tuple(prompts), whole=len(prompts), shortened=0, merged=(), excluded=())
    limit = min(max_prompt_tokens, context - max_new_tokens)
    lengths = [len(ids) for ids in codec.encode_prompts([prompt.text for prompt in prompts])]
    kept = {prompt.text: prompt for prompt, length in zip(prompts, lengths, strict=True) if 0 < length <= limit}
    whole, merged, excluded = len(kept), [], []
    order = {text: number for number, text in enumerate(prompt.text for prompt in prompts)}
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if 0 < length <= limit:
            continue
        text = next(
            (text for text in shorter_of(task)(prompt.text) if 0 < len(codec.encode_prompts([text])[0]) <= limit), None
        )
        if text is None:
            excluded.append(number)
        elif text in kept:
            merged.append(number)
        else:
            kept[text] = PromptText(text=text, metadata=prompt.metadata)
            order[text] = number
    if not kept:
        raise DataError(
            f"batch.max_prompt_tokens: must let at least one prompt through, got {limit} (no more than model.context - "
            "sampling.max_new_tokens), "
            f"and the shortest has {min(lengths)} tokens; raise it"
        )
    fitting = tuple(kept[text] for text in sorted(kept, key=order.__getitem__))
    return PromptFit(
        prompts=fitting, whole=whole, shortened=len(kept) - whole, merged=tuple(merged), excluded=tuple(excluded)
    )
