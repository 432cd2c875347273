"""The folder of a model, written as `from_pretrained` reads it; and a trial of that before anything is trained.

transformers refuses to write some generation settings that it reads, such as a temperature without `do_sample`. They
belong to the user and do not affect training, so they are written as they were read. Left out: sharded writing, because
a policy is whole on the rank that exports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.models.option_names import TRAINED_HEAD
from actors.models.tokenizer import first_line, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SETTINGS = "generation_config.json"


def save_model(
    model: PreTrainedModel, tokenizer: Any, folder: Path, changed: Mapping[str, Tensor] | None = None
) -> None:
    """Write safetensors, config and tokenizer as `from_pretrained` reads them.

    changed: name -> value of parameters that are written instead of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because a sharded learner's parameters are views of one flat storage, which safetensors takes for tied
    # weights.
    parameters = {
        name: (changed or {}).get(name, p).detach().to(p.dtype, copy=True) for name, p in model.named_parameters()
    }
    buffers = {name: t for name, t in model.state_dict().items() if name in dict(model.named_buffers())}
    _write(model, tokenizer, folder, parameters | buffers)


def check_saved(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Read a causal LM that was just written, and compare it with the one in memory.

    Raises ValueError naming the first parameter that differs, or saying that the tokenizer does.
    """
    from actors.models.causal_lm import load_causal_lm

    expected = dict(model.named_parameters())
    saved = load_causal_lm(str(folder), model.dtype)
    for name, parameter in saved.named_parameters():
        if name not in expected or not torch.equal(parameter, expected[name].detach().to("cpu", parameter.dtype)):
            raise ValueError(
                f"{folder}: must hold the model as it was trained, but its {name!r} is another one; save it again with "
                "`raylign resume`"
            )
    if load_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{folder}: must hold the tokenizer that the model was trained with, but its words are others; copy it "
            "there"
        )


def try_export(path: str, scratch: Path, *, classifier: bool = False) -> str:
    """Try an export before any training: write a model's folder without its weights into `scratch`.

    path: folder or hub name. classifier: as a reward model with one output. Returns a remark for the user, or "".
    Raises ValueError naming the path when it cannot be written.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer, settings = load_tokenizer(path), None if classifier else _settings(path)
    kind, labels = (AutoModelForSequenceClassification, {"num_labels": 1}) if classifier else (AutoModelForCausalLM, {})
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **labels)
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
        if settings is not None:
            model.generation_config = settings
        _write(model, tokenizer, scratch, {})
    except Exception as error:  # from the family, its tokenizer or the disk
        what = "of a family with a sequence classifier, for the reward model," if classifier else "a model"
        raise ValueError(
            f"model.path: must be {what} that can be written again as it was read, got {path!r}: {first_line(error)}"
        ) from error
    problem = "" if settings is None else _objection(settings)
    return (
        f"model.path: {_SETTINGS} of {path} is exported as it is, though transformers would not write it: {problem}"
        if problem
        else ""
    )


def _settings(path: str) -> Any:
    """The generation settings of a model; None if there are none. Raises ValueError when they cannot be read."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # none, or no JSON; loading the model ignores that, too
        return None
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"model.path: must have a {_SETTINGS} that transformers can read, got {path!r}: {first_line(error)}; mend "
            "it or remove it"
        ) from error


def _write(model: Any, tokenizer: Any, folder: Path, state: dict[str, Tensor]) -> None:
    """`save_pretrained` without its strict check of generation settings."""
    from transformers import GenerationConfig

    if hasattr(model.config, TRAINED_HEAD):
        delattr(model.config, TRAINED_HEAD)  # the head belonged to the policy that was read, and is not written here
    settings = model.generation_config if model.can_generate() else None
    try:
        if settings is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder, state_dict=state)
    finally:
        if settings is not None:
            model.generation_config = settings
    if settings is not None:
        # as `GenerationConfig.save_pretrained` does
        settings.to_json_file(folder / _SETTINGS, use_diff=True, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)


def _objection(settings: Any) -> str:
    """The reason why transformers would not write these generation settings, in one line; "" if it would."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        faults = [
            line.removeprefix("- ").partition(":")[0] for line in str(error).splitlines() if line.startswith("- ")
        ]
        return ", ".join(faults) or first_line(error)
    return ""
