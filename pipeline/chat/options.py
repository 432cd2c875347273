"""The options of `raylign chat`, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from actors.config import SamplingConfig

_MOST_TEMPERATURE = 100.0  # as sampling.temperature has it


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """temperature, max_tokens: None takes the recipe's. web: serve a page on `port` (0: any free one)."""

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int = 0
    web: bool = False
    port: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError naming the option that is out of its range."""
        heat = self.temperature
        if heat is not None and not (math.isfinite(heat) and 0 <= heat <= _MOST_TEMPERATURE):
            raise ValueError(
                f"--temperature: must be from 0 (the likeliest token) to {_MOST_TEMPERATURE:g}, got {heat}"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"--max-tokens: must be at least 1, got {self.max_tokens}")
        if self.seed < 0:
            raise ValueError(f"--seed: must be 0 or more, got {self.seed}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port: must be from 0 (any free one) to 65535, got {self.port}")

    def sampling(self, recipe: SamplingConfig) -> SamplingConfig:
        """The recipe's sampling with these options in place of its own."""
        given = {"temperature": self.temperature, "max_new_tokens": self.max_tokens}
        return recipe.model_copy(update={name: value for name, value in given.items() if value is not None})
