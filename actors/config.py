"""Settings of the actors: models, sampling, the worker pools and the learners. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Config

Dtype = Literal["float32", "bfloat16"]


class SamplingConfig(Config):
    """How the next token is chosen."""

    max_new_tokens: int = Field(default=32, ge=1)
    """Longest completion, in tokens."""

    temperature: float = Field(default=1.0, ge=0)
    """Logits are divided by this, in rollouts and in every recomputed log-prob alike. 0 takes the likeliest token."""

    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens only; 0: all. Training rollouts need 0, or the learner could not recompute the log-probs."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that make up this probability. Training rollouts need 1."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion, besides the tokenizer's end-of-text token. The stop string stays in the rollout."""


class RolloutConfig(Config):
    """The pool that samples."""

    workers: int = Field(default=1, ge=1)
    """Rollout actors. Their number never changes what is sampled."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each worker."""

    dtype: Dtype = "float32"
    """Weights and arithmetic of generation."""

    chunk_size: int = Field(default=64, ge=1)
    """Samples of one call to a worker: the unit that is re-issued when a worker is lost. Rounded down to whole groups."""

    slots: int = Field(default=64, ge=8, multiple_of=8)
    """Rows the engine decodes at once. Fixed for the whole run, so that a row's bits never depend on its neighbours."""


class RewardConfig(Config):
    """The pool that scores. Give either a function or a model; a task brings its own function."""

    function: str = ""
    """Reward function as `package.module:name`, called as f(prompts, responses, metadata) -> one number each."""

    model: str = ""
    """Folder or hub name of a Hugging Face sequence classifier; the logit of its one output is the reward."""

    label: int = Field(default=-1, ge=-1)
    """Of a classifier with several outputs, the number of the one whose logit is the reward; -1: it has but one."""

    workers: int = Field(default=1, ge=1)
    """Reward actors."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each worker."""

    batch_size: int = Field(default=64, ge=1)
    """Rollouts scored by one call of the function or one forward pass of the model."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Longest time one call of the function may take, in seconds; a sample that exceeds it alone is scored `timeout`."""

    max_failed: float = Field(default=0.1, ge=0, le=1)
    """Share of a run's samples that may be quarantined for want of a reward before the run stops."""


class ReferenceConfig(Config):
    """The pool that computes the frozen reference's log-probs."""

    workers: int = Field(default=1, ge=1)
    """Reference actors."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each worker."""

    dtype: Dtype = "float32"
    """Weights and arithmetic of the reference."""

    batch_size: int = Field(default=32, ge=1)
    """Rollouts of one forward pass."""


class LearnerConfig(Config):
    """A gang of ranks that trains one model under DeepSpeed."""

    ranks: int = Field(default=1, ge=1)
    """Processes the model is trained on; the gradient is the same for every number."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each rank."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimiser states, 2 also gradients, 3 also parameters."""

    dtype: Dtype = "float32"
    """Weights and arithmetic of training; with bfloat16, DeepSpeed keeps float32 master weights, and above stage 0 sums gradients in float32 too."""

    trainable: Literal["all", "heads"] = "all"
    """What learns: every weight, or only the output head (policy: untied from the embeddings; critic: the value head) on the frozen trunk."""

    micro_batch_size: int = Field(default=16, ge=1)
    """Rollouts, or lines where pack_tokens says so, of one forward and backward pass on one rank. Changes memory and speed, never the gradient."""

    pack_tokens: int = Field(default=0, ge=0)
    """Fill lines of so many tokens (at most the model's context) with rollouts that do not see each other; 0: one a line, padded. The gradient is the same."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up, down to zero at the last update of the run."""

    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of all updates over which the learning rate rises linearly from zero."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    adam_epsilon: float = Field(default=1e-5, gt=0)
    """AdamW's epsilon; 1e-5 as in the original RLHF code (Huang et al. 2023, detail 9)."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which the gradient is scaled down; 0 turns clipping off."""


class TrainingConfig(LearnerConfig):
    """A gang that trains a model on data that are given, before reinforcement learning."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up, down to zero at the last update."""

    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of all updates over which the learning rate rises linearly from zero."""

    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled weight decay."""


class CriticConfig(LearnerConfig):
    """The gang that trains the value model."""

    start: Literal["policy", "reward"] = "policy"
    """What the value model begins as: the policy's trunk under a head of zeros, or the reward model, head and all (Huang et al. 2023, detail 8)."""
