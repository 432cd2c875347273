"""The manager: the high-level policy as a role of one rank, whose learning is done by RLlib.

Consumes: tables of `Turns`, which it learns from. Publishes: the policy head's weights, for the `OptionHead` of rollout
workers. With `diversity_coef` it keeps a discriminator as well, which only the low-level policy's reward depends on.
RLlib takes seconds to import, so it is imported by `connect`, in the manager's own process only.

Everything computes on the CPU with one thread: the model is two linear layers, and its bits then do not depend on the
machine's number of cores. The state is weights and moments; everything random is a function of the seed and of Adam's
step counter. RLlib's own checkpoints are not used, because they are pickles.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from actors.learner.fragments import Fragment, adamw_state
from actors.learner.reports import RestoreReport, ShardReport
from actors.learner.shards import open_shards, write_shard
from actors.manager.discriminator import Discriminator
from actors.manager.option_head import WEIGHTS, Floats, load_head
from actors.manager.reports import DiscriminatorReport, ManagerReady, ManagerReport, ManagerSpec
from actors.manager.turns import TurnAdvantages, Turns
from actors.weights import parameters_checksum
from cluster.storage import Folder

if TYPE_CHECKING:
    from actors.manager.learner import Estimates, OptionLearner

ROLE = "manager"


class Manager:
    """The one rank of the role `manager`; call `connect` first, then the other methods in any order."""

    def __init__(self, *, spec: ManagerSpec, rank: int = 0, ranks: int = 1, timeout_s: float = 0.0) -> None:
        """rank, ranks, timeout_s: as a gang gives them. Raises ValueError for more than one rank."""
        if (rank, ranks) != (0, 1):
            raise ValueError(f"manager: must have one rank, got rank {rank} of {ranks}")
        self._spec = spec
        self.config = spec.config

    def connect(self, address: str | None = None, port: int = 0) -> ManagerReady:
        """Import RLlib and build the learner; there are no other ranks to meet at address:port.

        Raises ValueError when the head that it is to begin with is of other sizes.
        """
        with _settled():
            from actors.manager.learner import make_group

            self._group = make_group(self._spec.width, self.config)
        self._learner: OptionLearner = self._group._learner
        if self._spec.start:
            head = load_head(self._spec.start, len(self.config.options), self._spec.width)
            named = dict(self._learner.model.named_parameters())
            for name in WEIGHTS:
                named[name].data.copy_(torch.from_numpy(head[name]))
        self._discriminator = Discriminator(self.config) if self.config.diversity_coef else None
        return ManagerReady(
            parameters=sum(parameter.numel() for parameter in self._learner.model.parameters()),
            checksum=parameters_checksum(self._learner.model),
        )

    def update(self, table: pa.Table) -> ManagerReport:
        """Learn from a step's `Turns`.

        Raises ValueError for turns of another width or number of options, and for an empty table.
        """
        started = time.perf_counter()
        turns, config = self._checked(table), self.config
        with _settled():
            from actors.manager.learner import episodes_of

            self._group.update(
                episodes=episodes_of(turns),
                num_epochs=config.epochs,
                minibatch_size=config.minibatch_size,
                seed=self._spec.seed,
                step=self.steps,
            )
            heard = self._discriminator.learn(turns) if self._discriminator is not None else None
        return self._report(turns, heard, started)

    def advantages(self, table: pa.Table) -> tuple[int, pa.Table]:
        """The `TurnAdvantages` of a table of `Turns` as the next update would see them, without learning.

        Returns their number and the table.
        """
        turns = self._checked(table)
        with _settled():
            from actors.manager.learner import episodes_of

            _, found = self._learner.estimate(episodes_of(turns))
            heard = self._discriminator.log_q(turns) if self._discriminator is not None else None
        table = TurnAdvantages.of(
            {
                "sample_id": turns.column("sample_id"),
                "turn": turns.column("turn"),
                "advantage": found.advantages.numpy(),
                "value": found.values.numpy(),
                "log_q": np.zeros(len(turns), np.float32) if heard is None else heard,
            }
        ).table
        return table.num_rows, table

    def values(self, features: Floats) -> Floats:
        """V(h) of each row of features: (N, D) float32 -> (N,) float32. Raises ValueError for another width."""
        if features.ndim != 2 or features.shape[1] != self._spec.width:
            raise ValueError(f"features: must be (rows, {self._spec.width}), got {features.shape}")
        with _settled(), torch.no_grad():
            from actors.manager.learner import observations

            found: Floats = self._learner.model.compute_values(observations(features)).numpy()
        return found

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """The policy head's weights, copied: policy_weight (K, D) and policy_bias (K,); `OptionHead` takes them."""
        named = dict(self._learner.model.named_parameters())
        return {name: named[name].detach().numpy().copy() for name in WEIGHTS}

    @property
    def steps(self) -> int:
        """Optimiser steps of the manager's two heads so far."""
        return int(max(adamw_state(self._learner.adam, each)["step"] for each in self._learner.model.parameters()))

    def save(self, folder: str) -> ShardReport:
        """Write the training state into the folder: weights, moments and step counter, in one file."""
        started = time.perf_counter()
        file = write_shard(Folder(folder), self._fragments(), role=ROLE, rank=0, ranks=1)
        return ShardReport(file=file, seconds=time.perf_counter() - started)

    def restore(self, folder: str, files: Sequence[str]) -> RestoreReport:
        """Load the training state that `save` wrote, to the bit; it undoes all updates since.

        Raises ValueError, and changes nothing, when the files are not the whole state of such a manager.
        """
        started = time.perf_counter()
        fragments = self._fragments()
        with open_shards(Folder(folder), files) as shards:
            shards.check(ROLE, {fragment.name: fragment.numel for fragment in fragments})
            shards.fill(fragments)
        return RestoreReport(steps=self.steps, ranks=1, seconds=time.perf_counter() - started)

    def _fragments(self) -> list[Fragment]:
        """The training state, as views to read and to fill."""
        heads = self._learner.model.named_parameters()
        found = [_fragment(name, parameter, self._learner.adam) for name, parameter in heads]
        if self._discriminator is not None:
            found.append(_fragment("discriminator_weight", self._discriminator.weight, self._discriminator.adam))
        return found

    def _checked(self, table: pa.Table) -> Turns:
        turns, expected = Turns(table), (self._spec.width, len(self.config.options))
        if not len(turns):
            raise ValueError("Turns: must have at least one turn, got none; skip the manager's update of this step")
        if (turns.width, turns.options) != expected:
            raise ValueError(
                f"Turns: must have {expected[0]} features and {expected[1]} options, as the manager has, got "
                f"{turns.width} and {turns.options}"
            )
        if self._discriminator is not None and not turns.utterances[0].size:
            raise ValueError(
                f"Turns.utterance: must have the tokens of each turn when manager.diversity_coef is "
                f"{self.config.diversity_coef:g}, got none; the discriminator guesses the option from them"
            )
        return turns

    def _report(self, turns: Turns, heard: DiscriminatorReport | None, started: float) -> ManagerReport:
        learner, found = self._learner, self._learner.estimates
        weight = np.array([each.turns for each in learner.statistics], np.float64)

        def mean(name: str) -> float:
            return float(np.average([getattr(each, name) for each in learner.statistics], weights=weight))

        return ManagerReport(
            conversations=len(turns.starts) - 1,
            turns=len(turns),
            loss=mean("loss"),
            policy_loss=mean("policy_loss"),
            value_loss=mean("value_loss"),
            entropy=mean("entropy"),
            clip_fraction=mean("clip_fraction"),
            grad_norm=float(np.mean(learner.norms)) if learner.norms else 0.0,
            ratio_deviation=float((found.ratios - 1).abs().max()),
            advantage_mean=float(found.advantages.double().mean()),
            advantage_std=float(found.advantages.double().std(correction=0)),
            explained_variance=_explained_variance(found),
            reward=float(turns.column("reward").mean(dtype=np.float64)),
            learning_rate=self.config.learning_rate,
            updates=len(learner.norms),
            skipped=learner.skipped,
            seconds=time.perf_counter() - started,
            discriminator=heard,
        )


def _fragment(name: str, parameter: Tensor, adam: torch.optim.Adam) -> Fragment:
    state = adamw_state(adam, parameter)
    return Fragment(
        name=name,
        numel=parameter.numel(),
        start=0,
        weight=parameter.detach().view(-1),
        exp_avg=state["exp_avg"].view(-1),
        exp_avg_sq=state["exp_avg_sq"].view(-1),
        step=state["step"],
    )


def _explained_variance(found: Estimates) -> float:
    returns, errors = found.returns.double(), found.advantages.double()
    spread = float(returns.var(correction=0))
    return 1 - float(errors.var(correction=0)) / spread if spread > 0 else 0.0


@contextmanager
def _settled() -> Iterator[None]:
    """Inside, torch uses one thread, and RLlib's deprecation warnings, of its own calls, are not shown."""
    import ray  # noqa: F401 (its first import sets the level of its logger)

    logger, threads = logging.getLogger("ray"), torch.get_num_threads()
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)
