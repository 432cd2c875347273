"""The settings of reinforcement learning: the loop, its algorithm, and the processes that do the work."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.config import (
    CriticConfig,
    EnvironmentConfig,
    LearnerConfig,
    ManagerConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
)
from cluster.config import ClusterConfig, Config
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.registry import AnyAlgorithm
from pipeline.algorithms.shaping import ShapingConfig
from pipeline.config.sections import BatchConfig


class LoopConfig(Config):
    """What reinforcement learning depends on."""

    steps: int = Field(ge=1)
    """Steps of reinforcement learning; each ends in one new version of the policy."""

    seed: int = Field(default=0, ge=0, le=2**64 - 1)
    """Seed of everything random in the run."""

    commit_every: int = Field(default=10, ge=1)
    """Steps from one commit to the next: what is lost at most, and done again, when the run breaks off.

    The last step and a stop are committed, too.
    """

    keep_commits: int = Field(default=2, ge=2)
    """Commits that are kept; older ones are removed once a new one is on the disk.

    At least two, so that a damaged one is not the only one.
    """

    max_staleness: int = Field(default=0, ge=0, le=16)
    """Steps that the pools work ahead: the samples of a step are so many versions behind the weights that it trains.

    Exactly so, whatever the speed of workers, so the run repeats to the bit: step t is sampled by version
    max(0, t - max_staleness). Above 0 the algorithm must correct for it.
    """

    schedule: Literal["logical", "freshest"] = "logical"
    """Weights that sample: logical or freshest.

    logical: of exactly the version that max_staleness says, so that the run repeats to the bit. freshest: the newest
    ones, also in the middle of a reply (rollout.segment_tokens). Then max_staleness is the most that a token may be
    behind, and the run does not repeat.
    """

    batch: BatchConfig = BatchConfig()
    algorithm: AnyAlgorithm = PPO()
    shaping: ShapingConfig = ShapingConfig()
    sampling: SamplingConfig = SamplingConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    manager: ManagerConfig = ManagerConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    reference: ReferenceConfig = ReferenceConfig()
    policy: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole run, over which the schedules of the learning rates are spread."""
        return self.steps * self.batch.epochs * self.batch.minibatches

    @property
    def repeats(self) -> bool:
        """Whether the run is a function of its settings; else workers take the newest weights that there are."""
        return self.schedule == "logical"

    @property
    def most_action_tokens(self) -> int:
        """The most tokens that the policy can sample in a rollout, the model's context aside."""
        return self.sampling.max_new_tokens * (self.environment.max_turns if self.environment.name else 1)

    @property
    def most_tokens(self) -> int:
        """About the most tokens of a rollout; an environment's lines are taken to be as long as the replies."""
        return self.batch.max_prompt_tokens + self.most_action_tokens * (2 if self.environment.name else 1)
