"""The last lines of a run: the same prompts answered by both models, the numbers, and where everything is."""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.wording import left_out, price, rows, verdict, yardstick

if TYPE_CHECKING:
    from pipeline.evaluation.results import Evaluation
    from pipeline.report.result import Result


def show(result: Result, shown: int, console: Console) -> None:
    """Print the end of a run, or of the stages that were asked for. shown: how many pairs of replies."""
    if result.evaluation is None:
        console.print(
            Text(f"done: {', '.join(result.stages)}. {result.seconds:.0f} s in all; everything is in {result.run_dir}"),
            soft_wrap=True,
        )
        return
    show_evaluation(result.evaluation, shown, console)
    console.print(Text(f"{verdict(result.evaluation)} {result.seconds:.0f} s in all."), soft_wrap=True)
    console.print(Text(next_steps(result)), soft_wrap=True)


def show_evaluation(evaluation: Evaluation, shown: int, console: Console) -> None:
    """Print replies, numbers, and what the reward cost. The verdict is left to the caller."""
    console.print()
    console.print(replies(evaluation, shown))
    console.print(numbers(evaluation))
    for text in filter(None, (price(evaluation), yardstick(evaluation), left_out(evaluation))):
        console.print(Text(text), soft_wrap=True)


def replies(evaluation: Evaluation, shown: int) -> Table:
    """Replies to the same held-out prompts, as plain text: `[/b]` in a reply is no markup."""
    table = Table(title="held-out prompts", title_justify="left", show_lines=True)
    for column in ("prompt", "baseline", "policy"):
        table.add_column(column, overflow="fold", ratio=1)
    for reply in evaluation.replies[:shown]:
        table.add_row(Text(reply.prompt), Text(reply.baseline), Text(reply.policy))
    return table


def numbers(evaluation: Evaluation) -> Table:
    """The numbers of baseline and policy side by side."""
    table = Table(title=f"{len(evaluation.replies)} held-out prompts (95 % intervals)", title_justify="left")
    for column in ("", "baseline", "policy"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows(evaluation):
        table.add_row(*row)
    return table


def next_steps(result: Result) -> str:
    """Where everything is, and what to try next."""
    folder, quoted = result.run_dir, shlex.quote(str(result.run_dir))
    return f"""
saved in {folder}
  policy/            the aligned model: AutoModelForCausalLM.from_pretrained("{folder}/policy")
  metrics.jsonl      every number of every step; as curves, with those of fine-tuning and reward model:
                     {_curves(quoted)}
  experience/        what was trained on, a Parquet file a step
  report.md          the evaluation in words, tables and a picture (frontier.png);
                     evaluation.json has all rewards and replies
  config.toml        the run again: raylign run {shlex.quote(f"{folder}/config.toml")}
  log/               what each process printed

try next{_where()}
  raylign plan walks                          what another recipe would run, without running it
  raylign run walks --algorithm.name grpo --batch.prompts 20 --batch.group-size 5
                                              another task, another algorithm
  raylign run quickstart --rollout.workers 2 --policy.ranks 2 --policy.zero-stage 2
"""


def _curves(quoted: str) -> str:
    """The command that starts TensorBoard, which is not installed with the package."""
    return (
        f"tensorboard --logdir {quoted}"
        if find_spec("tensorboard")
        else f"pip install tensorboard, then tensorboard --logdir {quoted}"
    )


def _where() -> str:
    """Where the command `raylign` is, if the shell does not find it; else ""."""
    own = Path(sys.executable).with_name("raylign")
    return f" (the command is {own})" if shutil.which("raylign") is None and own.is_file() else ""
