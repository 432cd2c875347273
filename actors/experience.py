"""The tables that cross process boundaries: one declared Arrow schema a type, checked at construction.

    Prompts --rollout--> Rollouts --reward----> Scores
                            |-----reference---> TokenLogprobs
                            |-----critic------> TokenValues
                            `-----assemble----> Experience --learner--> new weights
    Comparisons --learner--> a reward model

Sequences are ragged list columns: nothing is padded on the wire, a slice costs nothing and Ray sends only its
own bytes, and a step's table is written to Parquet as it is. Every list column that speaks of tokens is
aligned with `tokens`; entries where `action_mask` is false are zero (versions: -1) and mean nothing.

`Experience` and `Comparisons` take extra columns, declared by whoever makes them: what one loss alone needs (see
`table.py`).

What was left out: tensors and padding (see `ragged.py`); they exist only inside a model call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.table import TypedTable, required

CONVERSATION = "conversation"  # the entry of a rollout's metadata that says what the environment said

_ids = [("sample_id", pa.int64())]
_tokens = [("tokens", pa.list_(pa.int32()))]
_rollout = [
    ("sample_id", pa.int64()),
    ("group_id", pa.int64()),
    ("tokens", pa.list_(pa.int32())),
    ("action_mask", pa.list_(pa.bool_())),
    ("logprobs", pa.list_(pa.float32())),
    ("versions", pa.list_(pa.int32())),
    ("turn_starts", pa.list_(pa.int32())),
    ("option", pa.list_(pa.int16())),
    ("option_logprobs", pa.list_(pa.float32())),
    ("option_features", pa.list_(pa.float32())),
    ("options_offered", pa.list_(pa.bool_())),
    ("last_features", pa.list_(pa.float32())),
    ("finish", pa.string()),
    ("metadata", pa.string()),
]
_OF_OPTIONS = ("option_features", "options_offered", "last_features")


@dataclass(frozen=True, slots=True)
class Prompts(TypedTable):
    """One row a group: the prompt that its `group_size` samples share.

    group_id: c, the c-th draw of the run; sample k of it is `c * group_size + k`. A prompt drawn again has another one.
    tokens:   the prompt's token ids.
    metadata: JSON object of the prompt's row, handed to reward functions.
    """

    schema: ClassVar[pa.Schema] = required([("group_id", pa.int64()), *_tokens, ("metadata", pa.string())])


@dataclass(frozen=True, slots=True)
class Rollouts(TypedTable):
    """Prompt and sampled tokens, with the log-probs they were sampled with. Example of one row:

    tokens       [11, 12, 13, 40, 41, 2]     prompt of 3, then 3 sampled tokens
    action_mask  [ 0,  0,  0,  1,  1, 1]
    logprobs     [ 0,  0,  0, -1.2, -.3, -.1]   log pi(tokens[t] | tokens[:t]), at the sampling temperature
    versions     [-1, -1, -1,  7,  7, 7]     weights that produced each token
    turn_starts  [3]                         index of each turn's first action token
    option, option_logprobs                  one per turn with a manager, else empty, like the next three:
    option_features, options_offered         D features, from which the option was chosen, and K offers, of each turn,
                                             one turn after the other
    last_features                            the D features after a conversation that was broken off
    finish       stop | length | error; paused in a chunk that is not whole yet
    metadata     of the prompt; in a conversation also {"conversation": {"opening", "turns": [{"reward", "line",
                 "info"}, ...], "end", "failure"}}, what the environment said (see rollout/conversations.py)

    In a conversation, the environment's tokens stand between the turns, and action_mask is false there. Where it was
    broken off (end is truncated or max_turns), its tokens end with the environment's last line and, without a manager,
    one end of text in the place of the token that would have been sampled next.
    """

    may_be_empty: ClassVar[tuple[str, ...]] = _OF_OPTIONS
    schema: ClassVar[pa.Schema] = required(_rollout)


@dataclass(frozen=True, slots=True)
class Scores(TypedTable):
    """Reward of each rollout. Only a row whose status is `ok` has a reward; a failure is never a zero.

    turn_rewards: one per turn, or empty where the reward speaks of the whole. detail: what went wrong, or "".
    """

    schema: ClassVar[pa.Schema] = required(
        [
            *_ids,
            ("reward", pa.float32()),
            ("turn_rewards", pa.list_(pa.float32())),
            ("status", pa.string()),
            ("detail", pa.string()),
        ]
    )


@dataclass(frozen=True, slots=True)
class TokenLogprobs(TypedTable):
    """Log-probs of a rollout's tokens under another model (reference, or the learner's own), aligned with tokens."""

    schema: ClassVar[pa.Schema] = required([*_ids, ("logprobs", pa.list_(pa.float32()))])


@dataclass(frozen=True, slots=True)
class TokenValues(TypedTable):
    """values[t] = V(tokens[:t]), the critic's value of the state in which tokens[t] was chosen, aligned with tokens."""

    schema: ClassVar[pa.Schema] = required([*_ids, ("values", pa.list_(pa.float32()))])


@dataclass(frozen=True, slots=True)
class Experience(TypedTable):
    """A rollout made ready to train on. Every list column that is not of turns is aligned with tokens.

    turn_advantages: the manager's advantage of each turn; empty without a manager. turn_log_q: its discriminator's
    log q(option | utterance) of each turn; empty without one. proximal_logprobs: log-probs under the learner's policy
    before its first update of the step (the ratio's denominator). reference_logprobs, values: zero where the algorithm
    needs no reference or no critic.
    """

    takes_extra: ClassVar[bool] = True
    may_be_empty: ClassVar[tuple[str, ...]] = (*_OF_OPTIONS, "turn_advantages", "turn_log_q")
    schema: ClassVar[pa.Schema] = required(
        [
            *_rollout,
            ("reward", pa.float32()),
            ("turn_rewards", pa.list_(pa.float32())),
            ("turn_advantages", pa.list_(pa.float32())),
            ("turn_log_q", pa.list_(pa.float32())),
            ("proximal_logprobs", pa.list_(pa.float32())),
            ("reference_logprobs", pa.list_(pa.float32())),
            ("values", pa.list_(pa.float32())),
            ("advantages", pa.list_(pa.float32())),
            ("returns", pa.list_(pa.float32())),
        ]
    )


@dataclass(frozen=True, slots=True)
class Comparisons(TypedTable):
    """Texts that were compared, a row a comparison: its texts one after the other, the best first.

    Example of one row, two texts of one prompt:

    tokens          [11, 12, 13, 40, 2,  11, 12, 13, 50, 51, 2]   prompt, reply and end of text, twice
    action_mask     [ 0,  0,  0,  0, 1,   0,  0,  0,  0,  0, 1]   true at each end of text
    segment_starts  [0, 5]                                        where each text begins
    margin          by how much the best is better, or 0
    """

    takes_extra: ClassVar[bool] = True
    schema: ClassVar[pa.Schema] = required(
        [
            *_ids,
            *_tokens,
            ("action_mask", pa.list_(pa.bool_())),
            ("segment_starts", pa.list_(pa.int32())),
            ("margin", pa.float32()),
        ]
    )

    def __post_init__(self) -> None:
        """Raises ValueError naming column and row unless every row has two or more well-formed texts.

        A text has at least two tokens, of which the last is marked as an action.
        """
        TypedTable.__post_init__(self)
        starts, first = ragged.flat(self.table["segment_starts"])
        offsets = ragged.flat(self.table["tokens"])[1]
        mask, mask_offsets = ragged.flat(self.table["action_mask"])
        self._must("segment_starts", np.diff(first) >= 2, "must begin at least two texts")
        row = np.repeat(np.arange(len(self)), np.diff(first))
        ends = np.roll(starts, -1)
        ends[first[1:] - 1] = np.diff(offsets)  # a row's last text ends with the row
        self._must("segment_starts", starts[first[:-1]] == 0, "must begin with 0")
        self._must(
            "segment_starts",
            _all(ends - starts >= 2, row, len(self)),
            "must ascend within tokens, each text of at least two tokens",
        )
        self._must("action_mask", np.diff(mask_offsets) == np.diff(offsets), "must be aligned with tokens")
        last = np.zeros(len(mask), bool)
        last[offsets[row] + ends - 1] = True
        self._must(
            "action_mask",
            _all(mask == last, np.repeat(np.arange(len(self)), np.diff(offsets)), len(self)),
            "must mark each text's last token alone",
        )
        self._must("margin", np.isfinite(self.table["margin"].to_numpy()), "must be finite")

    @classmethod
    def of_texts(cls, rankings: Sequence[Sequence[Sequence[int]]], margins: Sequence[float] | None = None) -> Self:
        """The table of comparisons, numbered from 0.

        rankings: the ids of the texts of each, the best first, each with its end of text. margins: 0 if not given.
        """
        flat = [text for ranking in rankings for text in ranking]
        ends = np.cumsum([len(text) for text in flat], dtype=np.int64)
        # where each row's texts begin, among all texts
        texts = np.concatenate([[0], np.cumsum([len(ranking) for ranking in rankings], dtype=np.int64)])
        offsets = np.concatenate([[0], ends])[texts]
        action = np.zeros(offsets[-1], np.bool_)
        action[ends - 1] = True
        starts = np.concatenate([[0], ends])[:-1] - np.repeat(offsets[:-1], np.diff(texts))
        tokens = np.array([token for text in flat for token in text], np.int32)
        return cls.of(
            {
                "sample_id": np.arange(len(rankings)),
                "tokens": ragged.unflat(tokens, offsets, pa.int32()),
                "action_mask": ragged.unflat(action, offsets, pa.bool_()),
                "segment_starts": ragged.unflat(starts.astype(np.int32), texts, pa.int32()),
                "margin": [0.0] * len(rankings) if margins is None else list(margins),
            }
        )

    def _must(self, name: str, holds: ragged.Array, rule: str) -> None:
        if not holds.all():
            row = int(np.argmin(holds))
            raise ValueError(f"Comparisons.{name}: {rule}, got {self.table[name][row].as_py()} in row {row}")


def _all(holds: ragged.Array, row: ragged.Array, rows: int) -> ragged.Array:
    """Whether all entries of each row hold, (rows,)."""
    return np.asarray(np.bincount(row, ~holds, minlength=rows) == 0)
