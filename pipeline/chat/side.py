"""One side of a chat: a model in this process, its tokens so far, and its text as far as it is whole.

Text outside, tokens inside: what was said is encoded once and appended, and never encoded again.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.config import SamplingConfig
from actors.engine.decoder import Decoder
from actors.engine.streaming import last_state, stream
from actors.manager.option_head import OptionHead
from actors.models.text import TextCodec

Ids = list[int]


@dataclass(slots=True, kw_only=True)
class Reply:
    """One reply of a model. context: the tokens before it, its option's control token included."""

    begun_at: int  # number of tokens before the option and the reply
    context: Ids
    tokens: Ids = field(default_factory=list)
    text: str = ""
    option: str = ""
    has_ended: bool = False  # by itself; else it was cut off


@dataclass(slots=True, kw_only=True)
class Side:
    """A model and its side of the conversation. options: names and control tokens of the manager's options."""

    name: str
    engine: Decoder
    codec: TextCodec
    head: OptionHead | None = None
    options: Sequence[str] = ()
    control: Sequence[int] = ()
    tokens: Ids = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    episode: Any = None
    offered: Sequence[str] = ()
    is_over: bool = False

    def begin(self, tokens: Sequence[int]) -> None:
        """Begin a new conversation with a prompt."""
        self.tokens, self.replies, self.episode, self.offered, self.is_over = list(tokens), [], None, (), False

    def hear(self, text: str) -> None:
        """Append what the partner said, with its role markers."""
        [tokens] = self.codec.encode_continuations([text])
        # a layout begins with the end of the reply, which the model has said itself
        if tokens and self.replies and self.replies[-1].has_ended and tokens[0] == self.tokens[-1]:
            tokens = tokens[1:]
        self.tokens += tokens

    def take_back(self) -> None:
        """Forget the last reply, and what came after it."""
        reply = self.replies.pop()
        del self.tokens[reply.begun_at :]
        self.is_over = False

    def reply(self, sampling: SamplingConfig, *, seed: int, sample_id: int) -> Generator[str, None, None]:
        """Sample a reply; yields its option first ("" without a manager), then each piece of text as it becomes whole.

        A character whose bytes are spread over tokens appears with the last of them. Raises as `stream` does.
        """
        reply = Reply(begun_at=len(self.tokens), context=list(self.tokens))
        if self.head is not None:
            option = self._option(sampling, seed=seed, sample_id=sample_id)
            reply.option = self.options[option]
            reply.context.append(self.control[option])
        yield reply.option
        prompt = np.array(reply.context, np.int32)
        try:
            for token in stream(self.engine, prompt, sampling, seed=seed, sample_id=sample_id):
                reply.tokens.append(token)
                if piece := self._piece(reply, final=False):
                    yield piece
        finally:  # also when the reader has left: what was said was said
            if reply.tokens:
                reply.has_ended = reply.tokens[-1] in self.engine.ends
                self.tokens = [*reply.context, *reply.tokens]
                self.replies.append(reply)
        if piece := self._piece(reply, final=True):
            yield piece

    def _piece(self, reply: Reply, *, final: bool) -> str:
        """The text that is new; a text's end that may still change waits, unless the reply is over."""
        [text] = self.codec.decode_replies([reply.tokens])
        whole = text if final else text.rstrip("\ufffd")
        if not whole.startswith(reply.text):
            return ""  # a decoder that changes what came before: the reply's end tells it all
        piece = whole[len(reply.text) :]
        reply.text = whole
        return piece

    def _option(self, sampling: SamplingConfig, *, seed: int, sample_id: int) -> int:
        assert self.head is not None
        if not 0 < len(self.tokens) < self.engine.context - 1:
            raise ValueError(
                f"prompt: must have fewer than {self.engine.context - 1} tokens, so that the model's context has room "
                f"for an option and a reply, got {len(self.tokens)}; begin a new conversation"
            )
        offered = np.array([[not self.offered or name in self.offered for name in self.options]])
        found = self.head.choose(
            last_state(self.engine, np.array(self.tokens, np.int32)),
            offered,
            np.array([sample_id], np.int64),
            np.array([len(self.replies)], np.int32),
            seed=seed,
            greedy=sampling.temperature == 0,
        )
        return int(found.options[0])
