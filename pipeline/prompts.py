"""What a run asks: the task's prompts in the model's own tokens, checked against tokenizer and model before anything is started for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.data.fit import Fitted, fit_prompts
from pipeline.tasks.task import SPLITS, PromptStream, Split, Task, demonstrations_of, prompts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """train: in the order of the run's seed. heldout: the same order in every run. fitted: of each split, what was done to make its prompts fit."""

    tokenizer: Any
    train: PromptStream
    heldout: PromptStream
    fitted: dict[Split, Fitted]


def check_data(config: RunConfig, task: Task) -> None:
    """Raises ValueError when the task has nothing to ask, or nothing to imitate where the recipe fine-tunes: what can be known without any model."""
    for split in SPLITS:
        prompts_of(task, split)
        if config.finetune.epochs:
            demonstrations_of(task, split)


def asked(config: RunConfig, task: Task, model: str) -> Asked:
    """The prompts of a run whose policy starts from `model`, a folder or hub name.

    Raises ValueError when the model cannot be read, when it and its tokenizer do not belong together, when there are no prompts, or naming
    the first that is too long; where the task can shorten its prompts, those that remain too long are left out and counted.
    """
    from actors.model import check_model, context_of, load_tokenizer, vocabulary_of

    check_model(model)
    context, vocabulary, tokenizer = context_of(model), vocabulary_of(model), load_tokenizer(model)
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"model.path: must have at least as many embeddings as its tokenizer has tokens, got {vocabulary} and {len(tokenizer)} in {model!r}; "
            "give it its own tokenizer, or resize its embeddings"
        )

    limits = {"max_prompt_tokens": config.batch.max_prompt_tokens, "context": context, "max_new_tokens": config.sampling.max_new_tokens}
    fitted = {split: fit_prompts(task, prompts_of(task, split), tokenizer, **limits) for split in SPLITS}
    streams = {split: PromptStream(fitted[split].prompts, tokenizer, seed=seed, **limits) for split, seed in zip(SPLITS, (config.seed, 0), strict=True)}
    return Asked(tokenizer=tokenizer, train=streams["train"], heldout=streams["heldout"], fitted=fitted)
