"""The reward: what a good answer is. Change it, and `raylign run recipe.toml` aligns the model to something else."""

from __future__ import annotations

from typing import Any


def warmth(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """One number for each answer: 1 for a welcome, and 1 for the right name.

    metadata: what my_task.py says of each prompt. An answer must be judged by itself, since any process may judge it.
    """
    return [
        float("Welcome" in response) + float(said["name"] in response)
        for response, said in zip(responses, metadata, strict=True)
    ]
