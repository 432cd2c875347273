"""The algorithm of a user's own that pipeline/algorithms/README.md shows."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "pipeline" / "algorithms" / "README.md"


def readme_example() -> str:
    """The source of `my_algorithms.py`."""
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return str(example)
