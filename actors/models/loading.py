"""Weights exactly as a file has them: a parameter that is missing, unknown or of another shape is refused by name.

transformers draws missing parameters at random, drops unknown ones, and only logs both. Nothing here knows the purpose
of a model. Left out: a check of files other than safetensors without loading them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from actors.models.tokenizer import first_line, quiet_transformers

# Names that files may hold beyond the parameters: buffers that old versions of a family saved (causal masks, position
# numbers, rotary frequencies), and the pooler of a trunk, which the classifiers of RoBERTa and its kin do not have.
_IDLE = re.compile(r"(^|\.)(masked_bias|(attn|attention)\.bias|inv_freq|position_ids|pooler\.dense\.(weight|bias))$")


def load_exactly(
    auto: Any, path: str, rule: str, *, new: Collection[str] = (), dropped: Collection[str] = (), **settings: Any
) -> tuple[Any, bool]:
    """Load a model by a class such as `AutoModelForCausalLM`; returns also whether any of `new` was drawn at random.

    rule: the beginning of an error, "field: must be ...". new: parameters that the file may lack. dropped: parameters
    of the file that the model may lack. Raises ValueError naming the path, and the parameter that is wrong.
    """
    quiet_transformers()
    _check_kind(path, rule)
    try:
        model, found = auto.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **settings
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"{rule}, got {path!r}: {first_line(error)}") from error
    if problem := _difference(found, new, dropped):
        raise ValueError(f"{rule}, got {path!r}: {problem}")
    return model, bool(set(new) & set(found["missing_keys"]))


def check_names(
    auto: Any, path: str, rule: str, *, new: Collection[str] = (), dropped: Collection[str] = (), **settings: Any
) -> None:
    """Raises what `load_exactly` would for names and shapes, from the headers of the files alone.

    It does nothing if there are no local safetensors. settings: of the configuration, such as num_labels.
    """
    headers = _headers(Path(path))
    if not headers:
        return
    from transformers import AutoConfig
    from transformers.models.auto.auto_factory import _get_model_class

    quiet_transformers()
    _check_kind(path, rule)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **settings)
        made = _without_values(_get_model_class(config, auto._model_mapping))
        _, found = made.from_pretrained(
            None,
            config=config,
            state_dict=headers,
            dtype=torch.bfloat16,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except KeyError:
        raise ValueError(
            f"{rule}, got {path!r}: its family, {config.model_type}, has no "
            f"{auto.__name__.removeprefix('AutoModelFor')}"
        ) from None
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"{rule}, got {path!r}: {first_line(error)}") from error
    if problem := _difference(found, new, dropped):
        raise ValueError(f"{rule}, got {path!r}: {problem}")


def _check_kind(path: str, rule: str) -> None:
    """Raises ValueError for quantised weights, and for weights with an adapter beside them."""
    from transformers import PreTrainedConfig

    try:
        written, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{rule}, got {path!r}: {first_line(error)}") from error
    if "quantization_config" in written:
        method = (written["quantization_config"] or {}).get("quant_method", "quantised")
        raise ValueError(
            f"{rule}, got {path!r}: its weights are quantised ({method}), which cannot be trained; take the ones it "
            "was made from"
        )
    if (Path(path) / "adapter_config.json").is_file():
        raise ValueError(
            f"{rule}, got {path!r}: it has an adapter beside it (adapter_config.json), which would be ignored; merge "
            "the two, or take it away"
        )


def _difference(found: Mapping[str, Iterable[Any]], new: Collection[str], dropped: Collection[str]) -> str:
    """The differences between a file and a model, in words, with the remedy; "" if there are none."""
    missing = sorted(set(found["missing_keys"]) - set(new))
    unknown = sorted(name for name in set(found["unexpected_keys"]) - set(dropped) if not _IDLE.search(name))
    reshaped = sorted(found["mismatched_keys"])
    problems = [f"its weights lack {_some(missing)}"] if missing else []
    problems += [f"its weights have {_some(unknown)}, for which the model has no place"] if unknown else []
    if reshaped:
        name, has, wants = reshaped[0]
        problems.append(f"{name!r} has shape {tuple(has)} in its file and {tuple(wants)} in the model")
    if not problems:
        return ""
    return f"{'; '.join(problems)}; {_remedy(unknown, missing)}"


def _remedy(unknown: list[str], missing: list[str]) -> str:
    """The remedy: names with a prefix, as a wrapper of the model adds, need another export than other names."""
    parts = unknown[0].split(".") if unknown else []
    for number in range(1, len(parts)):
        if ".".join(parts[number:]) in missing:
            return f"save the model without the wrapper that put '{'.'.join(parts[:number])}.' before every name"
    return "copy it again, or save it as the class that its config.json names"


def _some(names: list[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _headers(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> a tensor with the shape that the files have; all places share one zero, so it takes no memory."""
    found: dict[str, torch.Tensor] = {}
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("model-*.safetensors")) if index.is_file() else sorted(folder.glob("model.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {
                name: torch.zeros((), dtype=torch.bfloat16).expand(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 (no mapping)
            }
    return found


@cache
def _without_values(made: Any) -> Any:
    """The class, but without drawing missing parameters, which would take minutes for a large model."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    return type(
        made.__name__, (made,), {"_initialize_missing_keys": nothing, "_move_missing_keys_from_meta_to_device": nothing}
    )
