"""The name of an option's control token, without torch: tasks write it into demonstrations.

Also the name of the entry of a policy's `config.json` that says that a manager was trained with it.
"""

from __future__ import annotations

import re

TRAINED_HEAD = "raylign_option_head"  # its value is the name of the head's file, which lies beside it


CONTROL = re.compile(r"<\|option:.+\|>")  # what `option_token` writes


def option_token(name: str) -> str:
    """The control token of an option as text."""
    return f"<|option:{name}|>"
