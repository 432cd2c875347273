"""What a typed line makes happen, in the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Generator

from pipeline.chat.chat import Chat, Event

COMMANDS = "/prompt a held-out prompt   /again the last replies anew   /reset   /help   /quit"


def events_of(chat: Chat, line: str) -> Generator[Event, None, None]:
    """What a typed line makes happen."""
    match line:
        case "/prompt":
            yield from chat.prompt()
        case "/again":
            yield from chat.again()
        case "/reset":
            yield from chat.reset()
        case "/help":
            yield Event(kind="note", text=COMMANDS)
        case _ if line.startswith("/"):
            yield Event(kind="note", text=f"there is no command {line.split()[0]}; {COMMANDS}")
        case "" if chat.environment is None:
            yield Event(kind="note", text=f"type a line; {COMMANDS}")
        case "":
            yield from chat.go_on()
        case _:
            yield from chat.say(line)
