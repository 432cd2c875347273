"""An evaluation on the disk: `evaluation.json` with every number and reply, `report.md` for people, `frontier.png` in it.

Left out: HTML. What a run's data and reward model were like stands in files of their own, to which the report points where they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import Folder
from pipeline.observe import frontier
from pipeline.observe.observer import read_metrics
from pipeline.observe.words import price, rows, signed, verdict, yardstick
from pipeline.stages.judgement import Judgement

if TYPE_CHECKING:
    from pipeline.evaluation import BestOf, Evaluation
    from pipeline.stages.judgement import Share

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
    data, judged = run_dir / "data-report.md", run_dir / "reward-model.json"
    parts = ["## What it was made of"]
    if data.is_file():
        parts.append(f"The data, row by row: [{data.name}]({os.path.relpath(data, folder)}).")
    if judged.is_file():
        parts += _reward_model(json.loads(judged.read_text(encoding="utf-8")))
    return parts if len(parts) > 1 else []


def _reward_model(record: dict[str, Any]) -> list[str]:
    """How far the reward may be trusted, from what the stage wrote of it."""
    source, before, loss = (record.pop(name) for name in ("source", "loss_before", "loss"))
    found = Judgement.of(record)
    said = (
        f"The reward model learned from comparisons that are {source}. Of {found.accuracy.of:,} held-out ones it is right on {found.accuracy}; "
        f"loss {before:.3f} before training, {loss:.3f} after (chance: 0.693). The longer reply is the better one in {found.longer.value:.1%}, "
        f"and the more rewarded one in {found.prefers_longer:.1%} of pairs: where these differ much, it judges by length."
    )
    length = [(f"{p.fewest:+d} to {p.most:+d}", str(p.pairs), _within(p.accuracy), f"{p.longer:.1%}") for p in found.by_length]
    sure = [(f"{p.low:.0%} to {p.high:.0%}", str(p.pairs), f"{p.predicted:.1%}", _within(p.observed)) for p in found.calibration]
    return [
        said,
        _table(("tokens the better reply is longer", "pairs", "the reward model is right", "the longer one is better"), length),
        f"How sure it is against how often it is right; the expected calibration error is {found.calibration_error:.3f}.",
        _table(("probability it gives", "pairs", "on average", "right"), sure),
    ]


def _within(share: Share) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _code(text: str) -> str:
    """One line of code in a table's cell, whatever it holds."""
    line = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in "".join(c if c == "`" else " " for c in line).split()), default=0) + 1)
    return f"{fence} {line} {fence}" if line else "(nothing)"
