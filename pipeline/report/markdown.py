"""The report of an evaluation: `report.md`, its picture `frontier.png`, and `evaluation.json` with every number.

Left out: HTML. Data and reward model have reports of their own, to which this one links.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import Folder
from pipeline.observe.observer import read_metrics
from pipeline.observe.warnings import summary
from pipeline.preparation.reward_model_report import RewardModelReport
from pipeline.report import frontier
from pipeline.report.wording import left_out, price, rows, signed, verdict, yardstick

if TYPE_CHECKING:
    from pipeline.evaluation.results import BestOf, Evaluation
    from pipeline.preparation.reward_model_report import Proportion

EVALUATION, REPORT, FRONTIER = "evaluation.json", "report.md", "frontier.png"
_SHOWN = 10  # prompts whose replies are in report.md; the JSON has all


def write(evaluation: Evaluation, folder: Path, run_dir: Path | None) -> None:
    """Write all three files into `folder`, each whole, the JSON last.

    run_dir: the run that made the policy, if any; its metrics and other reports are used.
    """
    target, steps = Folder(folder), read_metrics(run_dir) if run_dir else []
    target.write_file(FRONTIER, lambda path: frontier.draw(evaluation, steps, path))
    target.write_text(REPORT, markdown(evaluation, folder, run_dir))
    target.write_text(EVALUATION, json.dumps(evaluation.record(), indent=1, allow_nan=False))


def markdown(evaluation: Evaluation, folder: Path, run_dir: Path | None) -> str:
    """The text of report.md in `folder`. Replies are quoted as code, so that nothing in them is taken for Markdown."""
    parts = [
        f"# {evaluation.policy} against {evaluation.baseline}",
        " ".join(filter(None, (verdict(evaluation), _won(evaluation), price(evaluation), yardstick(evaluation)))),
        f"![reward against KL]({FRONTIER})",
        f"{len(evaluation.replies)} held-out prompts, {evaluation.samples} replies of the policy to each. All "
        "intervals are 95 %, by bootstrap over prompts.",
        _table(("", "baseline", "policy"), rows(evaluation)),
        *filter(None, [left_out(evaluation)]),
        *_best_of(evaluation),
        *_context(folder, run_dir),
        "## Replies",
        "The first prompts, and the first reply of each model to them.",
        _table(
            ("prompt", "baseline", "policy"),
            [tuple(map(_code, (r.prompt, r.baseline, r.policy))) for r in evaluation.replies[:_SHOWN]],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _won(evaluation: Evaluation) -> str:
    won = evaluation.optimised.win_rate
    return (
        f"By the {evaluation.judge}, the policy's reply is the better one {won.mean:.1%} of the time ({won.low:.1%} to "
        f"{won.high:.1%}, ties half)."
    )


def _best_of(evaluation: Evaluation) -> list[str]:
    best = evaluation.best_of
    if best is None:
        return []
    others = "; the other judges score those same replies" if len(best.rewards) > 1 else ""
    note = (
        f"Of n replies of the baseline the {best.judge} picks the best{others}. Unbiased estimates from {len(best.kl)} "
        "replies a prompt; "
        "KL(n) = log n - (n - 1) / n, an upper bound."
    )
    left_out = f" {best.left_out} prompts had a reply without a reward and are left out." if best.left_out else ""
    header = ("n", "KL, nats", *(f"reward by the {name}" for name in best.rewards))
    return ["## Best-of-n, the yardstick", note + left_out, _table(header, _best_of_rows(best, evaluation))]


def _best_of_rows(best: BestOf, evaluation: Evaluation) -> Iterable[tuple[str, ...]]:
    for n in best.shown:
        yield str(n), f"{best.kl[n - 1]:.2f}", *(signed(curve[n - 1]) for curve in best.rewards.values())
    yield "the policy", f"{evaluation.kl.mean:.2f}", *(signed(judged.policy) for judged in evaluation.judges.values())


def _context(folder: Path, run_dir: Path | None) -> list[str]:
    """The sections about the run: steps in which nothing was learned, its data, its reward model."""
    if run_dir is None:
        return []
    silent = summary(read_metrics(run_dir))
    return [*(["## Steps in which nothing was learned", *silent] if silent else []), *_made_of(folder, run_dir)]


def _made_of(folder: Path, run_dir: Path) -> list[str]:
    data, judged = run_dir / "data-report.md", run_dir / "reward-model.json"
    parts = ["## What it was made of"]
    if data.is_file():
        parts.append(f"The data, row by row: [{data.name}]({os.path.relpath(data, folder)}).")
    if judged.is_file():
        parts += _reward_model(json.loads(judged.read_text(encoding="utf-8")))
    return parts if len(parts) > 1 else []


def _reward_model(record: dict[str, Any]) -> list[str]:
    """How far the reward model may be trusted, from the record that its stage wrote."""
    source, before, loss = (record.pop(name) for name in ("source", "loss_before", "loss"))
    found = RewardModelReport.of(record)
    said = (
        f"The reward model learned from comparisons that are {source}. Of {found.accuracy.of:,} held-out ones it is "
        f"right on {found.accuracy}; "
        f"loss {before:.3f} before training, {loss:.3f} after (chance: 0.693). The longer reply is the better one in "
        f"{found.longer.value:.1%}, "
        f"and the more rewarded one in {found.prefers_longer:.1%} of pairs: where these differ much, it judges by "
        "length."
    )
    length = [
        (f"{p.fewest:+d} to {p.most:+d}", str(p.pairs), _within(p.accuracy), f"{p.longer:.1%}") for p in found.by_length
    ]
    sure = [
        (f"{p.low:.0%} to {p.high:.0%}", str(p.pairs), f"{p.predicted:.1%}", _within(p.observed))
        for p in found.calibration
    ]
    return [
        said,
        _table(
            ("extra tokens of the better reply", "pairs", "the reward model is right", "the longer one is better"),
            length,
        ),
        "Calibration: the probability that the reward model gives to its choice, and how often that choice is right. "
        f"The expected calibration error is {found.calibration_error:.3f}.",
        _table(("probability", "pairs", "mean probability", "right"), sure),
    ]


def _within(share: Proportion) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _code(text: str) -> str:
    """Any text as one line of code in a table's cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in "".join(c if c == "`" else " " for c in line).split()), default=0) + 1)
    return f"{fence} {line} {fence}" if line else "(nothing)"
