"""The name of an option's control token, without torch: tasks write it into demonstrations."""

from __future__ import annotations


def option_token(name: str) -> str:
    """The control token of an option as text."""
    return f"<|option:{name}|>"
