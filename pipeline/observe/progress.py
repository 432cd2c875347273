"""The live view: what the run is doing, how far it is, and whether it goes well.

In a terminal a few lines are drawn over and over (rich); anywhere else (a job's log, a pipe) one plain line is
printed now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.observe.metrics import StepMetrics

PLAIN_EVERY_S = 5.0
SPARK = "▁▂▃▄▅▆▇█"

_SHOWN = {
    "reward": "reward/mean",
    "KL": "kl/per_rollout",
    "entropy": "policy/entropy",
    "token distinct-2": "rollout/token_distinct_2",
    "length": "rollout/response_tokens",
    "tok/s": "time/tokens_per_second",
}


class Progress:
    """One view over all stages of a run. `stage` starts a bar of `total` parts; `advance` and `step` move it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stage, self._done, self._before, self._total, self._doing, self._note = "starting", 0, 0, 0, "", ""
        self._began = self._spoke = time.monotonic()
        self._rewards: list[float] = []
        self._values: dict[str, float] = {}
        # Last, since it renders at once.
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True) if console.is_terminal else None

    def stage(self, name: str, total: int) -> None:
        """A new stage of `total` parts begins."""
        self._stage, self._done, self._before, self._total, self._doing, self._note = name, 0, 0, total, "", ""
        self._began, self._values, self._rewards = time.monotonic(), {}, []

    @property
    def name(self) -> str:
        """The stage at hand."""
        return self._stage

    def remark(self, text: str) -> None:
        """A lasting line above the live view."""
        self.console.print(Text(text), soft_wrap=True)

    def phase(self, name: str) -> None:
        self._doing = name

    def advance(self, note: str) -> None:
        """One more part of the stage is done; `note` says how it went."""
        self._done, self._note = self._done + 1, note
        self._plain(lambda: note)

    def rewind(self, done: int) -> None:
        """So many parts of the stage are done: a run that goes on from a commit, or was taken back to one."""
        self._began = time.monotonic()
        self._done = self._before = done
        self._rewards = self._rewards[:done]

    def step(self, metrics: StepMetrics) -> None:
        """One more step of reinforcement learning is done."""
        self._done, self._values = self._done + 1, metrics.values
        self._rewards.append(metrics.values["reward/mean"])
        self._plain(lambda: "  ".join(f"{label} {_number(metrics.values[key])}" for label, key in _SHOWN.items() if _known(metrics.values, key)))

    def _plain(self, text: Callable[[], str]) -> None:
        last = self._done == self._total
        if self._live is None and (last or time.monotonic() - self._spoke > PLAIN_EVERY_S):
            self._spoke = time.monotonic()
            self.console.print(Text(f"{self._stage} {self._done}/{self._total}  {text()}  left {self._left()}"), soft_wrap=True)

    def _left(self) -> str:
        """Time left of this stage at the pace so far, as m:ss."""
        done = self._done - self._before  # since `_began`
        if done <= 0:
            return "-:--"
        left = (time.monotonic() - self._began) / done * (self._total - self._done)
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def _render(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self._total, 1), completed=self._done, width=32)
        head.add_row(Text(self._stage, "bold"), bar, f"{self._done}/{self._total}", f"left {self._left()}", Text(self._doing, "dim"))
        if not self._values:
            return Group(head, Text(self._note))
        numbers = Table.grid(padding=(0, 2))
        shown = {label: key for label, key in _SHOWN.items() if _known(self._values, key)}
        numbers.add_row(*(Text(label, "dim") for label in shown))
        numbers.add_row(*(_number(self._values[key]) for key in shown.values()))
        return Group(head, numbers, Text(f"reward {sparkline(self._rewards)}"))

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def sparkline(values: list[float], width: int = 60) -> str:
    """The values as a row of at most `width` bars; each bar is the mean of its share."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means), max(means)
    return "".join(SPARK[int((m - low) / (high - low) * (len(SPARK) - 1)) if high > low else 0] for m in means)


def _known(values: dict[str, float], key: str) -> bool:
    """KL is not a number where there is no reference."""
    return key in values and values[key] == values[key]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
