"""The algorithms a recipe can name. A new one is a file and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce

AnyAlgorithm = Annotated[PPO | Reinforce, Field(discriminator="name")]
