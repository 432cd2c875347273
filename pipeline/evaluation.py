"""How good a policy is on held-out prompts, and whether it is better than before: same prompts, same random numbers.

Evaluation uses the pools of the run, outside the ledger: its sample ids lie beyond any the run could issue, so its
randomness is its own and identical before and after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from actors import ragged
from actors.experience import Prompts, Rollouts, Scores, TokenLogprobs
from pipeline.config import RunConfig
from pipeline.observe.text import distinct_n
from pipeline.published import PublishedWeights
from pipeline.roles import Roles, Stage

if TYPE_CHECKING:
    import numpy.typing as npt
    from ray import ObjectRef

_BEYOND = 1 << 40  # groups that no run ever reaches


def heldout_groups(prompts: int, available: int) -> range:
    """Group ids of `prompts` different held-out prompts out of `available`: the first of a whole pass over them, far beyond the run's own."""
    first = -(-_BEYOND // available) * available
    return range(first, first + min(prompts, available))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A policy on held-out prompts. R responses, `samples` of them a prompt, in order.

    kl: nats per response to the reference, nan without one. distinct_2: different word pairs over all word pairs of all responses.
    """

    samples: int
    prompts: list[str]  # (R / samples,)
    responses: list[str]  # (R,)
    rewards: npt.NDArray[np.float64]  # (R,), nan where the reward failed
    kl: float
    distinct_2: float
    response_tokens: float

    def to_text(self) -> str:
        """As JSON, every number to the bit."""
        return json.dumps(asdict(self) | {"rewards": [_number(reward) for reward in self.rewards.tolist()], "kl": _number(self.kl)})

    @classmethod
    def from_text(cls, text: str) -> Report:
        """What `to_text` gave."""
        record = json.loads(text)
        rewards = np.array([np.nan if reward is None else reward for reward in record["rewards"]], np.float64)
        return cls(**record | {"rewards": rewards, "kl": np.nan if record["kl"] is None else record["kl"]})

    @property
    def prompt_rewards(self) -> npt.NDArray[np.float64]:
        """Mean reward of each prompt's scored samples, (R / samples,), nan where none was scored."""
        rewards = self.rewards.reshape(-1, self.samples)
        scored = ~np.isnan(rewards)
        sums, counts = np.where(scored, rewards, 0).sum(axis=1), scored.sum(axis=1)
        means = np.full(sums.shape, np.nan)
        means[counts > 0] = sums[counts > 0] / counts[counts > 0]
        return means


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Before and after on the same prompts. `gain` is the mean difference of rewards, prompt by prompt."""

    before: Report
    after: Report
    before_reward: Interval
    after_reward: Interval
    gain: Interval

    def record(self, shown: int) -> dict[str, Any]:
        """What is saved as JSON: the numbers, and the first `shown` replies of each side. JSON knows no nan: what is not there is null."""
        sides = {
            name: {
                "reward": asdict(interval),
                "kl": _number(report.kl),
                "distinct_2": report.distinct_2,
                "response_tokens": report.response_tokens,
                "rewards": [_number(reward) for reward in report.rewards.tolist()],
            }
            for name, report, interval in (("before", self.before, self.before_reward), ("after", self.after, self.after_reward))
        }
        return {"prompts": len(self.before.prompts), "gain": asdict(self.gain), **sides, "replies": [asdict(pair) for pair in self.pairs(shown)]}

    def pairs(self, shown: int) -> list[Pair]:
        """The first sample of the first `shown` prompts, before and after."""
        step = self.before.samples
        return [
            Pair(prompt=prompt, before=self.before.responses[i * step], after=self.after.responses[i * step])
            for i, prompt in enumerate(self.before.prompts[:shown])
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two replies to one prompt."""

    prompt: str
    before: str
    after: str


def compare(before: Report, after: Report, seed: int) -> Comparison:
    """Means, differences and their intervals; one prompt counts once however often it was sampled."""
    assert before.prompts == after.prompts, "before and after must answer the same prompts"
    old, new = before.prompt_rewards, after.prompt_rewards
    return Comparison(
        before=before,
        after=after,
        before_reward=bootstrap(old, seed),
        after_reward=bootstrap(new, seed),
        gain=bootstrap(new - old, seed),
    )


def bootstrap(values: npt.NDArray[np.float64], seed: int, resamples: int = 10_000) -> Interval:
    """Percentile bootstrap of the mean, 95 %. values: (n,), one a prompt; nan is left out. Efron & Tibshirani 1993, ch. 13."""
    values = values[~np.isnan(values)]
    if values.size == 0:
        raise ValueError("evaluation: must have at least one scored response, got none; see the reward workers' logs")
    draws = np.random.Generator(np.random.Philox(seed)).integers(0, values.size, (resamples, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


class Evaluator:
    """Samples and scores the held-out prompts with the run's own pools."""

    def __init__(self, config: RunConfig, roles: Roles, stage: Stage, tokenizer: Any, prompts: Prompts) -> None:
        """prompts: the held-out ones; see heldout_groups."""
        self.config = config
        self.roles = roles
        self.stage = stage
        self.tokenizer = tokenizer
        self.prompts = prompts

    def evaluate(self, weights: PublishedWeights) -> Report:
        """Responses of these weights to every held-out prompt."""
        samples = self.config.evaluation.samples
        per_chunk = max(self.config.rollout.chunk_size // samples, 1)
        chunks = [self.prompts.slice(start, min(per_chunk, len(self.prompts) - start)).table for start in range(0, len(self.prompts), per_chunk)]
        rollouts = self._map(self.roles.rollout, "evaluation rollouts", [_generate(chunk, samples, number, weights) for number, chunk in enumerate(chunks)])
        scores = self._map(self.roles.reward, "evaluation scores", [_score(ref, number) for number, ref in enumerate(rollouts)])
        reference = (
            self._map(self.roles.reference, "evaluation reference", [_logprobs(ref, number) for number, ref in enumerate(rollouts)])
            if self.roles.reference is not None
            else []
        )
        rows, scored, referred = (self.stage.fetch(refs, "evaluation") for refs in (rollouts, scores, reference))
        return self._report(Rollouts.concat([Rollouts(t) for t in rows]), Scores.concat([Scores(t) for t in scored]), referred)

    def _map(self, pool: Any, phase: str, calls: Sequence[Callable[[Any, int], tuple[ObjectRef, ...]]]) -> list[ObjectRef]:
        return [data[0] for _, data in self.stage.map(pool, phase, calls)]

    def _report(self, rollouts: Rollouts, scores: Scores, reference: list[Any]) -> Report:
        tokens, offsets = ragged.flat(rollouts.table["tokens"])
        acted = ragged.flat(rollouts.table["action_mask"])[0]
        texts = self.tokenizer.batch_decode([tokens[a:b][acted[a:b]] for a, b in pairwise(offsets)], skip_special_tokens=True)
        prompts = self.tokenizer.batch_decode(self.prompts.table["tokens"].to_pylist(), skip_special_tokens=True)
        kl = float("nan")
        if reference:
            frozen = ragged.flat(TokenLogprobs.concat([TokenLogprobs(t) for t in reference]).table["logprobs"])[0]
            kl = float((ragged.flat(rollouts.table["logprobs"])[0] - frozen)[acted].sum() / len(rollouts))
        return Report(
            samples=self.config.evaluation.samples,
            prompts=[prompt.strip() for prompt in prompts],
            responses=[text.strip() for text in texts],
            rewards=scores.table["reward"].to_numpy().astype(np.float64),
            kl=kl,
            distinct_2=distinct_n(texts, 2),
            response_tokens=float(acted.sum() / len(rollouts)),
        )


def _generate(prompts: Any, samples: int, number: int, weights: PublishedWeights) -> Callable[[Any, int], tuple[ObjectRef, ...]]:
    return lambda worker, attempt: tuple(worker.generate.options(num_returns=2).remote(prompts, samples, number, attempt, weights))


def _score(rollouts: ObjectRef, number: int) -> Callable[[Any, int], tuple[ObjectRef, ...]]:
    return lambda worker, attempt: tuple(worker.score.options(num_returns=2).remote(rollouts, number, attempt))


def _logprobs(rollouts: ObjectRef, number: int) -> Callable[[Any, int], tuple[ObjectRef, ...]]:
    return lambda worker, attempt: tuple(worker.logprobs.options(num_returns=2).remote(rollouts, number, attempt))
