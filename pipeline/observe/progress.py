"""The live view: what the run is doing or waiting for, since when, how far it is, and whether it learns.

In a terminal a few lines are redrawn (rich), and a finished stage leaves one line. Anywhere else (a job's log, a pipe)
a plain line is printed when a stage begins, every few seconds, and when it is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.observe.metrics import StepMetrics

log = logging.getLogger(__name__)

PLAIN_EVERY_S = 5.0
SILENT_S = 30.0  # longest time without a line where there is no terminal
SPARK, PLAIN_SPARK = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_NOTEWORTHY_S = 2.0  # a shorter wait leaves no line, and a shorter phase shows no time

_SHOWN = {
    "reward": "reward/mean",
    "KL": "kl/per_rollout",
    "entropy": "policy/entropy",
    "token distinct-2": "rollout/token_distinct_2",
    "length": "rollout/response_tokens",
    "tok/s": "time/tokens_per_second",
}


class Progress:
    """One view over all stages of a run.

    `stage` starts a bar of `total` parts; `advance` and `step` move it. With `total` 0 or 1 no bar is drawn, only time.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._over = threading.Event()
        self._clear("start", 0)
        self._is_over = True  # "start" is no stage
        # Last, because Live renders at once.
        self._live = (
            Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` parts; the one before is done."""
        self._leave()
        self._clear(name, total)
        log.info("%s begins", name)
        if self._live is None:
            self._print(f"{name} ...")

    def _clear(self, name: str, total: int) -> None:
        self._stage, self._done, self._before, self._total, self._doing, self._note = name, 0, 0, total, "", ""
        self._began = self._entered = self._turned = self._spoke = self._told = time.monotonic()
        self._rewards: list[float] = []
        self._values: dict[str, float] = {}
        self._is_over = False  # whether its last line was printed

    @property
    def name(self) -> str:
        """The current stage."""
        return self._stage

    def remark(self, text: str) -> None:
        """Print a line that stays, above the live view."""
        log.info("%s", text)
        self._print(text)

    def phase(self, name: str) -> None:
        """Show what the stage is doing or waiting for."""
        if name != self._doing:
            self._doing, self._turned = name, time.monotonic()
            log.info("%s: %s", self._where(), name)

    def advance(self, note: str) -> None:
        """Count one more part of the stage as done; `note` says how it went."""
        self._done, self._note = self._done + 1, note
        log.info("%s: %s", self._head(), note)
        self._tell()

    def rewind(self, done: int) -> None:
        """Set the number of parts done, and measure the pace from now: after start-up, or after a rollback."""
        self._began = time.monotonic()
        self._done = self._before = done
        self._rewards = self._rewards[:done]

    def step(self, metrics: StepMetrics) -> None:
        """Count one more step of reinforcement learning as done, and show its numbers."""
        old, kl = self._values, _SHOWN["KL"]
        # the KL may be measured every few steps only; in between the last one is shown
        between = {kl: old[kl]} if _known(old, kl) and not _known(metrics.values, kl) else {}
        self._done, self._values = self._done + 1, metrics.values | between
        self._rewards.append(metrics.values["reward/mean"])
        self._tell()

    def _tell(self) -> None:
        if self._done == self._total:
            self._leave()
        elif self._live is None and time.monotonic() - self._told > PLAIN_EVERY_S:
            self._told = time.monotonic()  # remarks in between take nothing from it
            self._print(f"{self._head()}  {self._how()}  left {self._left()}")

    def _leave(self) -> None:
        """Print, once, how far the stage came, how it went, and how long it took."""
        seconds = time.monotonic() - self._entered
        if self._is_over or (not self._done and seconds < _NOTEWORTHY_S):
            return
        self._is_over = True
        log.info("%s is over after %.1f s", self._head(), seconds)
        self._print("  ".join(filter(None, (self._head(), self._how(), f"in {clock(seconds)}"))))

    def _where(self) -> str:
        """The stage, and the part of it that is being done."""
        return f"{self._stage} {self._done + 1}/{self._total}" if self._done < self._total > 1 else self._stage

    def _head(self) -> str:
        return f"{self._stage} {self._done}/{self._total}" if self._total > 1 or self._done else self._stage

    def _how(self) -> str:
        return self._note or "  ".join(
            f"{label} {_number(self._values[key])}" for label, key in _SHOWN.items() if _known(self._values, key)
        )

    def _print(self, line: str) -> None:
        self._spoke = time.monotonic()
        self.console.print(Text(line), soft_wrap=True)

    def _left(self) -> str:
        """Time left of this stage at the pace so far, as m:ss; "-:--" before the first part."""
        done = self._done - self._before  # parts since `_began`
        if done <= 0:
            return "-:--"
        return clock((time.monotonic() - self._began) / done * (self._total - self._done))

    def _now(self) -> str:
        """The current phase, with its time so far once it is long."""
        seconds = time.monotonic() - self._turned
        return f"{self._doing} {clock(seconds)}" if self._doing and seconds >= _NOTEWORTHY_S else self._doing

    def _render(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        passed = clock(time.monotonic() - self._entered)
        if self._total > 1:
            bar = ProgressBar(total=self._total, completed=self._done, width=32)
            head.add_row(
                Text(self._stage, "bold"),
                bar,
                f"{self._done}/{self._total}",
                passed,
                f"left {self._left()}",
                Text(self._now(), "dim"),
            )
        else:
            head.add_row(Text(self._stage, "bold"), passed, Text(self._now(), "dim"))
        if not self._values:
            return Group(head, Text(self._note))
        numbers = Table.grid(padding=(0, 2))
        shown = {label: key for label, key in _SHOWN.items() if _known(self._values, key)}
        numbers.add_row(*(Text(label, "dim") for label in shown))
        numbers.add_row(*(_number(self._values[key]) for key in shown.values()))
        bars = PLAIN_SPARK if self.console.options.ascii_only else SPARK
        return Group(head, numbers, Text(f"reward {sparkline(self._rewards, bars=bars)}"))

    def _watch(self) -> None:
        """Without a terminal: print a line whenever nothing was printed for `SILENT_S`."""
        while not self._over.wait(SILENT_S / 6):
            if time.monotonic() - self._spoke >= SILENT_S:
                self._print(
                    "  ".join(
                        filter(None, (f"{self._head()} since {clock(time.monotonic() - self._entered)}", self._now()))
                    )
                )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        else:
            threading.Thread(target=self._watch, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._done or error is None:
            self._leave()
        if self._live is not None:
            self._live.stop()


@contextmanager
def waiting(console: Console, name: str) -> Iterator[None]:
    """Show a wait before the run has a live view."""
    with Progress(console) as progress:
        progress.stage(name, 0)
        yield


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def sparkline(values: list[float], width: int = 60, bars: str = SPARK) -> str:
    """The values as a row of at most `width` bars; each bar is the mean of neighbouring values."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means), max(means)
    return "".join(bars[int((m - low) / (high - low) * (len(bars) - 1)) if high > low else 0] for m in means)


def _known(values: dict[str, float], key: str) -> bool:
    """Whether the metric is there and is a number; the KL is NaN where there is no reference."""
    return key in values and values[key] == values[key]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
