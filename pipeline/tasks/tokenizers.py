"""Tokenizers for models that are trained from scratch, saved as Hugging Face fast tokenizers.

End-of-text and padding are different tokens: a padding token that is also end-of-text hides where a text ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END, PAD = "<|endoftext|>", "<|pad|>"
_WORD = r" ?[A-Za-z]+| ?[^A-Za-z]"  # a word or a punctuation mark, with the space before it


def train_byte_bpe(texts: Iterable[str], folder: Path, *, vocab_size: int, special: Sequence[str] = ()) -> None:
    """Train a byte-level BPE of at most `vocab_size` tokens, which encodes any text without loss.

    special: further tokens, such as role markers, that stand for themselves wherever they appear in text. Ids: END 0,
    PAD 1, then `special`, then 256 bytes and the merges. The same texts in any order give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258 + len(special):
        raise ValueError(
            f"vocab_size: must be >= {258 + len(special)} (256 bytes and the special tokens), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _save(tokenizer, folder, special)


def character_tokenizer(alphabet: str, folder: Path) -> None:
    """Write a tokenizer of one token a character. Ids: END 0, PAD 1, then `alphabet`; other characters become PAD."""
    _save(_whole_pieces([END, PAD, *alphabet], "."), folder, ())


def word_tokenizer(
    texts: Iterable[str], folder: Path, *, roles: Sequence[str] = (), control: Sequence[str] = ()
) -> None:
    """Write a tokenizer of one token for each word and punctuation mark of these texts, with the space before it.

    Such a vocabulary has no parts of words, so even a small model can only say whole words. Ids: END 0, PAD 1, then
    the role markers, the words as they first occur, and the control tokens; other words become PAD.
    """
    words = dict.fromkeys(word for text in texts for word in re.findall(_WORD, text))
    _save(_whole_pieces([END, PAD, *roles, *words, *control], _WORD), folder, [*roles, *control])


def _whole_pieces(vocabulary: Sequence[str], pattern: str) -> Tokenizer:
    """A tokenizer with a token for each text that matches the pattern and is in the vocabulary; others become PAD."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path, special: Sequence[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(special),
        padding_side="right",
    )
    fast.save_pretrained(folder)
