"""The protocol of a generation engine, which turns requests into completions and does not use Ray.

Every engine keeps this contract: the result of `generate` depends only on the weights, requests, sampling, seed, the
partner's answers and the options chosen, never on earlier calls or on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from actors.config import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to generate; requests of one group are next to each other and share their prompt.

    A sample that was begun by an earlier call has M tokens of its reply already. It is a group of its own.
    """

    sample_id: int
    group_id: int
    prompt: npt.NDArray[np.int32]  # (P,), P >= 1
    begun: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # (M,)
    begun_logprobs: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # (M,)


def _no_features() -> npt.NDArray[np.float32]:
    return np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The tokens after a prompt: one turn of the policy, or several turns with the partner's answers between them.

    The stop token or stop string that ends a turn is part of it. logprobs[t] is the log-prob of tokens[t] under the
    distribution that it was drawn from: after temperature, top-k and top-p (at temperature 0: under the plain softmax).
    With a chooser there are O = N options for N turns, otherwise O = 0.
    """

    sample_id: int
    tokens: npt.NDArray[np.int32]  # (A,), A >= 1
    sampled: npt.NDArray[np.bool_]  # (A,), false where the token is part of an answer or a control token
    logprobs: npt.NDArray[np.float32]  # (A,), 0 where the token was not sampled
    turn_starts: tuple[int, ...]
    """(N,) the index in `tokens` of each turn's first sampled token; the turn's control token, if any, is before it."""
    finish: Literal["stop", "length", "paused"]
    """How the last turn ended: by a stop token or string, or because there was no room for it.

    paused: it has not ended, since the call's `pause_after` was reached.
    """
    options: npt.NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))  # (O,)
    option_logprobs: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # (O,)
    features: npt.NDArray[np.float32] = field(default_factory=_no_features)  # (O, D), what each option was chosen from
    last_features: npt.NDArray[np.float32] | None = None
    """(D,) features of the last token, if a chooser was given and an answer with `is_last` was appended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of the policy, as the partner receives it."""

    sample_id: int
    number: int  # number of the turn in its conversation, from 0
    tokens: npt.NDArray[np.int32]  # (A,), 1 <= A <= max_new_tokens
    finish: Literal["stop", "length"]
    room: int
    """Most tokens that an answer may have, so that the next turn fits after it; may be negative.

    A turn needs room for one sampled token and, with a chooser, for its control token.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a turn.

    tokens: (N,) appended after the turn, before the policy's next turn; None: the conversation is over. is_last: it is
    over with these tokens, of which there may be one more than `Turn.room`.
    """

    sample_id: int
    tokens: npt.NDArray[np.int32] | None
    is_last: bool = False


class Partner(Protocol):
    """Answers the policy's turns while other conversations go on.

    An answer may depend on its conversation alone: not on when it is asked for, or on the other turns of the call.
    """

    def hear(self, turns: Sequence[Turn]) -> None:
        """Take these turns to answer them; returns at once."""
        ...

    def answers(self, *, wait: bool) -> Sequence[Answer]:
        """The answers that are ready; each is returned once.

        wait: block until there is at least one, because the engine has nothing else to do. The partner keeps its own
        deadline.
        """
        ...


class OptionChooser(Protocol):
    """Chooses an option for each turn; the option's control token is appended before the turn.

    A choice may depend on its own row alone: not on the other rows of the call, or on the order of the calls.
    """

    def choose(
        self,
        features: npt.NDArray[np.float32],
        sample_ids: npt.NDArray[np.int64],
        turns: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
        """Choose options for N turns that begin now; returns them and their log-probs, (N,) each.

        features: (N, D) state of the last token before each turn, after the model's final norm; finite. sample_ids,
        turns: (N,), which turn of which conversation a row is, turns from 0.
        """
        ...

    def token_of(self, option: int) -> int:
        """The control token of an option: a token of the model that the model suppresses."""
        ...


class Engine(Protocol):
    """Generates samples with the weights that were loaded last."""

    context: int
    """Longest sequence of the model, in tokens."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        seed: int,
        partner: Partner | None = None,
        chooser: OptionChooser | None = None,
        pause_after: int = 0,
    ) -> list[Completion]:
        """Complete every request, in the order given.

        pause_after: leave a request after so many sampled tokens, to be gone on with by another call; 0: never. Only
        without a partner.

        partner: answers each turn; without a partner a completion is a single turn. chooser: chooses an option for each
        turn; only together with a partner. The random numbers of a sample depend on (seed, sample_id) alone. The limit
        sampling.max_new_tokens applies to the sampled tokens of each turn.
        """
        ...

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy these weights into the model, by the names of its `named_parameters()`.

        Raises ValueError for an unknown name or a different shape.
        """
        ...

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer saved beside the model."""
        ...
