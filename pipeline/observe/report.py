"""An evaluation on the disk: `evaluation.json` with every number and reply, `report.md` for people, `frontier.png` in it.

Left out: HTML. What a run's data and reward model were like stands in files of their own, to which the report points where they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.storage import Folder
from pipeline.observe import frontier
from pipeline.observe.observer import read_metrics
from pipeline.observe.words import price, rows, signed, verdict, yardstick

if TYPE_CHECKING:
    from pipeline.evaluation import BestOf, Evaluation

EVALUATION, REPORT, FRONTIER = "evaluation.json", "report.md", "frontier.png"
_SHOWN = 10  # prompts whose replies are in the report; the JSON has all


def write(evaluation: Evaluation, folder: Path, run_dir: Path | None) -> None:
    """All three files, each whole; the JSON last. run_dir: the run the policy is from, if it is from one, whose metrics and other reports are used."""
    target, steps = Folder(folder), read_metrics(run_dir) if run_dir else []
    target.write_file(FRONTIER, lambda path: frontier.draw(evaluation, steps, path))
    target.write_text(REPORT, markdown(evaluation, folder, run_dir))
    target.write_text(EVALUATION, json.dumps(evaluation.record(), indent=1, allow_nan=False))


def markdown(evaluation: Evaluation, folder: Path, run_dir: Path | None) -> str:
    """The report, to stand in `folder`. The replies of language models are quoted as code, so that nothing in them is taken for Markdown."""
    parts = [
        f"# {evaluation.policy} against {evaluation.baseline}",
        " ".join(filter(None, (verdict(evaluation), _won(evaluation), price(evaluation), yardstick(evaluation)))),
        f"![reward against KL]({FRONTIER})",
        f"{len(evaluation.replies)} held-out prompts, {evaluation.samples} replies of the policy to each. All intervals are 95 %, by bootstrap over prompts.",
        _table(("", "baseline", "policy"), rows(evaluation)),
        *_best_of(evaluation),
        *_context(folder, run_dir),
        "## Replies",
        "The first prompts, and the first reply of each model to them.",
        _table(("prompt", "baseline", "policy"), [tuple(map(_code, (r.prompt, r.baseline, r.policy))) for r in evaluation.replies[:_SHOWN]]),
    ]
    return "\n\n".join(parts) + "\n"


def _won(evaluation: Evaluation) -> str:
    won = evaluation.optimised.win_rate
    return f"By the {evaluation.judge}, the policy's reply is the better one {won.mean:.1%} of the time ({won.low:.1%} to {won.high:.1%}, ties half)."


def _best_of(evaluation: Evaluation) -> list[str]:
    best = evaluation.best_of
    if best is None:
        return []
    others = "; and what the others make of those replies" if len(best.rewards) > 1 else ""
    note = (
        f"Of n replies of the baseline the {best.judge} picks the best{others}. Unbiased estimates from {len(best.kl)} replies a prompt; "
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
    """What the run was made of, where it says so."""
    if run_dir is None:
        return []
    found = {what: run_dir / name for what, name in (("data", "data-report.md"), ("reward model", "reward-model.json")) if (run_dir / name).is_file()}
    lines = [f"- {what}: [{path.name}]({os.path.relpath(path, folder)}){_accuracy(path)}" for what, path in found.items()]
    return ["## What it was made of", "\n".join(lines)] if lines else []


def _accuracy(path: Path) -> str:
    """Of the reward model on held-out comparisons, if the file has it, as a number or an interval."""
    if path.suffix != ".json":
        return ""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("accuracy")
    except (ValueError, AttributeError):
        return ""
    if isinstance(found, dict) and {"mean", "low", "high"} <= found.keys():
        return f", accuracy on held-out comparisons {found['mean']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
    return f", accuracy on held-out comparisons {found:.1%}" if isinstance(found, float) else ""


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _code(text: str) -> str:
    """One line of code in a table's cell, whatever it holds."""
    line = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in "".join(c if c == "`" else " " for c in line).split()), default=0) + 1)
    return f"{fence} {line} {fence}" if line else "(nothing)"
