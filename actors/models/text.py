"""Text to tokens and back, the same in every stage from fine-tuning to evaluation.

    prompt        <s> | a person asks    special tokens written in it (role markers, a chat template's) are tokens
    reply         a model answers        plain text: the name of a special token is plain characters
    continuation  the person goes on     what follows a reply in a conversation; special tokens are tokens
    judged        <s> | prompt + reply   one text, as a classifier reads it, without padding at its end

The tokenizer's prefix (`<s>`, `[CLS]`) stands once at the beginning of every sequence, also if the text already begins
with it, as chat templates do. Decoding removes it. The tokenizer's suffix (`[SEP]`) ends only judged texts, because a
prompt goes on with a reply.

A reply is never at the beginning of a text, so it is encoded and decoded as it follows other text: SentencePiece-like
tokenizers add a space at a beginning, and drop it there. Decoding gives the encoded text back, as far as the tokenizer
has tokens for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = list[int]
Tokens = Sequence[int] | npt.NDArray[np.int32]

_MARKS = ("a", ".", "1", "\n")  # texts that a reply may follow while it is encoded or decoded
_PROBES = ("Sure thing", " Sure thing", "\nSüß", "a")


class TextCodec:
    """A tokenizer as `from_pretrained` returns it, used in the same way by every stage."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix, self.suffix = self._around()

    def encode_prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each prompt, with the tokenizer's prefix. An empty text gives the prefix alone."""
        return [self._begun(ids) for ids in self._ids(texts)]

    def encode_replies(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each reply as it follows a prompt, without the end-of-text token."""
        plain = self._ids(texts, is_reply=True)
        return (
            plain
            if self._follows_plainly
            else [self._following(text, ids) for text, ids in zip(texts, plain, strict=True)]
        )

    def encode_continuations(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text as it follows a reply; special tokens written in it are tokens, and there is no prefix."""
        plain = self._ids(texts)
        return (
            plain
            if self._follows_plainly
            else [self._following(text, ids, is_reply=False) for text, ids in zip(texts, plain, strict=True)]
        )

    def encode_judged(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Ids]:
        """Ids of each prompt with its reply, as a classifier reads them.

        Both are encoded as one text, as a classifier has learned to read it, unless the reply contains the name of a
        special token; then separately. Padding at the end is left out, because a classifier ignores it.
        """
        joint = self._ids([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)])
        apart = [
            row
            for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
            if self._names_special(prompt, reply)
        ]
        if apart:
            ends = self.encode_replies([replies[row] for row in apart])
            for row, prompt, reply in zip(apart, self._ids([prompts[row] for row in apart]), ends, strict=True):
                joint[row] = [*prompt, *reply]
        return [self._unpadded(self._ended(self._begun(ids))) for ids in joint]

    def decode_prompts(self, rows: Sequence[Tokens], *, special: bool = True) -> list[str]:
        """The text of each prompt without the tokenizer's prefix. special: write special tokens out."""
        if not special:
            return self._decode([self._known(self._unbegun(ids)) for ids in rows], special=False)
        # the samples of a group share their prompt
        unique = list(dict.fromkeys(tuple(int(token) for token in ids) for ids in rows))
        texts = self._decode([self._known(self._unbegun(ids)) for ids in unique], special=True)
        again = self.encode_prompts([text.removeprefix(" ") for text in texts])
        found = {
            ids: text.removeprefix(" ") if list(ids) == own else self._original(list(ids), text)
            for ids, text, own in zip(unique, texts, again, strict=True)
        }
        return [found[tuple(int(token) for token in ids)] for ids in rows]

    def decode_replies(self, rows: Sequence[Tokens], *, special: bool = False) -> list[str]:
        """The text of each reply as it follows its prompt. special: write special tokens out.

        Ids without a text are left out: embeddings are often padded beyond the vocabulary, so one can be sampled.
        """
        ids, mark = self._mark
        whole = self._decode([[*ids, *self._known(row)] for row in rows], special=special)
        return [text.removeprefix(mark) for text in whole]

    def without_special(self, text: str) -> str:
        """The text without the names of special tokens, which would be tokens in a prompt."""
        while self._special is not None and (rest := self._special.sub("", text)) != text:
            text = rest  # what is left may join to another name
        return text

    def shortened(self, ids: Ids, room: int) -> Ids:
        """The last `room` tokens of a sequence that is too long, the tokenizer's prefix included if it fits."""
        begin = self.prefix if len(self.prefix) < room and ids[: len(self.prefix)] == self.prefix else []
        rest = ids[len(begin) :]
        return [*begin, *rest[max(len(rest) - (room - len(begin)), 0) :]]

    @property
    def padding(self) -> int | None:
        """The token that a classifier ignores at the end: the padding token or, without one, the end of text."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _ids(self, texts: Sequence[str], *, is_reply: bool = False) -> list[Ids]:
        if not texts:
            return []
        ids: list[Ids] = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=is_reply)[
            "input_ids"
        ]
        return ids

    def _decode(self, rows: Sequence[Ids], *, special: bool) -> list[str]:
        if not rows:
            return []
        texts: list[str] = self.tokenizer.batch_decode(
            list(rows), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return texts

    def _known(self, ids: Tokens) -> Ids:
        return [int(token) for token in ids if 0 <= token < self._words]

    def _begun(self, ids: Ids) -> Ids:
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]

    def _unbegun(self, ids: Tokens) -> Tokens:
        return ids[len(self.prefix) :] if list(ids[: len(self.prefix)]) == self.prefix else ids

    def _ended(self, ids: Ids) -> Ids:
        return [*ids, *self.suffix] if self.suffix and ids[-len(self.suffix) :] != self.suffix else ids

    def _unpadded(self, ids: Ids) -> Ids:
        end = len(ids)
        while end > 1 and ids[end - 1] == self.padding:
            end -= 1
        return ids[:end]

    def _names_special(self, prompt: str, reply: str) -> bool:
        """Whether the name of a special token ends in the reply; it may begin in the prompt."""
        if self._special is None:
            return False
        tail = max(len(prompt) - self._longest_special, 0)
        return any(found.end() > len(prompt) for found in self._special.finditer(prompt + reply, tail))

    def _following(self, text: str, plain: Ids, *, is_reply: bool = True) -> Ids:
        """The ids that decode to the text when it follows other text: its own, or those that it has after a mark."""
        if self.decode_replies([plain], special=True) == [text]:
            return plain
        for mark in _MARKS:
            before, both = self._ids([mark, mark + text], is_reply=is_reply)
            rest = both[len(before) :]
            if both[: len(before)] == before and self.decode_replies([rest], special=True) == [text]:
                return rest
        return plain  # the tokenizer has no words for it

    def _original(self, ids: Ids, text: str) -> str:
        """A text that encodes to these ids of a prompt: the first candidate that does. text: their plain decoding."""
        bare = self._unbegun(ids)
        choices = [text, f" {text}", self._piecewise(bare), *self._decode([self._known(ids)], special=True)]
        return next((choice for choice in choices if self.encode_prompts([choice]) == [ids]), text)

    def _piecewise(self, ids: Tokens) -> str:
        """Decode the text between added tokens piece by piece, because some tokenizers restart after each."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        pieces = [
            (is_added, list(group)) for is_added, group in groupby(self._known(ids), key=lambda token: token in added)
        ]
        return "".join(
            "".join(added[token].content for token in group) if is_added else self._decode([group], special=True)[0]
            for is_added, group in pieces
        )

    def _around(self) -> tuple[Ids, Ids]:
        """(prefix, suffix): the ids that the tokenizer puts before a text and after it."""
        for text in _MARKS:
            bare, whole = self._ids([text])[0], self.tokenizer(text)["input_ids"]
            start = next(
                (start for start in range(len(whole)) if bare and whole[start : start + len(bare)] == bare), None
            )
            if start is not None:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    @cached_property
    def _words(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def _mark(self) -> tuple[Ids, str]:
        """(ids, text) that a reply follows while it is decoded; empty if the tokenizer knows no mark."""
        for text in _MARKS:
            [ids] = self._ids([text])
            [decoded] = self._decode([ids], special=True)
            if decoded.strip(" ") == text.strip(" "):
                return ids, decoded
        return [], ""

    @cached_property
    def _follows_plainly(self) -> bool:
        """Whether a reply has the same ids alone as after other text, as with any byte-level BPE."""
        return self.decode_replies(self._ids(_PROBES), special=True) == list(_PROBES)

    @cached_property
    def _special_names(self) -> list[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token.content) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return sorted((name for name in names if name), key=lambda name: (-len(name), name))

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(re.escape, self._special_names))) if self._special_names else None

    @cached_property
    def _longest_special(self) -> int:
        return len(self._special_names[0])
