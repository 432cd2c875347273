"""What a run says when it is done: the same prompts answered by baseline and policy, the reward with its interval, and where everything is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.observe.words import price, rows, verdict, yardstick

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.evaluation import Evaluation
    from pipeline.run import Result


def show(result: Result, config: RunConfig, console: Console) -> None:
    """Print the end of a run, or of the part of it that was asked for."""
    if result.evaluation is None:
        console.print(Text(f"done: {', '.join(result.stages)}. {result.seconds:.0f} s in all; everything is in {result.run_dir}"), soft_wrap=True)
        return
    show_evaluation(result.evaluation, config.evaluation.shown, console)
    console.print(Text(f"{verdict(result.evaluation)} {result.seconds:.0f} s in all."), soft_wrap=True)
    console.print(Text(next_steps(result)), soft_wrap=True)


def show_evaluation(evaluation: Evaluation, shown: int, console: Console) -> None:
    """Replies, numbers, and what the reward cost; without the verdict, which is the caller's last word."""
    console.print()
    console.print(replies(evaluation, shown))
    console.print(numbers(evaluation))
    for text in filter(None, (price(evaluation), yardstick(evaluation))):
        console.print(Text(text), soft_wrap=True)


def replies(evaluation: Evaluation, shown: int) -> Table:
    """Replies to the same held-out prompts; as they are, since `[/b]` in a reply is no markup of ours."""
    table = Table(title="held-out prompts", title_justify="left", show_lines=True)
    for column in ("prompt", "baseline", "policy"):
        table.add_column(column, overflow="fold", ratio=1)
    for reply in evaluation.replies[:shown]:
        table.add_row(Text(reply.prompt), Text(reply.baseline), Text(reply.policy))
    return table


def numbers(evaluation: Evaluation) -> Table:
    """Both sides in numbers."""
    table = Table(title=f"{len(evaluation.replies)} held-out prompts (95 % intervals)", title_justify="left")
    for column in ("", "baseline", "policy"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows(evaluation):
        table.add_row(*row)
    return table


def next_steps(result: Result) -> str:
    """Where everything is, and what to try."""
    folder = result.run_dir
    return f"""
saved in {folder}
  policy/            the aligned model: AutoModelForCausalLM.from_pretrained("{folder}/policy")
  metrics.jsonl      every number of every step; also: tensorboard --logdir {folder}/tensorboard
  experience/        what was trained on, a Parquet file a step
  report.md          the evaluation in words, tables and a picture (frontier.png); evaluation.json has all rewards and replies
  config.toml        the run again: raylign run {folder}/config.toml
  log/               what each process printed

try next (the command is in .venv/bin)
  raylign plan walks                          what another recipe would run, without running it
  raylign run walks --algorithm.name grpo --batch.prompts 20 --batch.group-size 5
                                              another task, another algorithm
  raylign run quickstart --rollout.workers 2 --policy.ranks 2 --policy.zero-stage 2
"""
