"""Control tokens: one special token for each option, which a language model is given before a turn.

An option's token is not text: the manager chooses it, the engine appends it, and nobody ever samples it, because the
model's folder suppresses it (`suppressed.py`). Ids of existing text stay the same. Left out: padding the embeddings to
a multiple of a power of two.

Shapes: D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.config import OPTION_NAME
from actors.models.causal_lm import check_vocabulary, load_causal_lm
from actors.models.export import check_saved, save_model
from actors.models.option_names import CONTROL, option_token
from actors.models.suppressed import written_suppressed
from actors.models.tokenizer import load_tokenizer

_NAME = re.compile(OPTION_NAME)


def option_ids(tokenizer: Any, names: Sequence[str]) -> tuple[int, ...]:
    """The control tokens of these options, in their order.

    Raises ValueError for names that cannot be options, and for an option whose token the tokenizer does not know or
    would split.
    """
    _check_names(names)
    words = tokenizer.get_vocab()
    for name, token in zip(names, map(option_token, names), strict=True):
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if token not in words or found != [words[token]]:
            raise ValueError(
                f"tokenizer: must have a token of its own for the option {name!r}, got {token!r} as {found}; add it "
                "with `add_option_tokens`"
            )
    return tuple(words[token] for token in map(option_token, names))


def learned_options(path: str, tokenizer: Any) -> frozenset[int]:
    """The control tokens that a model may learn to predict: those of its tokenizer that it does not suppress.

    Where a demonstration's prompt ends with one, fine-tuning learns it with the reply, so that the state before it
    knows what would be chosen; a manager chooses from that state. path: folder or hub name of the model.
    """
    shown = {number for token, number in tokenizer.get_vocab().items() if CONTROL.fullmatch(token)}
    return frozenset(shown.difference(written_suppressed(path)))


def add_option_tokens(path: str, folder: Path, names: Sequence[str]) -> None:
    """Write the model at `path` to `folder` with a control token for each option, which it suppresses.

    A new token's embedding, and its row of an untied output head, is the mean over the tokens that were there. Tokens
    that the tokenizer knows already keep their weights. Weights keep the dtype that they have in their files. path:
    folder or hub name of a causal LM. names: of the options, in letters, digits, "-" and "_". Raises ValueError for
    names that cannot be options, for a model that cannot be loaded, and for a folder that is `path` itself.
    """
    _check_names(names)
    if Path(path).resolve() == folder.resolve():
        raise ValueError(f"folder: must be another one than the model's, got {str(folder)!r}; choose an empty one")
    model: Any = load_causal_lm(path, "auto")
    tokenizer = load_tokenizer(path)
    check_vocabulary(path, tokenizer, "model.path")
    before = tokenizer.get_vocab()
    _add_to_tokenizer(tokenizer, names, path)
    ids = option_ids(tokenizer, names)
    new = [number for name, number in zip(names, ids, strict=True) if option_token(name) not in before]
    _add_to_model(model, new, sorted(set(before.values())))
    settings = model.generation_config
    settings.suppress_tokens = sorted({*(settings.suppress_tokens or ()), *ids})
    save_model(model, tokenizer, folder)
    check_saved(model, tokenizer, folder)


def _check_names(names: Sequence[str]) -> None:
    rule = "options: must be one or more different names of letters and digits, joined by '-' or '_'"
    if not names:
        raise ValueError(f"{rule}, got none; name the options")
    for number, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{rule}, got {name!r}; rename it")
        if name in names[:number]:
            raise ValueError(f"{rule}, got {name!r} twice; remove one")


def _add_to_tokenizer(tokenizer: Any, names: Sequence[str], path: str) -> None:
    """Add the tokens as special ones; a token that is there keeps its id."""
    from tokenizers import AddedToken

    before = tokenizer.get_vocab()
    # not normalised, so that no lower-casing or Unicode form hides them
    tokens = [AddedToken(option_token(name), special=True, normalized=False) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    after = tokenizer.get_vocab()
    if {word: after.get(word) for word in before} != before or len(set(after.values())) != len(after):
        raise ValueError(
            f"model.path: must have a tokenizer whose ids have no gaps, got {path!r}, whose ids change when a token is "
            "added; choose another model"
        )


@torch.no_grad()
def _add_to_model(model: Any, new: Sequence[int], known: Sequence[int]) -> None:
    """Give the new tokens the mean weights of the known ones; the embeddings grow only if they have no row for them."""
    if not new:
        return
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(new) >= vocabulary:
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tables: list[Tensor] = [embeddings]
    if head.weight is not embeddings:
        tables.append(head.weight)
    if getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    for table in tables:  # (V, D), or (V,)
        table[list(new)] = table[list(known)].double().mean(0).to(table.dtype)
