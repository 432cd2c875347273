"""The chat in a terminal: two columns that grow while the models speak; line by line where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from pipeline.chat.chat import Chat, Event
from pipeline.chat.commands import COMMANDS, events_of
from pipeline.chat.loading import models_of, open_chat, remark_of
from pipeline.chat.options import ChatOptions
from pipeline.config.run_config import RunConfig
from pipeline.observe.progress import waiting

_PARTNER = "an empty line: the replies to the partner's last line   a line of your own: you play the partner"


def chat_with(config: RunConfig, run_dir: Path, options: ChatOptions, console: Console) -> None:
    """Talk with a run's models until the person leaves. Raises ValueError for what cannot be talked with."""
    models = models_of(config, run_dir)
    with waiting(console, "load the models"):
        chat = open_chat(config, run_dir, options)
    if remark := remark_of(models, run_dir):
        console.print(Text(f"raylign chat: {remark}"), soft_wrap=True)
    if options.web:
        from pipeline.chat.web import serve

        serve(chat, options.port, lambda line: console.print(Text(line), soft_wrap=True))
        return
    talk(chat, sys.stdin, console)


def talk(chat: Chat, lines: TextIO, console: Console) -> None:
    """Carry out each line that is typed, up to /quit or the end of the input."""
    console.print(Text(COMMANDS if chat.environment is None else f"{COMMANDS}\n{_PARTNER}"), soft_wrap=True)
    while True:
        if console.is_terminal:
            console.print(Text("> "), end="")
        line = lines.readline()
        if not line or line.strip() == "/quit":
            return
        try:
            events = events_of(chat, line.strip())
            (_show_live if console.is_terminal else _show_lines)(chat, events, console)
        except ValueError as error:
            console.print(Text(str(error)), soft_wrap=True)


def _add(texts: dict[str, Text], event: Event) -> None:
    text = texts[event.side]
    match event.kind:
        case "option":
            text.append(f"[{event.text}] ", style="magenta")
        case "piece":
            text.append(event.text)
        case "end" if event.text:
            text.append(f" ... {event.text}", style="dim")
        case "score":
            shown = f"no reward ({event.detail})" if event.value is None else f"{event.value:+.3f}"
            text.append(f"\n{event.text}: {shown}", style="cyan")
        case "partner":
            text.append(f"\n> {event.text}", style="green")
        case "note":
            text.append(f"\n{event.text}", style="yellow")


def _show_live(chat: Chat, events: Iterator[Event], console: Console) -> None:
    """Columns side by side, drawn anew with each piece."""
    texts = {side.name: Text() for side in chat.sides}

    def view() -> Columns:
        panels = [Panel(text, title=name) for name, text in texts.items()]
        width = max(console.width // len(panels) - 1, 20)
        return Columns(panels, width=width)

    live: Live | None = None
    try:
        for event in events:
            if not event.side:
                console.print(Text(event.text, style="green" if event.kind == "prompt" else "yellow"), soft_wrap=True)
                continue
            if live is None:
                live = Live(view(), console=console, refresh_per_second=12)
                live.start()
            _add(texts, event)
            live.update(view())
    finally:
        if live is not None:
            live.stop()


def _show_lines(chat: Chat, events: Iterator[Event], console: Console) -> None:
    """A block for each side, once both are complete; for pipes and files."""
    texts = {side.name: Text() for side in chat.sides}
    for event in events:
        if event.side:
            _add(texts, event)
        else:
            console.print(Text(f"{event.kind}: {event.text}"), soft_wrap=True)
    for name, text in texts.items():
        if text.plain:
            console.print(Text(f"{name}: {text.plain.strip()}"), soft_wrap=True)
