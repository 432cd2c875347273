"""Tokens that a policy never generates: `suppress_tokens` in its generation_config.json, as `generate` follows it.

Everybody who computes the policy's distribution calls `suppress`: the engine before it samples, the learner and the
reference before they compute log-probs. So a sampled log-prob is the one that is recomputed.

Shapes: V vocabulary, K suppressed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actors.models.tokenizer import load_tokenizer
from actors.models.usage import ends_of

# The most negative finite number: its probability is exactly zero, and products with that are zero, not NaN.
NEVER = torch.finfo(torch.float32).min


def suppress(logits: Tensor, tokens: Tensor | None) -> Tensor:
    """Logits (..., V) float32 with those of the suppressed tokens (K,) at `NEVER`; they get no gradient.

    Without suppressed tokens it is the same tensor. To be called after the division by the temperature wherever a
    product with the logits follows, because dividing `NEVER` may give minus infinity.
    """
    return logits if tokens is None else logits.index_fill(-1, tokens, NEVER)


def suppressed_tokens(model: Any) -> Tensor | None:
    """The suppressed tokens of a loaded model, (K,) int64 ascending; None if there are none."""
    ids = getattr(getattr(model, "generation_config", None), "suppress_tokens", None)
    return torch.tensor(sorted(set(ids))) if ids else None


def check_suppressed(path: str, vocabulary: int, field: str = "model.path") -> None:
    """Check the tokens that a folder or hub name suppresses, without reading its weights.

    vocabulary: number of the model's embeddings. Raises ValueError naming the field unless they are tokens of the model
    that do not end a reply.
    """
    ids = written_suppressed(path)
    if not ids:
        return
    rule = f"{field}: must have tokens that do not end a reply as suppress_tokens of its generation_config.json"
    if strange := [token for token in ids if type(token) is not int or not 0 <= token < vocabulary]:
        raise ValueError(
            f"{rule}, got {strange[0]!r} in {path!r}, whose tokens are 0 to {vocabulary - 1}; take it off the list"
        )
    if ends := sorted(set(ids) & set(ends_of(path, load_tokenizer(path, field)))):
        raise ValueError(f"{rule}, got {ends[0]} in {path!r}, which ends a reply; take it off the list")


def written_suppressed(path: str) -> list[Any]:
    """`suppress_tokens` of a folder or hub name, as loading the model finds it.

    It stands in generation_config.json or, without one, in config.json.
    """
    from transformers import GenerationConfig

    for name in ("generation_config.json", "config.json"):
        try:
            settings = GenerationConfig.from_pretrained(path, config_file_name=name)
        except OSError:
            continue
        except (TypeError, ValueError):  # `try_export` refuses such a file by name
            return []
        return list(settings.suppress_tokens or ())
    return []
