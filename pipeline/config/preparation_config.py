"""The settings before reinforcement learning: task, data, model, and the stages that train on given data."""

from __future__ import annotations

from cluster.config import Config
from pipeline.config.sections import FinetuneConfig, ModelConfig, RewardModelConfig
from pipeline.data.config import DataConfig


class PreparationConfig(Config):
    """What reinforcement learning begins with."""

    task: str
    """The task: `smalltalk`, `walks`, `world`, `world-conversations`, `world-options`, `twenty-questions`, `files` (see
    data), or your own as `package.module:name`."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    reward_model: RewardModelConfig = RewardModelConfig()

    @property
    def reads_demonstrations(self) -> bool:
        """Whether a stage trains on the task's demonstrations."""
        return self.finetune.epochs > 0

    @property
    def reads_comparisons(self) -> bool:
        """Whether a stage trains on the task's own comparisons."""
        return self.reward_model.epochs > 0 and self.reward_model.pairs == "task"
