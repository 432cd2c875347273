"""Small data files for tests: rows in every form, and ways to write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from pipeline.data.config import DataConfig
from pipeline.data.files import Files

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def hh(*turns: str, last: str) -> str:
    """A transcript of these turns, a person's first, and a last reply."""
    return "".join(f"\n\n{('Human', 'Assistant')[place % 2]}: {turn}" for place, turn in enumerate((*turns, last)))


def pair(number: int, chosen: str = "Yes.", rejected: str = "No, never.") -> dict[str, Any]:
    """A comparison as HH writes it; its conversation begins as no other's."""
    begin = f"May I have {NUMBERS[number % 12]} and {NUMBERS[number // 12]}?"
    return {"chosen": hh(begin, last=chosen), "rejected": hh(begin, last=rejected)}


def pairs(count: int) -> list[dict[str, Any]]:
    return [pair(number) for number in range(count)]


def write(path: Path, rows: list[Any]) -> str:
    """One JSON a line; a row of bytes or text as it is. The path as a recipe has it."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def files(tmp_path: Path, rows: list[Any], name: str = "pairs.jsonl", **settings: Any) -> Files:
    """The task of a file of comparisons."""
    return Files(DataConfig(comparisons=write(tmp_path / name, rows), **({"heldout": 0.3} | settings)))
