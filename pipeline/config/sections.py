"""The sections of a recipe that no other room declares: model, finetune, reward_model, batch, evaluation.

Torch-free and Ray-free, like the whole room.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.config import MOST_SAMPLES, MOST_TOKENS, PathOrName, TrainingConfig
from cluster.config import MOST_WORKERS, Config


class ModelConfig(Config):
    """The model to align: an existing one, or the shape of a GPT-2 to train from scratch on the task's text."""

    path: PathOrName = ""
    """Folder or hub name of a Hugging Face causal LM. Empty: a new GPT-2 of the shape below, fine-tuned first."""

    layers: int = Field(default=4, ge=1, le=1024)
    """Transformer blocks of a new model."""

    width: int = Field(default=128, ge=8, le=65_536)
    """Hidden size of a new model; a multiple of heads."""

    heads: int = Field(default=4, ge=1, le=65_536)
    """Attention heads of a new model."""

    context: int = Field(default=128, ge=8, le=MOST_TOKENS)
    """Longest sequence of a new model, in tokens."""

    vocabulary: int = Field(default=1024, ge=2, le=MOST_TOKENS)
    """Largest vocabulary of a new model's tokenizer, which is trained on the task's text."""


class FinetuneConfig(Config):
    """Supervised fine-tuning on the task's demonstrations, before reinforcement learning."""

    epochs: int = Field(default=0, ge=0)
    """Passes over the demonstrations; 0 skips fine-tuning."""

    early_stop: bool = True
    """Stop once held-out perplexity rises, and keep the weights of its minimum.

    False: keep the last ones, so that demonstrations can be learned by heart.
    """

    batch_size: int = Field(default=32, ge=1)
    """Demonstrations of one optimiser step."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Most optimiser steps from one checkpoint to the next, which are lost with a worker."""

    learner: TrainingConfig = TrainingConfig(learning_rate=1e-3)
    """The gang that trains."""


class RewardModelConfig(Config):
    """A reward model trained on comparisons, which then rewards reinforcement learning."""

    epochs: int = Field(default=0, ge=0)
    """Passes over the comparisons; 0 trains no reward model."""

    early_stop: bool = True
    """Stop once the held-out loss rises, and keep the weights of its minimum. False: keep the last ones."""

    batch_size: int = Field(default=32, ge=1)
    """Comparisons of one optimiser step."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Most optimiser steps from one checkpoint to the next, which are lost with a worker."""

    standardise: bool = True
    """Shift and scale the reward to mean 0 and variance 1 over the comparisons (Huang et al. 2023, detail 5)."""

    pairs: Literal["task", "sampled"] = "task"
    """Source of the comparisons: task or sampled.

    task: the task's own. sampled: replies of the fine-tuned model, ranked by the task's reward function (or
    reward.function).
    """

    samples: int = Field(default=8, ge=2, le=MOST_SAMPLES)
    """Replies sampled to each prompt with pairs = "sampled"; all of them are ranked."""

    learner: TrainingConfig = TrainingConfig()
    """The gang that trains."""


class BatchConfig(Config):
    """The size of one step of reinforcement learning."""

    prompts: int = Field(default=64, ge=1)
    """Prompts (groups) of a step."""

    group_size: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    """Samples of each prompt."""

    dynamic_sampling: bool = False
    """Leave out groups whose scores are all equal, and fill the step with fresh prompts (DAPO, Yu et al. 2025)."""

    max_refills: int = Field(default=8, ge=1)
    """Groups that may be issued to fill one step, in multiples of the step, before the run stops."""

    epochs: int = Field(default=4, ge=1)
    """Passes over a step's experience, reshuffled each time."""

    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps of one pass."""

    max_prompt_tokens: int = Field(default=64, ge=1, le=MOST_TOKENS)
    """Longest prompt allowed, in tokens."""

    @property
    def samples(self) -> int:
        """Rollouts of a step."""
        return self.prompts * self.group_size


class EvaluationConfig(Config):
    """The comparison on held-out prompts: the policy against its starting model, and against best-of-n of that."""

    prompts: int = Field(default=128, ge=2)
    """Held-out prompts, at most."""

    samples: int = Field(default=4, ge=1, le=MOST_SAMPLES)
    """Replies of the policy to each prompt; the confidence interval is over prompts."""

    best_of: int = Field(default=16, ge=1, le=MOST_SAMPLES)
    """Largest n of best-of-n, and number of the baseline's replies to each prompt. 1 leaves best-of-n out."""

    demonstrations: int = Field(default=1024, ge=0)
    """Held-out demonstrations whose perplexity is measured, at most."""

    shown: int = Field(default=5, ge=0)
    """Pairs of replies that are printed; all are saved."""

    workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Number of examiners, each with one model at a time. It never changes the result."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each examiner."""
