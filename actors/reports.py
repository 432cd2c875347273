"""What a learner is told and what it reports: scalars alone, so that the driver never holds a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actors.config import Dtype
from cluster.storage import StoredFile


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReady:
    """parameters, trainable: numbers of weights of the whole model. context: longest rollout in tokens.

    checksum: of the whole model before any training; a commit can only be restored into the model the run began with.
    """

    parameters: int
    trainable: int
    device: str
    dtype: Dtype
    context: int
    checksum: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferReport:
    """Over the whole table, the same on every rank. mean: log-prob, value or reward of an action token; perplexity is exp(-mean) of a policy's."""

    rows: int
    action_tokens: int
    mean: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReport:
    """How a reward model does on comparisons it does not learn from, over the whole table, the same on every rank.

    loss: mean of the objective's. accuracy: share ranked right, in a ranking of its pairs; chance is 0.5.
    """

    rows: int
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """How one step's table is trained on. step: counted from 0, and every step of the run takes epochs * minibatches updates.

    aggregation: of the losses of tokens; comparisons are always averaged.
    constant: tokens that a row counts for under the aggregation `constant`. kl_coef: of a KL penalty in the loss, in this step.
    entropy_gradient: whether the objective differentiates the entropy.
    first, count: which of the epochs * minibatches updates to make, in their order; count None is all from `first` on.
    """

    step: int
    epochs: int
    minibatches: int
    seed: int
    aggregation: Literal["token_mean", "sequence_mean", "constant"]
    constant: int = 1
    kl_coef: float = 0.0
    entropy_gradient: bool = False
    first: int = 0
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """file: what this rank wrote, relative to the folder; equal states have equal checksums."""

    file: StoredFile
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """steps: optimiser steps behind the state. ranks: that wrote it."""

    steps: int
    ranks: int
    seconds: float
