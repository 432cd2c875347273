"""What a run asks: the task's prompts in the model's own tokens, checked against tokenizer and model before anything is started for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from cluster.storage import Folder
from pipeline.config import RunConfig
from pipeline.data.fit import Fitted, fit_prompts
from pipeline.tasks.task import SPLITS, PromptStream, Split, Task, comparisons_of, demonstrations_of, prompts_of


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

    Raises ValueError when the model cannot be read, when it and its tokenizer, or it and the reward model that the critic begins
    from, do not belong together, when there are no prompts, or naming the first that is too long; where the task can shorten
    its prompts, those that remain too long are left out and counted.
    """
    tokenizer = _tokenizer(config, model)
    fitted, train = _stream(config, task, model, tokenizer, "train", config.seed)
    also_fitted, held = _stream(config, task, model, tokenizer, "heldout", 0)
    return Asked(tokenizer=tokenizer, train=train, heldout=held, fitted={"train": fitted, "heldout": also_fitted})


def heldout(config: RunConfig, task: Task, model: str) -> tuple[Any, PromptStream]:
    """Tokenizer and held-out prompts alone, of the same run; for an evaluation. Raises as `asked` does."""
    tokenizer = _tokenizer(config, model)
    return tokenizer, _stream(config, task, model, tokenizer, "heldout", 0)[1]


def _tokenizer(config: RunConfig, model: str) -> Any:
    from actors.model import check_model, check_same_words, load_tokenizer, vocabulary_of

    check_model(model)
    vocabulary, tokenizer = vocabulary_of(model), load_tokenizer(model)
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"model.path: must have at least as many embeddings as its tokenizer has tokens, got {vocabulary} and {len(tokenizer)} in {model!r}; "
            "give it its own tokenizer, or resize its embeddings"
        )
    if config.critic.start == "reward" and config.algorithm.needs_critic and config.reward.model:  # one that is trained here begins from this model
        check_same_words(model, config.reward.model, "critic.start")
    return tokenizer


def _stream(config: RunConfig, task: Task, model: str, tokenizer: Any, split: Split, seed: int) -> tuple[Fitted, PromptStream]:
    from actors.model import context_of

    limits = {"max_prompt_tokens": config.batch.max_prompt_tokens, "context": context_of(model), "max_new_tokens": config.sampling.max_new_tokens}
    fitted = fit_prompts(task, prompts_of(task, split), tokenizer, **limits)
    return fitted, PromptStream(fitted.prompts, tokenizer, seed=seed, **limits)


def fingerprints(config: RunConfig, task: Task) -> dict[str, str]:
    """Kind of data -> checksum of what the task holds of it (and of a model that is there already), by which a stage knows whether it has changed."""
    kinds: dict[str, list[Any]] = {"prompts": prompts_of(task, "train"), "heldout": prompts_of(task, "heldout")}
    if config.finetune.epochs:
        kinds["demonstrations"] = [demonstrations_of(task, split) for split in SPLITS]
    if config.reward_model.epochs:
        kinds["comparisons"] = [comparisons_of(task, split) if config.reward_model.pairs == "task" else prompts_of(task, split) for split in SPLITS]
    found = {kind: xxhash.xxh3_64_hexdigest(repr(values).encode("utf-8", "surrogatepass")) for kind, values in kinds.items()}
    path = Path(config.model.path)
    if config.model.path and path.is_dir():
        files = [Folder(path).stored(file.name) for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".bin", ".json", ".txt")]
        found["model"] = xxhash.xxh3_64_hexdigest(repr(files).encode())
    return found
