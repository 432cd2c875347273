"""Settings of the actors: models, sampling, the worker pools and the learners. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from actors.hub import expand
from cluster.config import MOST_WORKERS, Config, Seconds

Dtype = Literal["float32", "bfloat16"]
PathOrName = Annotated[str, AfterValidator(expand)]  # a local file or folder, or a name on the hub
MOST_TOKENS = 2**31 - 1  # of one sequence, because positions have 32 bits
MOST_SAMPLES = 65_536  # of one prompt, because sample ids have 63 bits
OPTION_NAME = r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*"  # what every normaliser and chat template leaves alone
MOST_TURNS = 1024  # of one conversation
MODEL_PARTNER = "model-partner"  # name of the environment that is a language model
DtypeChoice = Literal["float32", "bfloat16", "auto"]
"""A dtype, or auto: bfloat16 where the device has arithmetic for it, else float32.

auto is decided once, when a run starts, and config.toml records the result. It is not the default, because the same
recipe then gives other weights on another machine.
"""


def settled(dtype: DtypeChoice) -> Dtype:
    """The dtype of a configuration whose `auto` was replaced (see pipeline/plan/dtypes.py)."""
    assert dtype != "auto", "dtype: auto is settled before anything starts"
    return dtype


class SamplingConfig(Config):
    """The choice of the next token."""

    max_new_tokens: int = Field(default=32, ge=1, le=MOST_TOKENS)
    """Longest completion, in tokens."""

    temperature: float = Field(default=1.0, ge=0, le=100)
    """Divisor of the logits, in rollouts and in every recomputed log-prob. 0 takes the likeliest token."""

    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens only; 0: all.

    Training needs 0, or the learner could not recompute the log-probs.
    """

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens with this total probability. Training needs 1."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion, besides the end-of-text token; they stay in the rollout."""


class EnvironmentConfig(Config):
    """The other side of conversations. Without a name, a rollout is one reply to a prompt."""

    name: str = ""
    """world, twenty-questions, model-partner, or your own as `package.module:name`.

    Your own is a class or function that makes an environment.
    """

    partner: PathOrName = ""
    """Folder or hub name of a causal LM with its tokenizer that talks with the policy, and never learns.

    For model-partner, or an environment of your own that is made with it.
    """

    max_turns: int = Field(default=8, ge=1, le=MOST_TURNS)
    """Most replies of the policy in a conversation; the environment may end it earlier."""

    timeout_s: Seconds = 60.0
    """Longest time of an answer, in seconds; a conversation that waits longer has failed."""

    attempts: int = Field(default=1, ge=1, le=100)
    """How often a conversation in which the environment failed is had again; then its sample is quarantined."""


class RolloutConfig(Config):
    """The pool that generates rollouts."""

    workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Number of rollout actors. It never changes the samples."""

    min_workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Workers with which a run begins and goes on; the others come and go with the nodes of a cluster."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each worker."""

    dtype: DtypeChoice = "float32"
    """Weights and arithmetic of generation. auto: bfloat16 where the device has arithmetic for it, else float32."""

    chunk_size: int = Field(default=64, ge=1)
    """Samples of one call to a worker, rounded down to whole groups; they are re-issued when a worker is lost."""

    segment_tokens: int = Field(default=64, ge=1, le=MOST_TOKENS)
    """With schedule = freshest: tokens of a reply after which it is gone on with by the newest weights."""

    slots: int = Field(default=64, ge=8, le=MOST_SAMPLES, multiple_of=8)
    """Rows that the engine decodes at once; fixed for the run, so that a row's bits do not depend on its neighbours."""


class RewardConfig(Config):
    """The pool that scores. Give either a function or a model; a task brings its own function."""

    function: str = ""
    """Reward function as `package.module:name`, called as f(prompts, responses, metadata) -> one number each."""

    model: PathOrName = ""
    """Folder or hub name of a Hugging Face sequence classifier; the logit of its one output is the reward."""

    label: int = Field(default=-1, ge=-1)
    """Number of the classifier's output whose logit is the reward; -1: its only one."""

    workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Number of reward actors."""

    min_workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Workers with which a run begins and goes on; the others come and go with the nodes of a cluster."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each worker."""

    batch_size: int = Field(default=64, ge=1)
    """Rollouts scored by one call of the function or one forward pass of the model."""

    timeout_s: Seconds = 60.0
    """Longest time of one call of the function, in seconds; a single sample that exceeds it is a `timeout`."""

    max_failed: float = Field(default=0.1, ge=0, le=1)
    """Share of a run's samples that may be quarantined before the run stops.

    They have no reward, or they kill or hang a worker.
    """


class ReferenceConfig(Config):
    """The pool that computes the frozen reference's log-probs."""

    workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Number of reference actors."""

    min_workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Workers with which a run begins and goes on; the others come and go with the nodes of a cluster."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each worker."""

    dtype: DtypeChoice = "float32"
    """Weights and arithmetic of the reference. auto: as for rollout.dtype."""

    batch_size: int = Field(default=32, ge=1)
    """Rollouts of one forward pass."""


class LearnerConfig(Config):
    """A gang of ranks that trains one model under DeepSpeed."""

    ranks: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Processes that train the model; the gradient is the same for every number."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each rank."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed shards over the ranks: 0 nothing, 1 optimiser states, 2 also gradients, 3 also parameters."""

    dtype: DtypeChoice = "float32"
    """Weights and arithmetic of training. auto: bfloat16 where the device has arithmetic for it, else float32.

    With bfloat16, DeepSpeed keeps float32 master weights, and above stage 0 it also sums gradients in float32. With
    auto, weights may differ between machines.
    """

    trainable: Literal["all", "heads"] = "all"
    """Trained weights: all, or heads: the output head alone, on the frozen trunk.

    The policy's head is then untied from its embeddings; the critic's is the value head.
    """

    micro_batch_size: int = Field(default=16, ge=1)
    """Rollouts (with pack_tokens: lines) of one pass on one rank. It changes memory and speed, never the gradient."""

    pack_tokens: int = Field(default=0, ge=0, le=MOST_TOKENS)
    """Pack rollouts into lines of so many tokens, at most the model's context; 0: one a line, padded.

    Rollouts on a line do not see each other, and the gradient is the same.
    """

    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    """Peak learning rate of AdamW."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up, down to zero at the last update of the run."""

    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of all updates over which the learning rate rises linearly from zero."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    adam_epsilon: float = Field(default=1e-5, ge=1e-30, le=1)
    """AdamW's epsilon; 1e-5 as in the original RLHF code (Huang et al. 2023, detail 9)."""

    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which the gradient is scaled down; 0 turns clipping off."""


class TrainingConfig(LearnerConfig):
    """A gang that trains a model on data that are given, before reinforcement learning."""

    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """Peak learning rate of AdamW."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up, down to zero at the last update."""

    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of all updates over which the learning rate rises linearly from zero."""

    weight_decay: float = Field(default=0.1, ge=0, le=10)
    """AdamW's decoupled weight decay."""


class CriticConfig(LearnerConfig):
    """The gang that trains the value model."""

    start: Literal["policy", "reward"] = "policy"
    """Start of the value model: the policy's trunk with a head of zeros, or the reward model with its head.

    Huang et al. 2023, detail 8.
    """


class ManagerConfig(Config):
    """The high-level policy, which chooses an option for each turn; RLlib's PPO trains it on the extrinsic reward.

    Without options there is none, and the policy speaks without being told what to do.
    """

    options: tuple[str, ...] = ()
    """Names of the sub-tasks, as the environment offers them. Each is a control token before the turn."""

    start: Literal["uniform", "demonstrations"] = "uniform"
    """What the manager chooses before it has learned: any option on offer alike, or as the demonstrations do.

    Demonstrations show options if their prompts end with control tokens.
    """

    check: str = ""
    """Your check of sub-tasks as `package.module:name`, called as f(options, replies) -> one number each.

    1: the reply carries out its option; 0: it does not.
    """

    check_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the check in the worker's reward for a turn. The manager never sees it."""

    diversity_coef: float = Field(default=0.0, ge=0)
    """Coefficient of log q(option | reply) - log p(option) in the worker's reward for a turn; 0: no discriminator.

    q is learnt from the replies, so options that are told apart by their words pay. The manager never sees it.
    """

    discriminator_learning_rate: float = Field(default=0.02, gt=0, le=1)
    """Learning rate of the discriminator's Adam, constant."""

    discriminator_epochs: int = Field(default=4, ge=1)
    """Passes of the discriminator over the turns of a step; each is one update."""

    worker_lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation over the tokens of a turn, for the worker."""

    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Learning rate of Adam, constant."""

    adam_epsilon: float = Field(default=1e-5, ge=1e-30, le=1)
    """Adam's epsilon."""

    epochs: int = Field(default=4, ge=1)
    """Passes over the turns of a step; each takes every turn once, in a new order."""

    minibatch_size: int = Field(default=64, ge=1)
    """Most turns of one update. An epoch is cut into equal minibatches of at most so many."""

    clip: float = Field(default=0.2, gt=0, lt=1)
    """Bound of the probability ratio, on both sides of 1."""

    gamma: float = Field(default=0.95, ge=0, le=1)
    """Discount of a turn."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation over turns."""

    entropy_coef: float = Field(default=0.01, ge=0)
    """Weight of the entropy bonus."""

    value_coef: float = Field(default=0.5, ge=0)
    """Weight of the squared error of the value in the loss."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which the gradient is scaled down; 0 turns clipping off."""
