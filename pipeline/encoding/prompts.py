"""The prompts of a run in the model's tokens, checked against tokenizer and model before anything starts.

Also the checksums of data and models, by which a stage knows whether they have changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from actors.config import RewardConfig, SamplingConfig
from actors.models.text import TextCodec
from cluster.storage import Folder
from pipeline.config.preparation_config import PreparationConfig
from pipeline.config.sections import BatchConfig
from pipeline.encoding.fit import PromptFit, fit_prompts
from pipeline.encoding.prompt_stream import PromptStream
from pipeline.tasks.task import SPLITS, Split, Task, comparisons_of, demonstrations_of, prompts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPrompts:
    """The prompts of a run.

    train: in the order of the run's seed. heldout: in the same order in every run. fitted: split -> how its prompts
    were made to fit.
    """

    tokenizer: Any
    train: PromptStream
    heldout: PromptStream
    fitted: dict[Split, PromptFit]


def check_data(config: PreparationConfig, task: Task) -> None:
    """Raises ValueError when the task lacks prompts, demonstrations or comparisons that the recipe needs.

    This part of the checks needs no model.
    """
    for split in SPLITS:
        prompts_of(task, split)
        if config.reads_demonstrations:
            demonstrations_of(task, split)
        if config.reads_comparisons:
            comparisons_of(task, split)


def run_prompts(task: Task, model: str, batch: BatchConfig, sampling: SamplingConfig, seed: int) -> RunPrompts:
    """The prompts of a run whose policy starts from `model`, a folder or hub name. seed: the run's.

    Raises ValueError when the model cannot be read, when its tokenizer does not belong to it, when there are no
    prompts, or naming the first that is too long. If the task can shorten its prompts, those that remain too long are
    left out and counted instead.
    """
    from actors.models.causal_lm import context_of

    tokenizer, context = tokenizer_of(model), context_of(model)
    limits = _limits(batch, sampling, context)
    fitted, train = _stream(task, tokenizer, "train", seed, limits)
    also_fitted, held = _stream(task, tokenizer, "heldout", 0, limits)
    return RunPrompts(tokenizer=tokenizer, train=train, heldout=held, fitted={"train": fitted, "heldout": also_fitted})


def heldout_prompts(
    task: Task, batch: BatchConfig, sampling: SamplingConfig, models: Sequence[str]
) -> tuple[Any, PromptStream]:
    """(tokenizer of the first model, held-out prompts that fit all of the models), for an evaluation.

    Raises as `run_prompts` does.
    """
    from actors.models.causal_lm import context_of

    tokenizer, context = tokenizer_of(models[0]), min(map(context_of, models))
    return tokenizer, _stream(task, tokenizer, "heldout", 0, _limits(batch, sampling, context))[1]


def tokenizer_of(model: str, field: str = "model.path") -> Any:
    """A policy's tokenizer.

    Raises ValueError, naming the field, when the model cannot be read, or its tokenizer does not belong to it.
    """
    from actors.models.causal_lm import check_causal_lm, check_family, check_model, check_vocabulary
    from actors.models.tokenizer import load_tokenizer

    check_model(model, f"{field}: must be a folder or hub name of a causal language model")
    check_family(model, field)
    check_causal_lm(model, field)
    tokenizer = load_tokenizer(model, field)
    check_vocabulary(model, tokenizer, field)
    return tokenizer


def _limits(batch: BatchConfig, sampling: SamplingConfig, context: int) -> dict[str, int]:
    """The limits of prompts for `fit_prompts` and `PromptStream`, in tokens."""
    return {
        "max_prompt_tokens": batch.max_prompt_tokens,
        "context": context,
        "max_new_tokens": sampling.max_new_tokens,
    }


def _stream(
    task: Task, tokenizer: Any, split: Split, seed: int, limits: Mapping[str, int]
) -> tuple[PromptFit, PromptStream]:
    codec = TextCodec(tokenizer)
    fitted = fit_prompts(task, prompts_of(task, split), codec, **limits)
    return fitted, PromptStream(fitted.prompts, codec, seed=seed, **limits)


def data_checksums(config: PreparationConfig, reward: RewardConfig, task: Task, partner: str = "") -> dict[str, str]:
    """Kind of data -> checksum, for the task's data and for models that exist already.

    partner: folder or hub name of the language model that talks with the policy.
    """
    kinds: dict[str, list[Any]] = {"prompts": prompts_of(task, "train"), "heldout": prompts_of(task, "heldout")}
    if config.reads_demonstrations:
        kinds["demonstrations"] = [demonstrations_of(task, split) for split in SPLITS]
    if config.reward_model.epochs:
        kinds["comparisons"] = [
            comparisons_of(task, split) if config.reads_comparisons else prompts_of(task, split) for split in SPLITS
        ]
    found = {
        kind: xxhash.xxh3_64_hexdigest(repr(values).encode("utf-8", "surrogatepass")) for kind, values in kinds.items()
    }
    for name, path in (("model", config.model.path), ("reward model", reward.model), ("partner model", partner)):
        found |= {f"{name} {part}": checksum for part, checksum in model_checksums(path).items()}
    return found


_TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges",
    "added_tokens",
    "special_tokens_map",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_SAID_ANEW = ("_name_or_path", "transformers_version")  # keys of config.json that change whenever a model is saved


def model_checksums(path: str) -> dict[str, str]:
    """Part -> checksum, of the files in a model's folder that decide its weights and tokens.

    Parts: weights, configuration, tokenizer, and ends (the ids that end a reply, from generation_config.json or
    config.json). Other files, such as a README or the state of a training, change nothing here. Empty for a hub name,
    whose weights are compared when they are loaded.
    """
    folder = Path(path)
    if not (path and folder.is_dir()):
        return {}
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    weights = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    weights = weights or [
        name for name in names if name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))
    ]
    configuration, generation = (_json(folder / name) for name in ("config.json", "generation_config.json"))
    said = [settings.pop("eos_token_id", None) for settings in (generation, configuration)]
    ends = said[1] if said[0] is None else said[0]
    for key in _SAID_ANEW:
        configuration.pop(key, None)
    return {
        "weights": _files(folder, weights),
        "configuration": xxhash.xxh3_64_hexdigest(json.dumps(configuration, sort_keys=True).encode()),
        "tokenizer": _files(folder, [name for name in names if name.startswith(_TOKENIZER)]),
        "ends": json.dumps(sorted(ends) if isinstance(ends, list) else [ends]),
    }


def _files(folder: Path, names: list[str]) -> str:
    return xxhash.xxh3_64_hexdigest(repr([Folder(folder).stored(name) for name in names]).encode())


def _json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; empty if it cannot be read, which is reported when the model is loaded."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
