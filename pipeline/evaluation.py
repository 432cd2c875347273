"""What an evaluation finds: a policy against a baseline on the same held-out prompts, and against best-of-n from the baseline.

`assess` turns what was measured (`Answers`, rows of numbers) into what is said (`Evaluation`); no model, no Ray.
The baseline is the model the policy was aligned from, so the KL between the two is the price of the reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.estimates import Floats, Interval, Matched, best_of, best_of_kl, bootstrap, match, prompt_means, ratio, win_rates
from pipeline.observe.text import distinct_n

NGRAMS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Replies of one model. P prompts, S samples each, prompt by prompt."""

    texts: list[str]  # (P * S,)
    tokens: npt.NDArray[np.int64]  # (P, S) length of each reply
    ended: npt.NDArray[np.bool_]  # (P, S) by itself, not for want of room
    rewards: Mapping[str, Floats]  # judge -> (P, S), nan where the reward failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Log-probs of held-out demonstrations under both models, in nats, and how many tokens they have; (D,) each."""

    policy: Floats
    baseline: Floats
    tokens: Floats
    excluded: int  # longer than the models' context


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that was measured. kl: (P, S) nats of each of the policy's replies, its log-prob when it was sampled minus that under the baseline.

    The baseline may have more samples than the policy: best-of-n needs them, and they sharpen every mean.
    """

    prompts: list[str]  # (P,)
    policy: Answers
    baseline: Answers
    kl: Floats
    likelihood: Likelihood | None  # None: there are no demonstrations


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Both models by one judge. gain: policy minus baseline, prompt by prompt. win_rate: of the policy's replies over the baseline's, ties half.

    failed: replies without a reward, of all replies of both; they are left out.
    """

    policy: Interval
    baseline: Interval
    gain: Interval
    win_rate: Interval
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model's text. distinct: different word n-grams over all, n = 1, 2, 3, of as many replies of each side. perplexity: nan where not measured."""

    tokens: Interval
    ended: float
    distinct: tuple[float, ...]
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """Best-of-n from the baseline, n = 1 ... N, picked by one judge. rewards: by each judge, of what that one picks. left_out: prompts not fully scored."""

    judge: str
    kl: tuple[float, ...]  # nats, of each n
    rewards: dict[str, tuple[Interval, ...]]
    matched: dict[str, Matched]
    left_out: int

    @property
    def shown(self) -> list[int]:
        """1, 2, 4 ... and N: those that tables show."""
        largest = len(self.kl)
        return sorted({*(2**i for i in range(largest.bit_length()) if 2**i <= largest), largest})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A prompt, a reply of each model, and their rewards by each judge (policy's, baseline's; nan where it failed)."""

    prompt: str
    policy: str
    baseline: str
    rewards: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A policy compared. The first judge is the one that was optimised.

    kl: nats a reply from policy to baseline; kl_per_token: the same a token. tax: perplexity of the policy over that of the baseline.
    rewards: (judge, side) -> each sample's, a list a prompt.
    """

    policy: str
    baseline: str
    samples: int
    judges: dict[str, Judged]
    kl: Interval
    kl_per_token: Interval
    sides: dict[str, Side]
    tax: Interval | None
    demonstrations: int
    excluded: int
    best_of: BestOf | None
    replies: list[Reply]
    rewards: dict[str, dict[str, list[list[float]]]] = field(repr=False)

    @property
    def judge(self) -> str:
        """The judge that was optimised."""
        return next(iter(self.judges))

    @property
    def optimised(self) -> Judged:
        """What that judge says."""
        return self.judges[self.judge]

    @property
    def matched(self) -> Matched | None:
        """Policy and best-of-n by that judge; None where best-of-n was not sampled."""
        return self.best_of.matched[self.judge] if self.best_of else None

    def record(self) -> dict[str, Any]:
        """What is saved as JSON. JSON knows neither nan nor infinity: what is not a number is null."""
        found: dict[str, Any] = _plain({"prompts": len(self.replies), **asdict(self)})
        return found


def assess(measured: Measured, *, policy: str, baseline: str, best_of_n: int, seed: int) -> Evaluation:
    """policy, baseline: their names. best_of_n: how many of the baseline's samples best-of-n draws from; 1 leaves it out.

    Raises ValueError when a judge has scored nothing.
    """
    ours, theirs, kl, likelihood = measured.policy, measured.baseline, measured.kl, measured.likelihood
    samples = ours.tokens.shape[1]
    perplexities = _perplexities(likelihood)
    return Evaluation(
        policy=policy,
        baseline=baseline,
        samples=samples,
        judges={name: judged(ours.rewards[name], theirs.rewards[name], seed) for name in ours.rewards},
        kl=bootstrap(kl.mean(axis=1), seed),
        kl_per_token=ratio(kl.sum(axis=1), ours.tokens.sum(axis=1).astype(np.float64), seed),
        sides={"policy": side(ours, samples, perplexities[0], seed), "baseline": side(theirs, samples, perplexities[1], seed)},
        tax=_tax(likelihood, seed),
        demonstrations=len(likelihood.tokens) if likelihood else 0,
        excluded=likelihood.excluded if likelihood else 0,
        best_of=_best_of(measured, best_of_n, seed) if best_of_n > 1 else None,
        replies=[_reply(number, prompt, ours, theirs) for number, prompt in enumerate(measured.prompts)],
        rewards={name: {"policy": ours.rewards[name].tolist(), "baseline": theirs.rewards[name].tolist()} for name in ours.rewards},
    )


def judged(policy: Floats, baseline: Floats, seed: int) -> Judged:
    """(P, S) and (P, M) rewards of the same prompts. A prompt counts once however often it was sampled; one that has no pair says nothing of the gain."""
    ours, theirs = prompt_means(policy), prompt_means(baseline)
    return Judged(
        policy=bootstrap(ours, seed),
        baseline=bootstrap(theirs, seed),
        gain=bootstrap(ours - theirs, seed),
        win_rate=bootstrap(win_rates(policy, baseline), seed),
        failed=int(np.isnan(policy).sum() + np.isnan(baseline).sum()),
    )


def side(answers: Answers, samples: int, perplexity: float, seed: int) -> Side:
    """samples: of each prompt whose words are counted, since more text repeats more."""
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
    with np.errstate(over="ignore"):  # of a model that gives a demonstration no chance; infinite is what it is
        return float(np.exp(-likelihood.policy.sum() / tokens)), float(np.exp(-likelihood.baseline.sum() / tokens))


def _tax(likelihood: Likelihood | None, seed: int) -> Interval | None:
    """Perplexity over perplexity, with demonstrations as the unit."""
    if likelihood is None:
        return None
    nats = ratio(likelihood.baseline - likelihood.policy, likelihood.tokens, seed)
    with np.errstate(over="ignore"):
        return Interval(mean=float(np.exp(nats.mean)), low=float(np.exp(nats.low)), high=float(np.exp(nats.high)))


def _best_of(measured: Measured, n: int, seed: int) -> BestOf:
    rewards = measured.policy.rewards
    judge = next(iter(rewards))
    pool = {name: theirs[:, :n] for name, theirs in measured.baseline.rewards.items()}
    curves = {name: best_of(pool[judge], theirs) for name, theirs in pool.items()}
    kls = measured.kl.mean(axis=1)
    return BestOf(
        judge=judge,
        kl=tuple(best_of_kl(np.arange(1, n + 1)).tolist()),
        rewards={name: tuple(bootstrap(curve[:, i], seed) for i in range(n)) for name, curve in curves.items()},
        matched={name: match(prompt_means(rewards[name]), kls, curve, seed) for name, curve in curves.items()},
        left_out=int(np.isnan(curves[judge]).any(axis=1).sum()),
    )


def _reply(number: int, prompt: str, policy: Answers, baseline: Answers) -> Reply:
    """The first sample of each."""
    return Reply(
        prompt=prompt,
        policy=policy.texts[number * policy.tokens.shape[1]],
        baseline=baseline.texts[number * baseline.tokens.shape[1]],
        rewards={name: (float(policy.rewards[name][number, 0]), float(baseline.rewards[name][number, 0])) for name in policy.rewards},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
