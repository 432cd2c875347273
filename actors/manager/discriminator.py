"""The discriminator: it guesses a turn's option from what was said, and so tells whether options differ in words.

    q(o | u) = softmax(W · x(u)) over the options on offer        diversity of a turn: log q(o | u) - log p(o)

x(u) counts the tokens of the utterance u and its pairs of neighbouring tokens, hashed into a fixed number of buckets,
and is scaled to length 1. p is uniform over the options on offer. Eysenbach et al. 2018, "Diversity is All You Need".

- A turn is scored before the discriminator has learnt from it. One that had would know the turn again by its rare pairs
  of tokens, and pay nearly log K for any utterance. So log q is a prediction of new turns, its mean diversity falls
  below 0 where options sound alike, and a discriminator that was never trained pays 0.
- It learns by weighted cross-entropy, as if options had been drawn from p: a turn weighs p(o) / pi(o | h), at most
  MAX_WEIGHT. Otherwise it would guess what the manager prefers instead of listening.
- There is no constant per option: what it has never heard leaves it undecided, whose diversity is 0.
- All is exact: nothing is random, a pass over the turns is one step of Adam, and logits and gradients add their terms
  one after the other, in the order of turns and buckets.

Shapes: N turns, K options, M pairs of a turn and a bucket that occurs in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actors import ragged
from actors.config import ManagerConfig
from actors.manager.reports import DiscriminatorReport
from actors.manager.turns import Turns

BUCKETS = 2**13
MAX_WEIGHT = 10.0  # of a turn whose option was unlikely

_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_SHIFT = np.uint64(64 - BUCKETS.bit_length() + 1)
_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HashedWords:
    """x(u) of N utterances: the entries that are not 0, by utterance, then by bucket. The same words, the same bits."""

    row: npt.NDArray[np.int64]  # (M,)
    bucket: npt.NDArray[np.int64]  # (M,)
    value: _Numbers  # (M,)
    rows: int  # N

    @classmethod
    def of(cls, tokens: ragged.Array, offsets: ragged.Array) -> HashedWords:
        """Utterance i is `tokens[offsets[i]:offsets[i + 1]]`."""
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        has_next = row[1:] == row[:-1]
        bucket = np.concatenate([_hash(tokens), _hash(tokens[:-1][has_next], tokens[1:][has_next])])
        places, counts = np.unique(np.concatenate([row, row[1:][has_next]]) * BUCKETS + bucket, return_counts=True)
        row, bucket = np.divmod(places, BUCKETS)
        length = np.sqrt(np.bincount(row, counts.astype(np.float64) ** 2, len(offsets) - 1))
        return cls(row=row, bucket=bucket, value=counts / length[row], rows=len(offsets) - 1)

    def logits(self, weight: _Numbers) -> _Numbers:
        """x W': (K, BUCKETS) -> (N, K)."""
        return np.stack([np.bincount(self.row, self.value * own[self.bucket], self.rows) for own in weight], axis=1)

    def gradient(self, error: _Numbers) -> _Numbers:
        """error' x: (N, K) -> (K, BUCKETS)."""
        return np.stack([np.bincount(self.bucket, self.value * own[self.row], BUCKETS) for own in error.T])


class Discriminator:
    """q(o | u) of one manager, with its optimiser."""

    def __init__(self, config: ManagerConfig) -> None:
        """All weights begin at zero: every option on offer is equally likely."""
        self._config = config
        self.weight = torch.zeros(len(config.options), BUCKETS)
        self.adam = torch.optim.Adam(
            [self.weight], lr=config.discriminator_learning_rate, eps=config.adam_epsilon, foreach=False
        )

    def log_q(self, turns: Turns) -> npt.NDArray[np.float32]:
        """log q(o | u) of each turn's own option, (N,); at most 0, and 0 where no other was on offer."""
        return _own(self._log_probs(turns, HashedWords.of(*turns.utterances)), turns).astype(np.float32)

    def learn(self, turns: Turns) -> DiscriminatorReport:
        """Learn from a step's turns; what is reported is from before."""
        words, config = HashedWords.of(*turns.utterances), self._config
        log_p = -np.log(turns.offered.sum(1))  # (N,)
        weights = np.exp(np.minimum(log_p - turns.column("option_logprob"), np.log(MAX_WEIGHT)))
        weights /= weights.sum()
        chosen = np.zeros(turns.offered.shape)
        chosen[np.arange(len(turns)), turns.column("option")] = 1
        first = self._log_probs(turns, words)
        for _ in range(config.discriminator_epochs):
            error = (np.exp(self._log_probs(turns, words)) - chosen) * weights[:, None]  # 0 where not on offer
            self.weight.grad = torch.from_numpy(words.gradient(error).astype(np.float32))
            self.adam.step()
        own = _own(first, turns)
        return DiscriminatorReport(
            loss=-float((weights * own).sum()),
            accuracy=float((first.argmax(1) == turns.column("option")).mean()),
            reward=config.diversity_coef * float((own - log_p).mean()),
        )

    def _log_probs(self, turns: Turns, words: HashedWords) -> _Numbers:
        """log q of every option, (N, K); minus infinity where it is not on offer."""
        logits = np.where(turns.offered, words.logits(self.weight.numpy().astype(np.float64)), -np.inf)
        logits -= logits.max(1, keepdims=True)
        found: _Numbers = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return found


def _own(log_probs: _Numbers, turns: Turns) -> _Numbers:
    """The entry of each turn's own option, (N, K) -> (N,)."""
    own: _Numbers = log_probs[np.arange(len(turns)), turns.column("option")]
    return own


def _hash(*tokens: ragged.Array) -> npt.NDArray[np.int64]:
    """The bucket of each token, or of each pair of tokens: the top bits of a product, the same on every machine."""
    mixed = np.zeros(len(tokens[0]), np.uint64)
    for own in tokens:
        mixed = (mixed ^ (own.astype(np.uint64) + np.uint64(1))) * _FIRST
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _SECOND
    return (mixed >> _SHIFT).astype(np.int64)
