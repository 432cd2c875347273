"""The tokenizer beside a model, and messages for files that cannot be read.

Needs no torch: a process that only reads text starts without it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def load_tokenizer(path: str, field: str = "model.path") -> Any:
    """The tokenizer saved beside the model.

    Raises ValueError naming the field when there is none, or it has no end-of-text token.
    """
    tokenizer = read_tokenizer(path, field)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{field}: the tokenizer of {path!r} must have an end-of-text token; set eos_token in its "
            "tokenizer_config.json"
        )
    return tokenizer


def read_tokenizer(path: str, field: str) -> Any:
    """The tokenizer of any model. Raises ValueError naming the field when there is none, or it cannot be read."""
    quiet_transformers()
    try:
        tokenizer = _reader(path).from_pretrained(path, trust_remote_code=False)
    # the reader of tokenizer.json raises bare Exceptions, and a damaged file may raise anything
    except Exception as error:
        file = unreadable(path, "tokenizer.json", "tokenizer_config.json", "config.json")
        if file:
            raise ValueError(f"{field}: must have a tokenizer that can be read, got {path!r}: {file}") from error
        known = isinstance(error, OSError | ValueError)
        reason = (
            first_line(error)
            if known
            else f"one of its files is damaged ({first_line(error)}); save the tokenizer there again"
        )
        raise ValueError(f"{field}: must be a folder or hub name with a tokenizer, got {path!r}: {reason}") from error
    # for some families transformers makes up an empty tokenizer; all texts would look the same
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"{field}: must have its tokenizer beside it, got {path!r} without; save the one it was trained with there"
        )
    return tokenizer


def _reader(path: str) -> Any:
    """The class that `AutoTokenizer` would choose.

    `AutoTokenizer` imports the code of all models, which takes seconds. Folders that this program has written do not
    need it.
    """
    if (
        _field(path, "config.json", "model_type") == "gpt2"
        and _field(path, "tokenizer_config.json", "tokenizer_class") == "TokenizersBackend"
    ):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _field(folder: str, name: str, key: str) -> Any:
    """The value of a key in a JSON file; None if there is none, or the file cannot be read."""
    try:
        found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get(key) if isinstance(found, dict) else None


def unreadable(path: str, *names: str) -> str:
    """The first of these files in a folder that is no JSON object, with the remedy; "" if none is."""
    for name in names:
        file = Path(path) / name
        if not os.path.isfile(file):
            continue
        try:
            problem = "" if isinstance(json.loads(file.read_text(encoding="utf-8")), dict) else "no JSON object"
        except (OSError, ValueError, RecursionError) as error:
            problem = first_line(error)
        if problem:
            return f"its {name} cannot be read ({problem}); copy it again"
    return ""


def quiet_transformers() -> None:
    """Keep transformers' messages and progress bars off the terminal."""
    import logging

    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    """The text of an error in one line: its first line, with the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
