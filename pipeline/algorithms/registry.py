"""The algorithms a recipe can name. A new one is a file and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.reinforce_baseline import ReinforceBaseline
from pipeline.algorithms.reinforce_pp import ReinforcePP
from pipeline.algorithms.rloo import RLOO

AnyAlgorithm = Annotated[PPO | Reinforce | ReinforceBaseline | A2C | RLOO | GRPO | ReinforcePP, Field(discriminator="name")]
