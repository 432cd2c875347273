"""What the learning table compares: every algorithm of the registry with its documented main variants, and TRL's
trainers, each with its settings.

All share batch, budget, model and reward, so a difference is the algorithm's or its settings'. Learning rates were
chosen by optimality after the last episode: TRL's two on seed 0 among 5e-4, 1e-3 and 2e-3, with 1e-3 the best for both;
ours on seed 0, not all of them among equally many (GRPO and PPO do worse at 3e-4, RLOO at 2e-3), but for A2C, whose
rates were lowered after one of seed 1 had collapsed. "RLOO by rollout" was added once TRL's RLOO was seen to be ahead
of our default on the way: TRL clips the ratio of whole rollouts. Clipped losses go over a step's rollouts four times,
TRL's as well; plain ones once, since nothing corrects them for what is off-policy in a second pass: with four they
break down at 5e-4.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from pipeline.config.recipe import recipe_path
from pipeline.config.rules import check
from pipeline.config.run_config import RunConfig

STEPS = 40
# of a step: each of the 20 starts five times, whether or not the algorithm compares them
BATCH = {
    "prompts": 20,
    "group_size": 5,
}
EPISODES = BATCH["prompts"] * BATCH["group_size"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An algorithm with all that was chosen for it. panel: of the plot. trainer: TRL's, if it is not ours; beside: the
    one of ours it is compared with.

    algorithm: as in a recipe, or fields of TRL's configuration. critic_rate: 0 where there is no critic.
    """

    name: str
    panel: str
    algorithm: dict[str, Any]
    rate: float
    critic_rate: float = 0.0
    warmup: float = 0.0
    epochs: int = 4
    minibatches: int = 1
    staleness: int = 0
    trainer: str = ""
    beside: str = ""

    @property
    def trl(self) -> dict[str, Any]:
        """Fields of TRL's configuration."""
        return self.algorithm | {"learning_rate": self.rate, "num_iterations": self.epochs}

    @property
    def file(self) -> str:
        """Its name in a path and on the command line."""
        return self.name.lower().replace(" ", "-").replace("'", "").replace(".", "")

    @property
    def told(self) -> str:
        """Its settings as one cell of the table."""
        words = [f"{key} {str(value).lower()}" for key, value in self.algorithm.items() if key != "name"]
        words += [f"rate {self.rate:g}"] + ([f"critic's {self.critic_rate:g}"] if self.critic_rate else [])
        words += [f"warm-up {self.warmup:g}"] if self.warmup else []
        return ", ".join([*words, f"{self.epochs} x {self.minibatches} updates"])

    def config(self, model: str, seed: int, steps: int) -> RunConfig:
        """The recipe `walks` with this algorithm, from a model that is pre-trained already."""
        return _walks(
            seed=seed,
            steps=steps,
            commit_every=steps,
            max_staleness=self.staleness,
            model={"path": model},
            finetune={"epochs": 0},
            batch=BATCH | {"epochs": self.epochs, "minibatches": self.minibatches},
            algorithm=self.algorithm,
            policy={"learning_rate": self.rate, "warmup_fraction": self.warmup},
            critic={"learning_rate": self.critic_rate or self.rate},
            evaluation={"samples": 1},  # the benchmark judges by itself
        )

    def settings(self, seed: int, steps: int) -> dict[str, Any]:
        """All that a result depends on, as JSON has it; the model follows from the seed."""
        if self.trainer:
            return self.trl | BATCH | {"seed": seed, "steps": steps}
        return self.config("pretrained", seed, steps).model_dump(mode="json")


TD: dict[str, Any] = {"critic_rate": 3e-3, "minibatches": 4}
"""For a critic that bootstraps, which must be ahead of the policy: it gets more updates, and the policy starts slowly.

At three times the policy's rate A2C of one step may learn at first, but then goes where the critic errs (a node
repeated is worth what the node is) and stays there, rewarded no more.
"""

VARIANTS = (
    Variant(name="REINFORCE", panel="no critic, no groups", algorithm={"name": "reinforce"}, rate=1e-3, epochs=1),
    Variant(
        name="batch mean as baseline",
        panel="no critic, no groups",
        algorithm={"name": "reinforce_baseline"},
        rate=1e-3,
        epochs=1,
    ),
    Variant(name="REINFORCE++", panel="no critic, no groups", algorithm={"name": "reinforce_pp"}, rate=1e-3),
    Variant(
        name="value as baseline",
        panel="critic",
        algorithm={"name": "reinforce_baseline", "baseline": "value"},
        rate=1e-3,
        critic_rate=3e-3,
        epochs=1,
    ),
    Variant(
        name="A2C one step",
        panel="critic",
        algorithm={"name": "a2c", "whiten_advantages": False},
        rate=3e-5,
        warmup=0.25,
        **TD,
    ),
    Variant(
        name="A2C four steps",
        panel="critic",
        algorithm={"name": "a2c", "n_steps": 4, "whiten_advantages": False},
        rate=2e-4,
        warmup=0.25,
        **TD,
    ),
    Variant(name="PPO", panel="critic", algorithm={"name": "ppo"}, rate=1e-3, critic_rate=3e-3),
    Variant(
        name="PPO dual clip", panel="critic", algorithm={"name": "ppo", "dual_clip": 3.0}, rate=1e-3, critic_rate=3e-3
    ),
    Variant(
        name="others' mean as baseline",
        panel="groups",
        algorithm={"name": "reinforce_baseline", "baseline": "leave_one_out"},
        rate=1e-3,
        epochs=1,
    ),
    Variant(name="RLOO", panel="groups", algorithm={"name": "rloo"}, rate=1e-3),
    Variant(
        name="RLOO by rollout",
        panel="groups",
        algorithm={"name": "rloo", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
        rate=1e-3,
    ),
    Variant(name="GRPO", panel="groups", algorithm={"name": "grpo"}, rate=1e-3),
    Variant(
        name="Dr. GRPO", panel="groups", algorithm={"name": "grpo", "std": False, "aggregation": "constant"}, rate=1e-3
    ),
    Variant(
        name="DAPO's loss",
        panel="groups",
        algorithm={"name": "grpo", "clip_high": 0.28, "aggregation": "token_mean"},
        rate=1e-3,
    ),
    Variant(
        name="GSPO",
        panel="groups",
        algorithm={"name": "grpo", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        rate=1e-3,
    ),
    Variant(name="TRL's GRPO", panel="beside TRL", algorithm={}, rate=1e-3, trainer="GRPO", beside="GRPO"),
    Variant(name="TRL's RLOO", panel="beside TRL", algorithm={}, rate=1e-3, trainer="RLOO", beside="RLOO by rollout"),
)
"""DAPO is here without its dynamic sampling, which takes more episodes for a step.

TRL's RLOO clips the ratio of the whole rollout, at 0.2; over four tokens that is about 0.05 of the length-normalised
one, hence the one of ours beside it.
"""


def pretraining(seed: int) -> RunConfig:
    """The fine-tuning of the recipe `walks`, and a single small step after it, since every run has one."""
    return _walks(
        seed=seed, steps=1, batch=BATCH | {"epochs": 1}, algorithm={"name": "reinforce"}, evaluation={"samples": 1}
    )


def _walks(**sections: Any) -> RunConfig:
    """The recipe with settings replaced, those of a section one by one."""
    recipe = tomllib.loads(recipe_path("walks").read_text(encoding="utf-8"))
    merged = {key: recipe.get(key, {}) | value if isinstance(value, dict) else value for key, value in sections.items()}
    return check(RunConfig.model_validate(recipe | merged))
