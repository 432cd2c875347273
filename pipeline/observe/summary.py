"""What a run says when it is done: the same prompts before and after, the reward with its interval, and where everything is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.evaluation import Interval, Report
    from pipeline.run import Result


def show(result: Result, config: RunConfig, console: Console) -> None:
    """Print the end of a run."""
    console.print()
    console.print(replies(result, config.evaluation.shown))
    console.print(numbers(result))
    for text in (verdict(result), next_steps(result)):
        console.print(Text(text), soft_wrap=True)


def replies(result: Result, shown: int) -> Table:
    """Replies to the same held-out prompts, before and after; as they are, since `[/b]` in a reply is no markup of ours."""
    table = Table(title="held-out prompts", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold", ratio=1)
    for pair in result.comparison.pairs(shown):
        table.add_row(Text(pair.prompt), Text(pair.before), Text(pair.after))
    return table


def numbers(result: Result) -> Table:
    """Both sides in numbers."""
    comparison = result.comparison
    table = Table(title=f"{len(comparison.before.prompts)} held-out prompts", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("reward (95 % interval)", _interval(comparison.before_reward), _interval(comparison.after_reward))
    for label, read in _ROWS.items():
        table.add_row(label, read(comparison.before), read(comparison.after))
    return table


def verdict(result: Result) -> str:
    """One sentence: better, worse, or not told apart."""
    gain = result.comparison.gain
    if gain.low > 0:
        judged = "The reward rose"
    elif gain.high < 0:
        judged = "The reward fell"
    else:
        judged = "The reward cannot be told from what it was"
    return f"{judged}: {gain.mean:+.3f} a prompt, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}. {result.seconds:.0f} s in all."


def next_steps(result: Result) -> str:
    """Where everything is, and what to try."""
    folder = result.run_dir
    return f"""
saved in {folder}
  policy/            the aligned model: AutoModelForCausalLM.from_pretrained("{folder}/policy")
  metrics.jsonl      every number of every step; also: tensorboard --logdir {folder}/tensorboard
  experience/        what was trained on, a Parquet file a step
  evaluation.json    all rewards and replies, before and after
  config.toml        the run again: raylign train {folder}/config.toml
  log/               what each process printed

try next (the command is in .venv/bin)
  raylign plan walks                          what another recipe would run, without running it
  raylign train walks --algorithm.name grpo --batch.prompts 20 --batch.group-size 5
                                              another task, another algorithm
  raylign train quickstart --rollout.workers 2 --policy.ranks 2 --policy.zero-stage 2
"""


def _interval(interval: Interval) -> str:
    return f"{interval.mean:+.3f}  ({interval.low:+.3f} to {interval.high:+.3f})"


def _kl(report: Report) -> str:
    return "-" if report.kl != report.kl else f"{report.kl:.2f} nats"


_ROWS: dict[str, Callable[[Report], str]] = {
    "KL to the start": _kl,
    "distinct-2": lambda report: f"{report.distinct_2:.3f}",
    "tokens of a reply": lambda report: f"{report.response_tokens:.1f}",
}
