"""The texts of the world, whose words are its tokenizer's vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.models.option_names import option_token
from pipeline.environments.world.grammar import ARTICLES
from pipeline.environments.world.partner_frames import PARTNER
from pipeline.environments.world.speaker_frames import SPEAKER
from pipeline.environments.world.topics import NOUNS
from pipeline.tasks.smalltalk import BOT, USER
from pipeline.tasks.tokenizers import word_tokenizer


def world_texts() -> Iterator[str]:
    """Texts that together have every word and punctuation mark of the world, in a fixed order."""
    for word in (*NOUNS, *ARTICLES):
        yield f" {word}"
    for own in (*SPEAKER.values(), *PARTNER.values()):
        for text in (*own.openers, *own.frames, *own.closers):
            if text:
                yield re.sub(r" \{\w+\}", "", f" {text}")


def world_tokenizer(folder: Path, options: Sequence[str] = ()) -> None:
    """Write a tokenizer of one token for each word of the world, and a control token for each option."""
    word_tokenizer(world_texts(), folder, roles=(USER, BOT), control=[option_token(name) for name in options])
