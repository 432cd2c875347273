"""The result of an evaluation: a policy against a baseline, and against best-of-n sampling from that baseline.

    Measurements (rows of numbers) --assess--> Evaluation (means with intervals)

No model, no Ray. The baseline is the model that the policy was aligned from, so the KL between the two is the price of
the reward.

Shapes: P prompts, S samples of each, D demonstrations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.statistics import (
    BestOfMatch,
    Floats,
    Interval,
    best_of,
    best_of_kl,
    bootstrap,
    match,
    prompt_means,
    ratio,
    win_rates,
)
from pipeline.tasks.text_measures import distinct_n

NGRAMS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Replies of one model to P prompts, S samples of each, in the order of the prompts."""

    texts: list[str]  # (P * S,)
    tokens: npt.NDArray[np.int64]  # (P, S) length of each reply
    ended: npt.NDArray[np.bool_]  # (P, S) whether the reply ended by itself and was not cut off
    rewards: Mapping[str, Floats]  # judge -> (P, S), NaN where the reward failed
    measures: Mapping[str, Floats] = field(default_factory=dict)  # measure -> (P, S), NaN where it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Log-probs of D held-out demonstrations under both models, in nats, and their numbers of tokens; (D,) each."""

    policy: Floats
    baseline: Floats
    tokens: Floats
    excluded: int  # demonstrations longer than the models' context


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """All that was measured.

    kl: (P, S), for each reply of the policy its log-prob when sampled minus its log-prob under the baseline, in nats.
    The baseline may have more samples than the policy: best-of-n needs them, and they sharpen every mean.
    """

    prompts: list[str]  # (P,)
    policy: Answers
    baseline: Answers
    kl: Floats
    likelihood: Likelihood | None  # None without demonstrations


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeResult:
    """Both models as one judge scores them.

    policy, baseline: mean rewards. gain: policy minus baseline, paired by prompt. win_rate: share of pairs of replies
    in which the policy's is better; ties count half. failed: replies of both models without a reward; they are left
    out.
    """

    policy: Interval
    baseline: Interval
    gain: Interval
    win_rate: Interval
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureResult:
    """A share of the replies of both models, in [0, 1]. gain: policy minus baseline, paired by prompt."""

    policy: Interval
    baseline: Interval
    gain: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The text of one model.

    tokens: length of a reply. ended: share of replies that end by themselves. distinct: share of word n-grams that are
    different, n = 1, 2, 3, over the same number of replies of each model. perplexity: NaN where not measured.
    """

    tokens: Interval
    ended: float
    distinct: tuple[float, ...]
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """Best-of-n from the baseline for n = 1 to N, where one judge picks the best.

    kl: an upper bound for each n, in nats. rewards: for each judge, its reward of the picked replies, for each n.
    left_out: prompts with a reply that has no reward.
    """

    judge: str
    kl: tuple[float, ...]  # (N,)
    rewards: dict[str, tuple[Interval, ...]]
    matched: dict[str, BestOfMatch]
    left_out: int

    @property
    def shown(self) -> list[int]:
        """The n that tables show: 1, 2, 4 ... and N."""
        largest = len(self.kl)
        return sorted({*(2**i for i in range(largest.bit_length()) if 2**i <= largest), largest})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A prompt, a reply of each model, and each judge's rewards of both (policy, baseline; NaN where it failed)."""

    prompt: str
    policy: str
    baseline: str
    rewards: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A policy compared with its baseline. The first judge is the one whose reward was optimised.

    samples: of the policy to each prompt. kl: KL divergence from the policy to the baseline, nats per reply;
    kl_per_token: nats per token. tax: perplexity of the policy divided by that of the baseline. demonstrations,
    excluded: how many were measured, and how many were too long. rewards: judge -> model -> a list of rewards for each
    prompt.
    """

    policy: str
    baseline: str
    samples: int
    judges: dict[str, JudgeResult]
    kl: Interval
    kl_per_token: Interval
    sides: dict[str, Side]
    tax: Interval | None
    demonstrations: int
    excluded: int
    best_of: BestOf | None
    replies: list[Reply]
    rewards: dict[str, dict[str, list[list[float]]]] = field(repr=False)
    lacking: tuple[str, ...] = ()
    """What could not be computed, and why, one line each."""
    measures: dict[str, MeasureResult] = field(default_factory=dict)
    """What the task measures about each reply besides, by name."""

    @property
    def judge(self) -> str:
        """The judge whose reward was optimised."""
        return next(iter(self.judges))

    @property
    def optimised(self) -> JudgeResult:
        """The result by that judge."""
        return self.judges[self.judge]

    @property
    def matched(self) -> BestOfMatch | None:
        """Policy against best-of-n by that judge; None if best-of-n was not sampled."""
        return self.best_of.matched[self.judge] if self.best_of else None

    def record(self) -> dict[str, Any]:
        """The record that is saved as JSON. JSON has neither NaN nor infinity; both become null."""
        found: dict[str, Any] = _plain({"prompts": len(self.replies), **asdict(self)})
        absent = [name for name in ("lacking", "measures") if not found[name]]
        return {key: value for key, value in found.items() if key not in absent}


def assess(measured: Measurements, *, policy: str, baseline: str, best_of_n: int, seed: int) -> Evaluation:
    """Compute the evaluation from the measurements.

    policy, baseline: their names. best_of_n: how many of the baseline's samples best-of-n draws from; 1 leaves
    best-of-n out. A judge is left out if it has scored no prompt for both models, and best-of-n if every prompt has a
    reply without a reward. Raises ValueError when no judge is left.
    """
    measured, lacking = _scored(measured)
    best = _best_of(measured, best_of_n, seed) if best_of_n > 1 else None
    if best_of_n > 1 and best is None:
        lacking = (*lacking, "best-of-n (no prompt has a reward for every reply of the baseline)")
    ours, theirs, kl, likelihood = measured.policy, measured.baseline, measured.kl, measured.likelihood
    samples = ours.tokens.shape[1]
    measures = _measured(ours.measures, theirs.measures, seed)
    perplexities = _perplexities(likelihood)
    return Evaluation(
        policy=policy,
        baseline=baseline,
        samples=samples,
        judges={name: judged(ours.rewards[name], theirs.rewards[name], seed) for name in ours.rewards},
        kl=bootstrap(kl.mean(axis=1), seed),
        kl_per_token=ratio(kl.sum(axis=1), ours.tokens.sum(axis=1).astype(np.float64), seed),
        sides={
            "policy": side(ours, samples, perplexities[0], seed),
            "baseline": side(theirs, samples, perplexities[1], seed),
        },
        tax=_tax(likelihood, seed),
        demonstrations=len(likelihood.tokens) if likelihood else 0,
        excluded=likelihood.excluded if likelihood else 0,
        best_of=best,
        lacking=(*lacking, *(f"{name} (measured for no prompt)" for name in ours.measures if name not in measures)),
        measures=measures,
        replies=[_reply(number, prompt, ours, theirs) for number, prompt in enumerate(measured.prompts)],
        rewards={
            name: {"policy": ours.rewards[name].tolist(), "baseline": theirs.rewards[name].tolist()}
            for name in ours.rewards
        },
    )


def _scored(measured: Measurements) -> tuple[Measurements, tuple[str, ...]]:
    """Keep the judges that have scored a prompt for both models; returns also a line for each of the others."""
    ours, theirs = measured.policy.rewards, measured.baseline.rewards
    silent = [name for name in ours if np.isnan(prompt_means(ours[name]) - prompt_means(theirs[name])).all()]
    if len(silent) == len(ours):
        raise ValueError("evaluation: must have at least one scored response, got none; see the examiners' logs")
    kept = [{name: rewards for name, rewards in side.items() if name not in silent} for side in (ours, theirs)]
    scored = replace(
        measured, policy=replace(measured.policy, rewards=kept[0]), baseline=replace(measured.baseline, rewards=kept[1])
    )
    return scored, tuple(
        f"the {name} (it scored no prompt's replies on both sides; see the examiners' logs)" for name in silent
    )


def judged(policy: Floats, baseline: Floats, seed: int) -> JudgeResult:
    """The result by one judge, from rewards (P, S) of the policy and (P, M) of the baseline on the same prompts.

    A prompt counts once however often it was sampled. A prompt without a reward for both models is not in the gain.
    """
    ours, theirs = prompt_means(policy), prompt_means(baseline)
    return JudgeResult(
        policy=bootstrap(ours, seed),
        baseline=bootstrap(theirs, seed),
        gain=bootstrap(ours - theirs, seed),
        win_rate=bootstrap(win_rates(policy, baseline), seed),
        failed=int(np.isnan(policy).sum() + np.isnan(baseline).sum()),
    )


def _measured(policy: Mapping[str, Floats], baseline: Mapping[str, Floats], seed: int) -> dict[str, MeasureResult]:
    """The measures that have a number for some prompt of both models."""
    found = {name: (prompt_means(ours), prompt_means(baseline[name])) for name, ours in policy.items()}
    return {
        name: MeasureResult(policy=bootstrap(ours, seed), baseline=bootstrap(theirs, seed), gain=bootstrap(gain, seed))
        for name, (ours, theirs) in found.items()
        if not np.isnan(gain := ours - theirs).all()
    }


def side(answers: Answers, samples: int, perplexity: float, seed: int) -> Side:
    """The text of one model. samples: replies to each prompt that distinct-n counts, because more text repeats more."""
    per_prompt = answers.tokens.shape[1]
    texts = [text for number, text in enumerate(answers.texts) if number % per_prompt < samples]
    return Side(
        tokens=bootstrap(answers.tokens.mean(axis=1), seed),
        ended=float(answers.ended.mean()),
        distinct=tuple(distinct_n(texts, n) for n in NGRAMS),
        perplexity=perplexity,
    )


def _perplexities(likelihood: Likelihood | None) -> tuple[float, float]:
    if likelihood is None:
        return math.nan, math.nan
    tokens = likelihood.tokens.sum()
    with np.errstate(over="ignore"):  # infinite for a model that gives a demonstration no chance
        return float(np.exp(-likelihood.policy.sum() / tokens)), float(np.exp(-likelihood.baseline.sum() / tokens))


def _tax(likelihood: Likelihood | None, seed: int) -> Interval | None:
    """Perplexity of the policy over that of the baseline, resampled over demonstrations."""
    if likelihood is None:
        return None
    nats = ratio(likelihood.baseline - likelihood.policy, likelihood.tokens, seed)
    with np.errstate(over="ignore"):
        return Interval(mean=float(np.exp(nats.mean)), low=float(np.exp(nats.low)), high=float(np.exp(nats.high)))


def _best_of(measured: Measurements, n: int, seed: int) -> BestOf | None:
    """Best-of-n, or None if no prompt has a reward for each of the baseline's first n replies."""
    rewards = measured.policy.rewards
    judge = next(iter(rewards))
    pool = {name: theirs[:, :n] for name, theirs in measured.baseline.rewards.items()}
    curves = {name: best_of(pool[judge], theirs) for name, theirs in pool.items()}
    if any(
        (np.isnan(curve).any(axis=1) | np.isnan(prompt_means(rewards[name]))).all() for name, curve in curves.items()
    ):
        return None
    kls = measured.kl.mean(axis=1)
    return BestOf(
        judge=judge,
        kl=tuple(best_of_kl(np.arange(1, n + 1)).tolist()),
        rewards={name: tuple(bootstrap(curve[:, i], seed) for i in range(n)) for name, curve in curves.items()},
        matched={name: match(prompt_means(rewards[name]), kls, curve, seed) for name, curve in curves.items()},
        left_out=int(np.isnan(curves[judge]).any(axis=1).sum()),
    )


def _reply(number: int, prompt: str, policy: Answers, baseline: Answers) -> Reply:
    """The first reply of each model to a prompt."""
    return Reply(
        prompt=prompt,
        policy=policy.texts[number * policy.tokens.shape[1]],
        baseline=baseline.texts[number * baseline.tokens.shape[1]],
        rewards={
            name: (float(policy.rewards[name][number, 0]), float(baseline.rewards[name][number, 0]))
            for name in policy.rewards
        },
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
