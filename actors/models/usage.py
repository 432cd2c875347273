"""Settings in a model's folder about its use: the tokens that end a reply, and settings that are not followed.

Followed elsewhere: the chat template (`pipeline/data/template.py`), the padding token of a classifier
(`actors/reward/worker.py`), the longest text (`context.py`), the tokens that are never generated (`suppressed.py`).
"""

from __future__ import annotations

from typing import Any

from actors.models.context import longest_text
from actors.models.tokenizer import first_line, quiet_transformers

# Settings of generation that change the distribution, each with the value that changes nothing. A learner could not
# recompute the log-probs under any other.
_NEUTRAL: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the recipe's `sampling` decides these
_NO_LIMIT = 10**9  # a tokenizer has a longest text beyond this if it has no limit


def ends_of(path: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a reply, ascending.

    They are those at which `generate` stops, those that config.json names, and the tokenizer's end of text. A default
    of the configuration's class counts only where `generate` uses it, too. path: folder or hub name. Raises ValueError
    when there is no configuration.
    """
    from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

    quiet_transformers()
    try:
        written, _ = PreTrainedConfig.get_config_dict(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: must be a folder or hub name of a causal language model, got {path!r}: {first_line(error)}"
        ) from error
    try:
        generation = GenerationConfig.from_pretrained(path)
    # none, or one that cannot be read: `generate` then uses the configuration
    except (OSError, ValueError, TypeError):
        generation = GenerationConfig.from_model_config(config)
    text = written.get("text_config") or {}
    named = (generation.eos_token_id, written.get("eos_token_id"), text.get("eos_token_id"), tokenizer.eos_token_id)
    return tuple(sorted({end for ends in named if ends is not None for end in _listed(ends)}))


def not_followed(path: str, *, lays_out: str = "") -> list[str]:
    """One line for each setting of a causal LM that is not followed here.

    path: folder or hub name. lays_out: what lays text out instead of the chat template, such as "task 'walks'"; "" if
    the template is used.
    """
    asked = _changes(_generation(path), _NEUTRAL)
    sampling = _changes(_generation(path), _SAMPLING)
    lines = (
        [
            f"generation_config.json asks for {_told(asked)}: ignored: replies are sampled from the model's unchanged "
            "distribution"
        ]
        if asked
        else []
    )
    lines += (
        [f"generation_config.json asks for {_told(sampling)}: the recipe's `sampling` is used instead"]
        if sampling
        else []
    )
    tokenizer = _tokenizer(path)
    if lays_out and getattr(tokenizer, "chat_template", None):
        lines.append(f"its chat template is not used, since {lays_out} lays its text out itself")
    return [f"model {path}: {line}" for line in lines + _of_any(path, tokenizer)]


def not_followed_of_judge(path: str) -> list[str]:
    """One line for each setting of a sequence classifier that is not followed here."""
    return [f"reward model {path}: {line}" for line in _of_any(path, _tokenizer(path))]


def _of_any(path: str, tokenizer: Any) -> list[str]:
    from transformers import AutoConfig, PreTrainedConfig

    written, _ = PreTrainedConfig.get_config_dict(path)
    longest = longest_text(AutoConfig.from_pretrained(path, trust_remote_code=False))
    lines = (
        ["config.json asks for code of its own (auto_map): not run; transformers' own class of the family is used"]
        if written.get("auto_map")
        else []
    )
    declared = written.get("max_position_embeddings")
    if longest is not None and isinstance(declared, int) and longest < declared and _is_longrope(written):
        lines.append(
            f"texts of at most {longest} tokens, not {declared}: beyond them its rotary frequencies would depend on "
            "the longest text of a batch"
        )
    limit = getattr(tokenizer, "model_max_length", None)
    if longest is not None and limit is not None and limit < min(longest, _NO_LIMIT):
        lines.append(
            f"its tokenizer gives {limit} tokens as the longest text: not followed, since the model takes {longest}"
        )
    return lines


def _is_longrope(written: dict[str, Any]) -> bool:
    scaling = written.get("rope_parameters") or written.get("rope_scaling") or {}
    return "longrope" in (scaling.get("rope_type"), scaling.get("type"))


def _generation(path: str) -> dict[str, Any]:
    """The settings of generation_config.json that are not defaults; empty if there is none."""
    from transformers import GenerationConfig

    try:
        written: dict[str, Any] = GenerationConfig.from_pretrained(path).to_diff_dict()
    except (OSError, ValueError):
        return {}
    return written


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    quiet_transformers()
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _changes(written: dict[str, Any], neutral: dict[str, Any]) -> dict[str, Any]:
    return {key: written[key] for key, value in neutral.items() if written.get(key) not in (None, [], {}, value)}


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {str(value)[:40]}" for key, value in settings.items())


def _listed(ends: int | list[int]) -> list[int]:
    return [ends] if isinstance(ends, int) else list(ends)
