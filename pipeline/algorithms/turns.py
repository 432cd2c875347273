"""Conversations and options: the credit of turns, and the two levels of a hierarchical policy. Pure functions.

The manager chooses an option o before each turn, the worker then samples the tokens of the turn, the utterance u.

    tokens        prompt  <opt_2>  a  a  a  environment ...  <opt_0>  a  a
    action mask      0       0     1  1  1       0              0     1  1
    turn number                    0  0  0                            1  1

The option token is the last token before the turn's first action token. It was not sampled by the worker, so it is no
action token and has no loss. A critic's value at an action token is that of the state in which the token was chosen.
So the worker's value V_L at the turn's first action token has seen the option, and is Q(s, o). The value that is stored
at the option token itself has not seen it, and is not used.

Shapes: B conversations, A action tokens and T turns of the longest ones (both right-padded), K options, C outcomes.
`mask` (B, A) and `real` (B, T) are true where real. Padded places may hold anything, NaN included: every function
selects with `where`. Tokens of the environment and option tokens are in no grid, so that nothing here can stop, decay
or be discounted at them.

Left out: options that last several turns. An option lasts one turn, so the manager's discount counts turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from cluster.config import Config
from pipeline.algorithms.base import Advantages
from pipeline.algorithms.estimators import gae, whiten
from pipeline.algorithms.losses import MAX_LOG_RATIO

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The turn of each action token. Boundaries are explicit, so that a turn of reward 0 is a turn like any other.

    Example, a conversation of two turns (3 tokens and 1 token) and one of a single turn (2 tokens):

    mask    [[1, 1, 1, 1], [1, 1, 0, 0]]
    number  [[0, 0, 0, 1], [0, 0, -, -]]
    real    [[1, 1], [1, 0]]

    Raises ValueError naming field and row unless the turns of each conversation are numbered 0, 1, ... and each of them
    has an action token. A conversation without any turn is allowed.
    """

    mask: Tensor  # (B, A) bool
    number: Tensor  # (B, A) int64
    real: Tensor  # (B, T) bool

    def __post_init__(self) -> None:
        shapes = tuple(tuple(grid.shape) for grid in (self.mask, self.number, self.real))
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[2][:1] != shapes[0][:1] or 0 in self.mask.shape[1:]:
            raise ValueError(f"Turns: mask, number and real must be (B, A), (B, A) and (B, T), got {shapes}")
        for name, grid in (("mask", self.mask), ("real", self.real)):
            self._must(name, ~(grid[:, 1:] & ~grid[:, :-1]).any(dim=1), "be padded on the right alone")
        rise = self.number.diff(dim=1)
        steady = ((rise == 0) | (rise == 1) | ~self.mask[:, 1:]).all(dim=1)
        self._must("number", steady, "rise by 0 or 1 from an action token to the next")
        self._must("number", (self.number[:, 0] == 0) | ~self.mask[:, 0], "be 0 at the first action token")
        found = (self.number + 1).where(self.mask, 0).amax(dim=1)
        counted = found == self.real.sum(dim=1)
        self._must("real", counted, "mark as many turns as have action tokens; leave out a turn without one")

    @classmethod
    def of_starts(cls, starts: Tensor, real: Tensor, positions: Tensor, mask: Tensor) -> Turns:
        """The turns of conversations by the indices of their tokens, environment tokens included.

        starts: (B, T) int64, `turn_starts`, the index of each turn's first action token. positions: (B, A) int64, the
        index of each action token.
        """
        number = positions.new_full(positions.shape, -1)
        for start, begun in zip(starts.t(), real.t(), strict=True):  # (B,) each; no table of B x A x T is made
            number += (positions >= start[:, None]) & begun[:, None]
        return cls(mask=mask, number=number, real=real)

    @property
    def index(self) -> Tensor:
        """The turn of each action token, (B, A) int64; 0 where not real."""
        return self.number.where(self.mask, 0)

    @property
    def begins(self) -> Tensor:
        """Whether an action token is the first of its turn, (B, A) bool."""
        first = self.mask.clone()
        first[:, 1:] &= self.number.diff(dim=1) != 0
        return first

    @property
    def ends(self) -> Tensor:
        """Whether an action token is the last of its turn, (B, A) bool."""
        last = self.mask.clone()
        last[:, :-1] &= ~self.mask[:, 1:] | (self.number.diff(dim=1) != 0)
        return last

    def _must(self, name: str, holds: Tensor, rule: str) -> None:
        if not bool(holds.all()):
            row = int(holds.int().argmin())
            begins = getattr(self, name)[row, :16].tolist()
            raise ValueError(f"Turns.{name}: must {rule}; row {row} begins with {begins}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTrajectories:
    """A step's conversations, their turns side by side: what the manager learns from.

    A truncated conversation was cut off (by the environment, or by the limit of turns); any other came to its own end.
    """

    rewards: Tensor  # (B, T) float32, extrinsic
    values: Tensor  # (B, T) float32, V_H of the state before the option is chosen
    truncated: Tensor  # (B,) bool
    values_after: Tensor  # (B,) float32, V_H of the state after the last turn; read only where truncated
    real: Tensor  # (B, T) bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTrajectories:
    """The same conversations, their action tokens side by side: what the worker learns from, beside turn advantages."""

    kl_rewards: Tensor  # (B, A) float32, the KL penalty alone, -kl_coef * KL_t
    values: Tensor  # (B, A) float32, V_L of the state in which the token is chosen, the turn's option included
    intrinsic: Tensor  # (B, T) float32, r_int of each turn; 0 without intrinsic rewards
    turns: Turns


def spread_over_tokens(per_turn: Tensor, turns: Turns) -> Tensor:
    """(B, T) to (B, A): the number of its turn at every action token, 0 where not real.

    Spread turn advantages are the utterance-level credit of ArCHer, Zhou et al. 2024.
    """
    assert per_turn.shape == turns.real.shape, (per_turn.shape, turns.real.shape)  # (B, 1) would be spread silently
    return per_turn.gather(1, turns.index).where(turns.mask, per_turn.new_zeros(()))


def option_values(values: Tensor, turns: Turns) -> Tensor:
    """(B, A) to (B, T): the value at each turn's first action token, 0 where not real.

    Of the worker's values it is Q(s, o), because the state of that token ends with the option token.
    """
    zero = values.new_zeros(())
    return values.new_zeros(turns.real.shape).scatter_add(1, turns.index, values.where(turns.begins, zero))


def credit_turns(rewards: Tensor, turn_rewards: Tensor, turns: Turns) -> Tensor:
    """Token rewards and, at the last action token of each turn, the turn's own reward; (B, A), 0 where not real.

    rewards: (B, A), such as the KL penalty. turn_rewards: (B, T). Every estimator takes the result: its discount counts
    action tokens alone, and returns cross turns. A conversation of one turn has the rewards of
    `estimators.token_rewards`.
    """
    rewards = rewards.where(turns.mask, rewards.new_zeros(()))
    return (rewards + spread_over_tokens(turn_rewards, turns)).where(turns.ends, rewards)


def with_bootstrap(rewards: Tensor, mask: Tensor, truncated: Tensor, values_after: Tensor, *, gamma: float) -> Tensor:
    """Rewards whose last real one is r + gamma V(next) in truncated rows, and r in terminated ones; 0 where not real.

    rewards, mask: turns or tokens, (B, T) or (B, A). truncated: (B,) bool. values_after: (B,), the value of the state
    after the last action, never of the state before it; read only where truncated. An estimator that takes the result
    bootstraps: its values are 0 beyond the end. Pardo et al. 2018, "Time Limits in Reinforcement Learning".
    """
    rewards = rewards.where(mask, rewards.new_zeros(()))
    last = mask.clone()
    last[:, :-1] &= ~mask[:, 1:]
    return (rewards + gamma * values_after[:, None]).where(last & truncated[:, None], rewards)


def turn_gae(batch: TurnTrajectories, *, gamma: float = 0.95, lam: float = 0.95) -> Advantages:
    """GAE over turns: advantages and returns (advantages + values), (B, T) each, 0 where not real.

        delta_t = R_t + gamma V_H(s_{t+1}) - V_H(s_t),    A_t = sum_k (gamma lam)^k delta_{t+k}

    t counts turns, whatever their length and reward. Beyond the last turn the value is `values_after` if the
    conversation was truncated, and 0 if it ended. Schulman et al. 2016, eq. 16; over turns: VAGEN, Wang et al. 2025.
    """
    rewards = with_bootstrap(batch.rewards, batch.real, batch.truncated, batch.values_after, gamma=gamma)
    advantages, returns = gae(rewards, batch.values, batch.real, gamma=gamma, lam=lam)
    return Advantages(advantages=advantages, returns=returns)


def gae_within_turns(rewards: Tensor, values: Tensor, turns: Turns, *, gamma: float, lam: float) -> Advantages:
    """GAE over the tokens of each turn as if it were an episode of its own; (B, A) each, 0 where not real.

    Nothing crosses a turn: beyond its last action token the value is 0. The tokens are laid out with a turn in each
    row, so that it is the same `estimators.gae`.
    """
    mask, counts = turns.mask, turns.real.sum(dim=1)  # (B, A), (B,)
    rows = (turns.index + (counts.cumsum(0) - counts)[:, None])[mask]  # of N action tokens
    columns = mask.long().cumsum(1) - 1
    columns = (columns - columns.where(turns.begins, 0).cummax(dim=1).values)[mask]
    width = int(columns.max()) + 1 if columns.numel() else 1

    def by_turn(column: Tensor) -> Tensor:
        table = column.new_zeros(int(counts.sum()), width)
        table[rows, columns] = column[mask]
        return table

    def by_conversation(table: Tensor) -> Tensor:
        column = table.new_zeros(mask.shape)
        column[mask] = table[rows, columns]
        return column

    advantages, returns = gae(by_turn(rewards), by_turn(values), by_turn(mask), gamma=gamma, lam=lam)
    return Advantages(advantages=by_conversation(advantages), returns=by_conversation(returns))


class Bilevel(Config):
    """Advantages of a manager that chooses an option for each turn and of a worker that carries it out.

        manager  A_turn  GAE(gamma, lam) over turns, of the extrinsic rewards alone
        worker   A_token GAE(1, worker_lam) within each turn, of the token rewards
                         r_i = -kl_coef KL_i + [i is the last token of its turn] (A_turn + intrinsic_coef r_int)

    The first token's baseline is V_L(s, o) = Q(s, o): at worker_lam 1 its advantage is the sum of the turn's token
    rewards minus Q(s, o). So the worker is not credited for the manager's choice. The worker's reward holds A_turn as
    it was estimated; whitening comes after both levels. With one option, one turn, no intrinsic reward and V_H = 0 the
    worker's advantages are those of flat PPO, to the bit.

    VAGEN (Wang et al. 2025) carries A_turn into the last token of its turn, too. Where its code finds the ends of turns
    by rewards that are not 0, a turn of reward 0 has none; here the ends are given.
    """

    gamma: float = Field(default=0.95, ge=0, le=1)
    """Manager's discount per turn."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """Manager's lambda of GAE over turns."""

    worker_lam: float = Field(default=0.95, ge=0, le=1)
    """Worker's lambda of GAE over the tokens of a turn, whose discount is 1."""

    intrinsic_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the intrinsic reward in the worker's reward; the manager never sees it."""

    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1: the manager's over turns, the worker's over tokens."""

    def advantages(self, manager: TurnTrajectories, worker: WorkerTrajectories) -> tuple[Advantages, Advantages]:
        """(the manager's, (B, T); the worker's, (B, A)). Returns are never whitened."""
        turns = worker.turns
        assert manager.real.equal(turns.real), "manager and worker must speak of the same conversations"
        high = turn_gae(manager, gamma=self.gamma, lam=self.lam)
        turn_rewards = high.advantages + self.intrinsic_coef * worker.intrinsic
        rewards = credit_turns(worker.kl_rewards, turn_rewards, turns)
        low = gae_within_turns(rewards, worker.values, turns, gamma=1.0, lam=self.worker_lam)
        if not self.whiten_advantages:
            return high, low
        return (
            Advantages(advantages=whiten(high.advantages, manager.real), returns=high.returns),
            Advantages(advantages=whiten(low.advantages, turns.mask), returns=low.returns),
        )


def intrinsic_rewards(
    checks: Tensor, log_q: Tensor, on_offer: Tensor, real: Tensor, *, check_coef: float, diversity_coef: float
) -> Tensor:
    """r_int = check_coef * check(o, u) + diversity_coef * (log q(o|u) - log p(o)), (B, T), 0 where not real.

    checks: (B, T), how well the utterance carries out its option. log_q: (B, T), log-prob of the turn's option by a
    discriminator that guesses it from the utterance, among those on offer. on_offer: (B, T) int64, how many options
    were on offer in the turn, at least 1.

    The second part is Eysenbach et al. 2018, "Diversity is All You Need", eq. 3, with p = 1 / on_offer. It is 0 where
    the discriminator knows nothing or where there was no choice, and log on_offer at most. With options in equal use
    its mean is a lower bound of the mutual information of option and utterance. log q is bounded below by
    -MAX_LOG_RATIO, or one turn would take the whole step.
    """
    assert bool((on_offer >= 1).where(real, True).all()), "a turn whose option was not on offer"
    information = log_q.clamp(min=-MAX_LOG_RATIO) + on_offer.double().log().to(log_q.dtype)
    rewards = check_coef * checks + diversity_coef * information
    return rewards.where(real, log_q.new_zeros(()))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionStatistics:
    """How options were used and carried out. In nats; nan without a turn.

    entropy: of the usage; log K if all options are used alike, 0 if one is used alone. mutual_information: of the
    option and the outcome of its turn; 0 if the utterances do not depend on the option, at most the entropy.
    """

    usage: Tensor  # (K,) float64, share of turns
    entropy: float
    mutual_information: float


def option_counts(options: Tensor, outcomes: Tensor, real: Tensor, *, option_count: int, outcome_count: int) -> Tensor:
    """How often each option had each outcome, (K, C) int64; tables of several batches may be added.

    options: (B, T) int64 in [0, K). outcomes: (B, T) int64 in [0, C), what was carried out, as a check says; give
    "nothing of it" a number of its own.
    """
    _check_range("options", options, real, option_count)
    _check_range("outcomes", outcomes, real, outcome_count)
    pairs = (options * outcome_count + outcomes)[real]
    return pairs.bincount(minlength=option_count * outcome_count).reshape(option_count, outcome_count)


def option_statistics(counts: Tensor) -> OptionStatistics:
    """Usage, its entropy and the mutual information, exactly those of the counts (K, C).

        I(O; C) = sum n_oc / N log(n_oc N / (n_o n_c))

    As an estimate of what a larger sample would give it is too high by about (K - 1)(C - 1) / 2N. Miller 1955.
    """
    exact = counts.double()
    total, options, outcomes = exact.sum(), exact.sum(dim=1), exact.sum(dim=0)
    usage = options / total
    # a pair that never occurred has the share 0, whose term is 0
    ratio = exact * total / (options[:, None] * outcomes).clamp(min=1)
    return OptionStatistics(
        usage=usage,
        entropy=float(usage.xlogy(usage.reciprocal()).sum()),
        mutual_information=float((exact / total).xlogy(ratio).sum().clamp(min=0)),
    )


def _check_range(name: str, numbers: Tensor, real: Tensor, count: int) -> None:
    """Raises ValueError unless the numbers of real turns are in [0, count)."""
    wrong = ((numbers < 0) | (numbers >= count)) & real
    if bool(wrong.any()):
        row, turn = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: must be at least 0 and less than {count}, got {int(numbers[row, turn])} "
            f"in turn {turn} of conversation {row}"
        )
