"""Evaluations made of rewards alone, for tests of what is computed and said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.evaluation.results import Answers, Evaluation, Likelihood, Measurements, assess

Rewards = Sequence[Sequence[float]]  # a list a prompt


def answers(rewards: Rewards | Mapping[str, Rewards], text: str, tokens: int = 8) -> Answers:
    """text: of every reply; a single word is numbered by prompt and sample."""
    judged = {
        name: np.array(given, np.float64)
        for name, given in (rewards if isinstance(rewards, Mapping) else {"rule": rewards}).items()
    }
    prompts, samples = shape = next(iter(judged.values())).shape
    texts = [text if " " in text else f"{text} {i} {k}" for i in range(prompts) for k in range(samples)]
    return Answers(texts=texts, tokens=np.full(shape, tokens), ended=np.ones(shape, np.bool_), rewards=judged)


def measured(
    policy: Rewards | Mapping[str, Rewards],
    baseline: Rewards | Mapping[str, Rewards],
    *,
    kl: float = 1.0,
    tokens: int = 8,
    words: tuple[str, str] = ("new", "old"),
    likelihood: Likelihood | None = None,
) -> Measurements:
    ours, theirs = answers(policy, words[0], tokens), answers(baseline, words[1], tokens)
    prompts = [f"prompt {i}" for i in range(len(ours.tokens))]
    return Measurements(
        prompts=prompts, policy=ours, baseline=theirs, kl=np.full(ours.tokens.shape, kl), likelihood=likelihood
    )


def evaluation(
    policy: Rewards | Mapping[str, Rewards],
    baseline: Rewards | Mapping[str, Rewards],
    *,
    kl: float = 1.0,
    best_of_n: int = 1,
    tokens: int = 8,
) -> Evaluation:
    return assess(
        measured(policy, baseline, kl=kl, tokens=tokens),
        policy="policy",
        baseline="finetuned",
        best_of_n=best_of_n,
        seed=0,
    )
