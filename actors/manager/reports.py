"""What the driver tells a manager, and what a manager reports; without torch and RLlib, so the driver needs neither."""

from __future__ import annotations

from dataclasses import dataclass

from actors.config import ManagerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerSpec:
    """What a manager is made of.

    width: number of features of a turn, the width of the language model's hidden state. seed: of the order in which
    turns are learnt from. start: a model's folder whose option head the first weights are; "": they are all zero.
    """

    width: int
    config: ManagerConfig
    seed: int
    start: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerReady:
    """The report on a manager that has started. checksum: of its first weights, which a commit must belong to."""

    parameters: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscriminatorReport:
    """The report on a discriminator's update, of the time before it: how it did on turns that it had not seen.

    loss:     cross-entropy in nats, over turns weighted as they are learnt from.
    accuracy: share of turns whose option it thought the likeliest of those on offer, the first of equals.
    reward:   mean of diversity_coef * (log q(o | u) - log p(o)), what the policy was paid for a turn.
    """

    loss: float
    accuracy: float
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerReport:
    """The report on one update. Losses, entropy and norms are means over all minibatches, weighted by their turns.

    conversations, turns:    learnt from, in each epoch once.
    loss:                    policy_loss + value_coef * value_loss - entropy_coef * entropy.
    policy_loss, value_loss: clipped surrogate, and squared error of V.
    entropy:                 of pi(o | h) over the options on offer, in nats.
    clip_fraction:           share of turns whose probability ratio left [1 - clip, 1 + clip].
    grad_norm:               global 2-norm before clipping, over the minibatches that were not skipped.
    ratio_deviation:         largest |pi(o | h) / recorded probability - 1| before the first minibatch; must be tiny.
    advantage_mean, advantage_std: of the turns' advantages before they were whitened.
    explained_variance:      1 - Var(return - V) / Var(return) before the update; 0 if all returns are equal.
    reward:                  mean extrinsic reward of a turn.
    updates, skipped:        optimiser steps, and minibatches whose gradient was not finite and was dropped.
    discriminator:           its own report, if there is one.
    """

    conversations: int
    turns: int
    loss: float
    policy_loss: float
    value_loss: float
    entropy: float
    clip_fraction: float
    grad_norm: float
    ratio_deviation: float
    advantage_mean: float
    advantage_std: float
    explained_variance: float
    reward: float
    learning_rate: float
    updates: int
    skipped: int
    seconds: float
    discriminator: DiscriminatorReport | None = None
