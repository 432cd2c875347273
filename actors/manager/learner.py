"""RLlib's PPO learner for a manager. Imports RLlib, which takes seconds, so import this file late.

Loss, GAE, optimiser and gradient clipping are RLlib's (new API stack, `LearnerGroup` with a local learner). Where its
numbers are not what they are taken for (Ray 2.60), they are corrected here:

- RLlib puts an artificial turn behind each conversation to bootstrap from, and leaves these turns in the batch. They
  take part in the whitening of advantages and in explained variance, and a minibatch that consists of them gives NaN.
  `FinishTurns` removes them, and whitens over the real turns in float64.
- RLlib's minibatches run across the end of an epoch and into the next one, so some turns are learnt from more often
  than others, in an order drawn from NumPy's global generator. Here each epoch takes each turn once, in an order that
  depends on (seed, optimiser step, epoch) alone.
- RLlib sets NaN in a gradient to 0 and steps. Here such a minibatch is dropped and counted.
- RLlib ignores squared errors of the value above 10. Here they count.

Shapes: N turns, C conversations, D features, K options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import ENTROPY_KEY, POLICY_LOSS_KEY, VF_LOSS_KEY
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor

from actors.config import ManagerConfig
from actors.learner.micro_batches import minibatches
from actors.manager.module import FEATURES, OFFERED, OptionModule
from actors.manager.turns import Turns

_LEAST_STD = 1e-4  # that advantages are divided by, as in RLlib
_ADVANTAGES, _VALUES = "turn_advantages", "turn_values"  # columns of a batch: before whitening, before the update


class Estimates(NamedTuple):
    """What is known of N turns before an update."""

    advantages: Tensor  # (N,) GAE
    values: Tensor  # (N,) V(h)
    returns: Tensor  # (N,) advantage + value
    ratios: Tensor  # (N,) pi(option | h) / recorded probability


class Statistics(NamedTuple):
    """What is known of one minibatch."""

    turns: int
    loss: float
    policy_loss: float
    value_loss: float
    entropy: float
    clip_fraction: float


class FinishTurns(ConnectorV2):
    """The last piece of the pipeline that makes a batch of episodes: keeps real turns only and whitens advantages."""

    def __call__(self, *, rl_module: Any, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        module, turns = rl_module[DEFAULT_MODULE_ID], batch[DEFAULT_MODULE_ID]
        real = turns.pop(Columns.LOSS_MASK)
        turns = {name: _rows(column, real) for name, column in turns.items()}
        with torch.no_grad():
            turns[Columns.ACTION_DIST_INPUTS] = module.forward_inference(turns)[Columns.ACTION_DIST_INPUTS]
            turns[_VALUES] = module.compute_values(turns)
        turns[_ADVANTAGES] = turns[Postprocessing.VALUE_TARGETS] - turns[_VALUES]
        exact = turns[_ADVANTAGES].double()
        turns[Postprocessing.ADVANTAGES] = (
            (exact - exact.mean()) / exact.std(correction=0).clamp(min=_LEAST_STD)
        ).float()
        return {DEFAULT_MODULE_ID: turns}


class OptionLearner(PPOTorchLearner):
    """RLlib's PPO learner with the corrections that the module's docstring lists.

    estimates, statistics, norms, skipped: of the latest update.
    """

    def build(self) -> None:
        super().build()
        self._learner_connector.append(FinishTurns())

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        parameters = self.get_parameters(self._module[module_id])
        optimizer = torch.optim.Adam(parameters, eps=config.learner_config_dict["adam_epsilon"], foreach=False)
        self.register_optimizer(
            module_id=module_id, optimizer=optimizer, params=parameters, lr_or_lr_schedule=config.lr
        )

    @property
    def model(self) -> OptionModule:
        found: OptionModule = self.module[DEFAULT_MODULE_ID]
        return found

    @property
    def adam(self) -> torch.optim.Adam:
        found: torch.optim.Adam = self.get_optimizer()
        return found

    def estimate(self, episodes: Sequence[Any]) -> tuple[dict[str, Any], Estimates]:
        """The batch of these episodes as an update would learn from it, and what is known of its turns.

        The episodes are used up.
        """
        made = self._learner_connector(
            rl_module=self.module, batch={}, episodes=list(episodes), shared_data={}, metrics=self.metrics
        )
        turns = made[DEFAULT_MODULE_ID]
        chosen = self._logprobs(turns[Columns.ACTION_DIST_INPUTS], turns)
        estimates = Estimates(
            advantages=turns[_ADVANTAGES],
            values=turns[_VALUES],
            returns=turns[Postprocessing.VALUE_TARGETS],
            ratios=(chosen - turns[Columns.ACTION_LOGP]).exp(),
        )
        return turns, estimates

    def _create_iterator_if_necessary(
        self, *, training_data: Any, num_epochs: int, minibatch_size: int, seed: int, step: int, **_: Any
    ) -> Iterator[Any]:
        """The minibatches of an update. seed, step: of the order of the turns; passed on by `LearnerGroup.update`."""
        turns, self.estimates = self.estimate(training_data.episodes)
        self.statistics: list[Statistics] = []
        self.norms: list[float] = []
        self.skipped = 0
        count = len(self.estimates.values)
        epochs = minibatches(count, epochs=num_epochs, minibatches=-(-count // minibatch_size), seed=seed, step=step)
        for rows in (rows for epoch in epochs for rows in epoch):
            index = torch.from_numpy(rows)
            picked = SampleBatch({name: _rows(column, index) for name, column in turns.items()})
            yield MultiAgentBatch({DEFAULT_MODULE_ID: picked}, env_steps=len(rows))

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        loss: Tensor = super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)
        with torch.no_grad():
            logprobs = self._logprobs(fwd_out[Columns.ACTION_DIST_INPUTS], batch)
            ratios = (logprobs - batch[Columns.ACTION_LOGP]).exp()
        policy_loss, value_loss, entropy = (
            float(self.metrics.peek((module_id, key))) for key in (POLICY_LOSS_KEY, VF_LOSS_KEY, ENTROPY_KEY)
        )
        self.statistics.append(
            Statistics(
                turns=len(ratios),
                loss=float(loss),
                policy_loss=policy_loss,
                value_loss=value_loss,
                entropy=entropy,
                clip_fraction=float(((ratios - 1).abs() > config.clip_param).float().mean()),
            )
        )
        return loss

    def postprocess_gradients(self, gradients_dict: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """RLlib's clipping, or nothing if the gradient is not finite."""
        norm = float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients_dict.values()])))
        if not np.isfinite(norm):
            self.skipped += 1
            return {}
        self.norms.append(norm)
        return dict(super().postprocess_gradients(gradients_dict))

    def apply_gradients(self, gradients_dict: dict[Any, Tensor]) -> None:
        """RLlib's optimiser step, unless the gradient was dropped."""
        if gradients_dict:
            super().apply_gradients(gradients_dict)

    def _logprobs(self, logits: Tensor, turns: dict[str, Any]) -> Tensor:
        """Log-probs of the chosen options under these logits, (N,)."""
        chosen: Tensor = self.model.get_train_action_dist_cls().from_logits(logits).logp(turns[Columns.ACTIONS])
        return chosen


def make_group(width: int, config: ManagerConfig) -> LearnerGroup:
    """A learner group with one learner in this process; Ray need not run."""
    settings = (
        PPOConfig()
        .learners(
            num_learners=0,
            num_gpus_per_learner=0,
            learner_class=OptionLearner,
            learner_config_dict={"adam_epsilon": config.adam_epsilon},
        )
        .training(
            lr=config.learning_rate,
            gamma=config.gamma,
            lambda_=config.lam,
            clip_param=config.clip,
            entropy_coeff=config.entropy_coef,
            vf_loss_coeff=config.value_coef,
            vf_clip_param=float("inf"),
            grad_clip=config.max_grad_norm or None,
            grad_clip_by="global_norm",
            use_kl_loss=False,
        )
    )
    spec = RLModuleSpec(
        module_class=OptionModule,
        observation_space=gymnasium.spaces.Dict(
            {
                FEATURES: gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32),
                OFFERED: gymnasium.spaces.MultiBinary(len(config.options)),
            }
        ),
        action_space=gymnasium.spaces.Discrete(len(config.options)),
        model_config={"width": width, "options": len(config.options)},
    )
    return LearnerGroup(config=settings, module_spec=MultiRLModuleSpec(rl_module_specs={DEFAULT_MODULE_ID: spec}))


def episodes_of(turns: Turns) -> list[Any]:
    """One RLlib episode for each conversation.

    An episode has one observation more than actions: the state after the last turn, `last_features`. V of it continues
    a truncated conversation. For a terminated one it is zeros, and counts for nothing.
    """
    features, offered, after = turns.features, turns.offered, turns.last_features
    option, logprob, reward = (turns.column(name) for name in ("option", "option_logprob", "reward"))
    terminated, sample = turns.column("terminated"), turns.column("sample_id")
    all_offered = np.ones((1, offered.shape[1]), np.bool_)
    episodes = []
    for i, (start, stop) in enumerate(zip(turns.starts[:-1], turns.starts[1:], strict=True)):
        seen = {
            FEATURES: np.concatenate([features[start:stop], after[i : i + 1]]),
            OFFERED: np.concatenate([offered[start:stop], all_offered]),
        }
        episodes.append(
            SingleAgentEpisode(
                id_=str(sample[start]),
                observations=InfiniteLookbackBuffer(seen),
                actions=InfiniteLookbackBuffer(option[start:stop].astype(np.int64)),
                rewards=InfiniteLookbackBuffer(reward[start:stop].copy()),
                infos=[{} for _ in range(stop - start + 1)],
                terminated=bool(terminated[stop - 1]),
                truncated=not terminated[stop - 1],
                extra_model_outputs={Columns.ACTION_LOGP: InfiniteLookbackBuffer(logprob[start:stop].copy())},
                len_lookback_buffer=0,  # else RLlib takes all turns for context, and learns from none
            )
        )
    return episodes


def observations(features: npt.NDArray[np.float32]) -> dict[str, Any]:
    """A batch with these features (N, D) and nothing else, enough for `compute_values`."""
    return {Columns.OBS: {FEATURES: torch.from_numpy(np.array(features, np.float32))}}


def _rows(column: Any, rows: Tensor) -> Any:
    """These rows of a batch's column, which may be a dict of tensors."""
    if isinstance(column, dict):
        return {name: _rows(part, rows) for name, part in column.items()}
    return column[rows]
