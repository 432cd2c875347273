"""The plans and reports that pass between driver and learner; they hold no tensors, so the driver never needs one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from actors.config import Dtype
from cluster.storage import StoredFile


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReady:
    """The report on the model that a rank has loaded.

    parameters, trainable: number of weights of the whole model, and of those that are trained. context: longest rollout
    in tokens. checksum: of the whole model before any training, because a commit can only be restored into the model
    that the run began with.
    """

    parameters: int
    trainable: int
    device: str
    dtype: Dtype
    context: int
    checksum: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferReport:
    """The report on an inference over the whole table, the same on every rank.

    mean: mean log-prob, value or reward over all action tokens. The perplexity of a policy is exp(-mean).
    """

    rows: int
    action_tokens: int
    mean: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReport:
    """The objective's loss on a table that the model does not learn from, the same on every rank.

    loss, statistics: means, as in an `UpdateReport`. For comparisons, the statistic "accuracy" is the share of pairs
    ranked right; chance gives 0.5.
    """

    rows: int
    loss: float
    statistics: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """The plan of the updates on one step's table.

    step:             number of the step, from 0; every step of the run takes epochs * minibatches updates.
    aggregation:      how the losses of tokens are averaged; comparisons always count alike.
    constant:         number of tokens that a row counts for under the aggregation `constant`.
    kl_coef:          coefficient of the KL penalty in the loss in this step.
    entropy_gradient: whether the objective differentiates the entropy.
    first, count:     do `count` of the epochs * minibatches updates, from number `first` on; None: all from there on.
    total:            updates of the whole run, for the learning rate's schedule; 0: `LearnerSpec.total_updates`.
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
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """The report on a shard. file: what this rank wrote, relative to the folder; equal states have equal checksums."""

    file: StoredFile
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """The report on a restored state. steps: optimiser steps behind it. ranks: number of ranks that wrote it."""

    steps: int
    ranks: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionReport:
    """The report on a published version that was read from a commit. manager: the head that goes with it."""

    version: int
    checksum: str
    manager: Mapping[str, npt.NDArray[np.float32]] | None
