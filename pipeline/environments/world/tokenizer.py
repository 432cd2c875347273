"""A tokenizer with one token for each word of the world.

The vocabulary is small and holds no parts of words, so even a small model can only say whole words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from actors.models.option_names import option_token
from pipeline.environments.world.grammar import ARTICLES, FrameSet
from pipeline.environments.world.partner_frames import PARTNER
from pipeline.environments.world.speaker_frames import SPEAKER
from pipeline.environments.world.topics import NOUNS
from pipeline.tasks.smalltalk import BOT, USER
from pipeline.tasks.tokenizers import END, PAD

PIECE = r" ?[A-Za-z]+| ?[^A-Za-z]"  # a word or a punctuation mark, with the space before it


def world_words() -> list[str]:
    """Every word and punctuation mark of the world, with the space before it if it has one, in a fixed order."""
    texts = [f" {word}" for word in (*NOUNS, *ARTICLES)]
    frames: list[FrameSet] = [*SPEAKER.values(), *PARTNER.values()]
    for own in frames:
        texts += [f" {text}" for text in (*own.openers, *own.frames, *own.closers) if text]
    pieces = (piece for text in texts for piece in re.findall(PIECE, re.sub(r" \{\w+\}", "", text)))
    return list(dict.fromkeys(pieces))


def save_word_tokenizer(folder: Path, options: Sequence[str] = ()) -> None:
    """Write the tokenizer in Hugging Face's format.

    Ids: END is 0, PAD is 1, then both role markers, then the words, then a control token for each option. An unknown
    word becomes PAD.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = [option_token(name) for name in options]
    vocabulary = {token: number for number, token in enumerate([END, PAD, USER, BOT, *world_words(), *control])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, BOT, *control],
        padding_side="right",
    ).save_pretrained(folder)
