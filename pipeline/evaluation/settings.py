"""The settings of an evaluation: the parts of a recipe that it reads."""

from __future__ import annotations

from dataclasses import dataclass

from actors.config import EnvironmentConfig, ManagerConfig, ReferenceConfig, RolloutConfig, SamplingConfig
from cluster.config import ClusterConfig
from pipeline.config.loop_config import LoopConfig
from pipeline.config.sections import BatchConfig, EvaluationConfig
from pipeline.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """The task and the parts of a recipe that an evaluation reads. batch: read for the maximum length of a prompt.

    talk: the other side of conversations, if the models are compared in conversations. manager: its options.
    """

    task: Task
    evaluation: EvaluationConfig
    batch: BatchConfig
    sampling: SamplingConfig
    talk: EnvironmentConfig
    manager: ManagerConfig
    rollout: RolloutConfig
    reference: ReferenceConfig
    cluster: ClusterConfig
    seed: int

    @classmethod
    def of(cls, task: Task, evaluation: EvaluationConfig, config: LoopConfig) -> EvaluationSettings:
        """Gather the settings from a task, the evaluation section of a recipe and the configuration of the loop."""
        return cls(
            task=task,
            evaluation=evaluation,
            batch=config.batch,
            sampling=config.sampling,
            talk=config.environment,
            manager=config.manager,
            rollout=config.rollout,
            reference=config.reference,
            cluster=config.cluster,
            seed=config.seed,
        )
