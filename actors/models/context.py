"""The longest text that a model takes: the one answer that engines, learners, judges, encoding and checks use.

    kind of positions                                    longest text
    learned (GPT-2, BERT, OPT)                           number of rows for tokens
    learned, with a padding row (RoBERTa and its kin)    rows after the padding's: 514 rows, row 1 padding, 512 tokens
    rotary (Llama, Qwen2, Mistral)                       max_position_embeddings
    rotary, other frequencies for long texts (longrope)  up to where they change; beyond, the numbers of a row would
                                                         depend on the longest row beside it
    none (BLOOM's ALiBi, Mamba)                          no limit

A sliding window is no limit: it says how far back a token sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_TABLES = ("position_embeddings", "position_embedding", "positions_embed", "embed_positions", "wpe")


def longest_text(config: Any, model: Any = None) -> int | None:
    """The longest text of a model of this configuration, in tokens, special ones included; None without a limit.

    model: a model of this configuration, if one is loaded; otherwise one is made without weights if needed.
    """
    own = config.get_text_config()
    declared = getattr(own, "max_position_embeddings", None)
    limits = [declared] if declared is not None and declared > 0 else []
    rope = getattr(own, "rope_parameters", None) or {}
    if rope:
        kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
        limits += [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    else:
        limits += _learned(own if model is None else model)
    return min(map(int, limits), default=None)


def _learned(source: Any) -> list[int]:
    """The number of tokens that each table of learned positions has rows for. source: a model or a configuration."""
    found = []
    for name, module in _made(source).named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in _TABLES and weight is not None:
            padding = getattr(module, "padding_idx", None)  # if there is one, positions begin after it
            found.append(weight.shape[0] - (0 if padding is None else padding + 1))
    return found


def _made(source: Any) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    from transformers import AutoModel

    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(source)
    return model
