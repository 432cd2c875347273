"""The rows and sentences of an evaluation, the same in the terminal and in the report.

They say whether the policy is better, at what price, and whether best-of-n sampling would do as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.evaluation.statistics import best_of_at

if TYPE_CHECKING:
    from pipeline.evaluation.results import Evaluation
    from pipeline.evaluation.statistics import BestOfMatch, Interval


def rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Rows of (name, baseline, policy); "" where one of them has no number. In brackets: 95 % intervals."""
    lines: list[tuple[str, str, str]] = []
    for name, judged in evaluation.judges.items():
        lines.append((f"reward by the {name}", signed(judged.baseline), signed(judged.policy)))
        lines.append((f"win rate by the {name}", "", _share(judged.win_rate)))
        if judged.failed:
            lines.append((f"not scored by the {name}, left out", str(judged.failed), ""))
    for name, measured in evaluation.measures.items():
        lines.append((name, _share(measured.baseline), _share(measured.policy)))
    kl, a_token = evaluation.kl, evaluation.kl_per_token
    lines.append(("KL to the baseline, nats", "0", f"{kl.mean:.2f} ({kl.low:.2f} to {kl.high:.2f})"))
    lines.append(("KL per token, nats", "0", f"{a_token.mean:.3f} ({a_token.low:.3f} to {a_token.high:.3f})"))
    if evaluation.best_of is not None:
        for name, found in evaluation.best_of.matched.items():
            which = f"best-of-{len(evaluation.best_of.kl)}, at less KL" if found.is_bound else "best-of-n at that KL"
            lines.append((which if name == evaluation.judge else f"... by the {name}", signed(found.reward), ""))
    base, policy = evaluation.sides["baseline"], evaluation.sides["policy"]
    if evaluation.tax is not None:
        lines.append(("held-out perplexity", f"{base.perplexity:.2f}", f"{policy.perplexity:.2f}"))
    lines += [
        (f"distinct-{n}", f"{a:.3f}", f"{b:.3f}")
        for n, (a, b) in enumerate(zip(base.distinct, policy.distinct, strict=True), start=1)
    ]
    lines.append(("tokens of a reply", f"{base.tokens.mean:.1f}", f"{policy.tokens.mean:.1f}"))
    lines.append(("replies that end", f"{base.ended:.1%}", f"{policy.ended:.1%}"))
    return lines


def verdict(evaluation: Evaluation) -> str:
    """One sentence: the reward rose, fell, or cannot be told from what it was."""
    gain = evaluation.optimised.gain
    return (
        f"{_judged(gain, 'The reward rose', 'The reward fell', 'The reward cannot be told from what it was')}: "
        f"{gain.mean:+.3f} a prompt, {between(gain)}."
    )


def price(evaluation: Evaluation) -> str:
    """What the reward cost: KL in nats, and perplexity on held-out demonstrations."""
    kl, tax = evaluation.kl, evaluation.tax
    said = f"The policy is {kl.mean:.2f} nats a reply from the baseline ({kl.low:.2f} to {kl.high:.2f})"
    if tax is None:
        return f"{said}."
    before, after = evaluation.sides["baseline"].perplexity, evaluation.sides["policy"].perplexity
    change = _judged(_less_one(tax), "rose", "fell", "cannot be told from what it was")
    return (
        f"{said}; its perplexity on {evaluation.demonstrations} held-out demonstrations {change}: {before:.1f} before, "
        f"{after:.1f} now, x {tax.mean:.2f}."
    )


def yardstick(evaluation: Evaluation) -> str:
    """The policy compared with best-of-n at the same KL, also if it loses; "" if best-of-n was not sampled."""
    best, found = evaluation.best_of, evaluation.matched
    if best is None or found is None:
        return ""
    largest, at_most, top = len(best.kl), best.kl[-1], best.rewards[best.judge][-1]
    n = best_of_at(evaluation.kl.mean)
    if not found.is_bound:
        said = (
            f"Best-of-n from the baseline at the same KL (n about {n:.1f}) has a reward of {found.reward.mean:+.3f}: "
            f"the policy is {_lead(found)}."
        )
    elif found.lead.high < 0:
        said = (
            f"Best-of-{largest} from the baseline has a reward of {top.mean:+.3f} at only {at_most:.2f} nats: the "
            f"policy is {_lead(found)}, "
            f"and n about {_n(n)}, which the policy's KL would buy, can only be better."
        )
    else:
        said = (
            f"The policy is further from the baseline than best-of-{largest}, which has a reward of {top.mean:+.3f} at "
            f"{at_most:.2f} nats, where the policy is "
            f"{_lead(found)}; its KL would buy n about {_n(n)}, which was not sampled: raise evaluation.best_of to "
            "compare."
        )
    return f"{said} {_same_reward(evaluation, found, largest)}"


def left_out(evaluation: Evaluation) -> str:
    """What the evaluation could not compute, and why; "" if it is complete."""
    return f"Left out: {'; '.join(evaluation.lacking)}." if evaluation.lacking else ""


def between(interval: Interval) -> str:
    return f"95 % interval {interval.low:+.3f} to {interval.high:+.3f}"


def signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _share(interval: Interval) -> str:
    return f"{interval.mean:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def _same_reward(evaluation: Evaluation, found: BestOfMatch, largest: int) -> str:
    if math.isinf(found.kl.mean):
        return f"Best-of-{largest} does not reach the policy's reward."
    return f"The policy's reward costs best-of-n {found.kl.mean:.2f} nats, the policy {evaluation.kl.mean:.2f}."


def _lead(found: BestOfMatch) -> str:
    lead = found.lead
    if lead.low <= 0 <= lead.high:
        return f"not told apart from it ({lead.mean:+.3f}, {between(lead)})"
    return f"{abs(lead.mean):.3f} {'above' if lead.mean > 0 else 'below'} it ({between(lead)})"


def _judged(interval: Interval, above: str, below: str, neither: str) -> str:
    return above if interval.low > 0 else below if interval.high < 0 else neither


def _less_one(ratio: Interval) -> Interval:
    return type(ratio)(mean=ratio.mean - 1, low=ratio.low - 1, high=ratio.high - 1)


def _n(n: float) -> str:
    return f"{n:.0f}" if n < 1e4 else f"{n:.0e}"
