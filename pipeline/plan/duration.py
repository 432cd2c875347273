"""An estimate of the duration of a run: the operations of its stages, at the measured speed of this machine.

    forward 2 P, forward and backward 6 P operations a token (Kaplan et al. 2020), P parameters;
    and a fixed cost for each call of a model

It is right within a factor of two where arithmetic dominates. Left out: attention over long contexts, the time of a
reward function, GPUs, other machines, and other work on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actors.config import LearnerConfig
from pipeline.config.run_config import RunConfig

START_S = 12.0  # of a stage: its processes, on two idle cores
_CALL_S, _LAYER_S = 4e-3, 1e-3  # of one call of a model: its own, and each layer's


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of model and data.

    demonstrations, comparisons: rows, training and held out together. row_tokens: tokens of one, prompt and reply.
    """

    parameters: int
    layers: int
    prompts: int
    heldout: int
    demonstrations: int
    comparisons: int
    row_tokens: float


def seconds(config: RunConfig, size: Size, speed: Mapping[str, float]) -> dict[str, float]:
    """Stage -> seconds, for the stages of a recipe. speed: dtype -> operations a second."""
    count = _Count(config, size, speed)
    found: dict[str, float] = {}
    if config.finetune.epochs:
        found["sft"] = START_S + count.training(
            config.finetune.learner, size.demonstrations * config.finetune.epochs, size.row_tokens
        )
    if config.reward_model.epochs:
        found["reward"] = START_S + count.reward_model()
    found["rl"] = START_S + config.steps * sum(step(config, size, speed).values())
    found["evaluate"] = START_S + count.evaluation()
    return found


def step(config: RunConfig, size: Size, speed: Mapping[str, float]) -> dict[str, float]:
    """Phase -> seconds of one step of reinforcement learning; every rollout as long as it may be."""
    count, samples = _Count(config, size, speed), config.batch.samples
    learners = [config.policy, *([config.critic] if config.algorithm.needs_critic else [])]
    found = {
        "rollout": count.sampling(samples),
        "learn": sum(count.training(learner, samples * config.batch.epochs, count.tokens) for learner in learners),
    }
    passes = [config.reference.dtype] * config.algorithm.needs_reference + [
        config.critic.dtype
    ] * config.algorithm.needs_critic
    passes += [config.policy.dtype] * config.algorithm.needs_proximal + ["float32"] * bool(
        config.reward.model or config.reward_model.epochs
    )
    return found | {"evaluate": sum(count.reading(dtype, samples, count.tokens) for dtype in passes)}


class _Count:
    """The seconds of what a run is made of."""

    def __init__(self, config: RunConfig, size: Size, speed: Mapping[str, float]) -> None:
        self.config, self.size, self.speed = config, size, speed
        self.tokens = float(config.most_tokens)  # of a rollout
        self._call_s = _CALL_S + _LAYER_S * size.layers

    def sampling(self, samples: int) -> float:
        """One call a token; rows are decoded `slots` at a time."""
        calls = (
            -(-samples // min(self.config.rollout.slots, self.config.rollout.chunk_size))
            * self.config.most_action_tokens
        )
        return self._operations(2, samples * self.tokens, self.config.rollout.dtype) + calls * self._call_s

    def reading(self, dtype: str, rows: int, tokens: float) -> float:
        return self._operations(2, rows * tokens, dtype) + -(-rows // self.config.reference.batch_size) * self._call_s

    def training(self, learner: LearnerConfig, rows: int, tokens: float) -> float:
        """A backward pass costs twice a forward one; on a frozen trunk there is nearly none."""
        passes = 3 if learner.trainable == "all" else 1
        return (
            self._operations(2 * passes, rows * tokens, learner.dtype)
            + -(-rows // learner.micro_batch_size) * passes * self._call_s
        )

    def reward_model(self) -> float:
        """Each row is a ranking; all its replies are read."""
        config = self.config.reward_model
        if config.pairs == "task":
            return self.training(config.learner, 2 * self.size.comparisons * config.epochs, self.size.row_tokens)
        replies = config.samples * (self.size.prompts + self.size.heldout)
        return self.sampling(replies) + self.training(config.learner, replies * config.epochs, self.tokens)

    def evaluation(self) -> float:
        config = self.config.evaluation
        prompts = min(config.prompts, self.size.heldout)
        read = self.reading(self.config.reference.dtype, prompts * config.samples, self.tokens)
        likely = self.reading(
            self.config.reference.dtype, 2 * min(config.demonstrations, self.size.demonstrations), self.size.row_tokens
        )
        return self.sampling(prompts * (config.samples + max(config.best_of, config.samples))) + read + likely

    def _operations(self, each: int, tokens: float, dtype: str) -> float:
        return each * self.size.parameters * tokens / self.speed[dtype]
