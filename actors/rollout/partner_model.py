"""A frozen language model that says the next line of many conversations, on an engine of its own.

    texts up to where a line begins --encode--> prompts --one call of the engine--> tokens --cut, decode--> Lines

consumes    texts, from any number of threads
waits for   the model, which computes in one thread of its own
unblocked   by the line: texts that came while it was busy share its next call

A line depends on (weights, text, number, sampling) alone, so it is the same to the bit, whatever shared the call. A
conversation is read anew for each line: its keys and values are not kept.

Left out: training it, and whose lines are which (the caller lays the text out).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from actors.config import RolloutConfig, SamplingConfig
from actors.engine.protocol import Completion, Request
from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer
from actors.reward.scoring import what_went_wrong

if TYPE_CHECKING:
    from actors.engine.torch_engine import TorchEngine

FIELD = "environment.partner"
_SEED = 0  # the number of a line is the whole key of its random numbers
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What the model said.

    text: without end of text, stop string and names of special tokens; may be empty. tokens: sampled for it. is_cut: it
    had no room to end. is_full: nothing was said, because the conversation fills the model's context. failure: why the
    model failed, or "".
    """

    text: str = ""
    tokens: int = 0
    is_cut: bool = False
    is_full: bool = False
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A line that is asked for. number: the key of its random numbers."""

    prompt: npt.NDArray[np.int32]  # (P,), shorter than the model's context
    number: int
    line: Future[Line]


class PartnerModel:
    """A causal LM with its tokenizer; the tokenizer is read when it is first used, the weights by `load`."""

    def __init__(self, path: str, config: RolloutConfig, sampling: SamplingConfig) -> None:
        """path: folder or hub name. config: slots, dtype and device, as of a rollout worker.

        sampling: of its lines; each ends before the first of the stop strings.
        """
        self.path, self._config, self._sampling = path, config, sampling
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="partner")  # the only one that computes
        self._lock = threading.Lock()  # of _waiting
        self._waiting: list[_Asked] = []

    def load(self) -> None:
        """Load the weights, if they are not loaded. Raises ValueError when there are none."""
        self._in_thread(lambda: (self.codec, self.version))

    @cached_property
    def version(self) -> str:
        """The checksum of the weights as they were loaded, in hexadecimal."""
        from actors.weights import parameters_checksum

        return parameters_checksum(self._engine.model)

    @cached_property
    def codec(self) -> TextCodec:
        """The model's tokenizer. Raises ValueError when there is none."""
        return TextCodec(load_tokenizer(self.path, FIELD))

    @cached_property
    def context(self) -> int:
        """The longest sequence of the model, in tokens."""
        from actors.models.causal_lm import context_of

        return context_of(self.path)

    def has_room(self, text: str) -> bool:
        """Whether at least one token fits after this text."""
        [ids] = self.codec.encode_prompts([text])
        return len(ids) < self.context

    def say(self, texts: Sequence[str], numbers: Sequence[int]) -> list[Line]:
        """The line after each text. numbers: each decides all chance in its line; from 0 to 2**63 - 1."""
        lines: list[Future[Line]] = [Future() for _ in texts]
        asked = []
        for ids, number, line in zip(self.codec.encode_prompts(texts), numbers, lines, strict=True):
            if len(ids) < self.context:
                asked.append(_Asked(prompt=np.array(ids, np.int32), number=number, line=line))
            else:
                line.set_result(Line(is_full=True))
        with self._lock:
            self._waiting += asked
        self._in_thread(self._answer_waiting)
        return [line.result() for line in lines]

    def _in_thread(self, call: Callable[[], T]) -> T:
        return self._thread.submit(call).result()

    def _answer_waiting(self) -> None:
        """Answer all that waits; that may be nothing, where an earlier call has answered it already."""
        with self._lock:
            asked, self._waiting = self._waiting, []
        self._answer(asked)

    def _answer(self, asked: Sequence[_Asked]) -> None:
        """Set the line of each; if the model fails, each is asked for alone, so that no failure is a neighbour's."""
        try:
            lines = self._lines(asked)
        except Exception as error:  # noqa: BLE001  whatever it is, it becomes a status of the conversation at fault
            if len(asked) > 1:
                for one in asked:
                    self._answer([one])
                return
            lines = [Line(failure=f"error: the partner failed: {what_went_wrong(error)}")] * len(asked)
        for one, line in zip(asked, lines, strict=True):
            one.line.set_result(line)

    def _lines(self, asked: Sequence[_Asked]) -> list[Line]:
        requests = [Request(sample_id=one.number, group_id=place, prompt=one.prompt) for place, one in enumerate(asked)]
        return [self._line(one) for one in self._engine.generate(requests, self._sampling, seed=_SEED)]

    def _line(self, completion: Completion) -> Line:
        tokens = completion.tokens
        if tokens[-1] in self._engine.ends:
            tokens = tokens[:-1]
        [text] = self.codec.decode_replies([tokens], special=True)  # a stop string may be the name of a special token
        ends = [text.find(stop) for stop in self._sampling.stop if stop in text]
        said = self.codec.without_special(text[: min(ends, default=len(text))])
        return Line(text=said, tokens=len(completion.tokens), is_cut=completion.finish == "length")

    @cached_property
    def _engine(self) -> TorchEngine:
        from actors.device import assigned_compute
        from actors.engine.torch_engine import TorchEngine

        return TorchEngine(self.path, self._config, assigned_compute(self._config.gpus).device)
