"""The comparison that `raylign evaluate` makes: which two models, by which judges, and where the result goes.

From a run it takes the recipe, the policy, the policy's starting model and the judges. An option can replace each of
them. Left out: comparisons of more than two models at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import strftime

from pipeline.config.recipe import absolute
from pipeline.config.run_config import RunConfig

LOG = "log"  # the folder within `out`


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models to compare, the reward model that judges them besides the rule, and the folder of the result.

    run_dir: the folder of the run to evaluate; None if the command names a recipe instead.
    """

    policy: str
    baseline: str
    reward_model: str  # "": only the rule judges
    out: Path
    run_dir: Path | None

    @property
    def models(self) -> dict[str, str]:
        """Option of the command line -> folder or hub name of the model."""
        return {"--policy": self.policy, "--baseline": self.baseline, "--reward-model": self.reward_model}

    @classmethod
    def of(
        cls,
        config: RunConfig,
        run_dir: Path | None,
        *,
        policy: str,
        baseline: str,
        reward_model: str,
        out: Path | None,
        recipe: str,
    ) -> Comparison:
        """Take each model that is named, and every other one from the run, else from the recipe.

        A model is named if its option is not "". out: folder of the result; None chooses a new one. recipe: the name
        of the recipe. Raises ValueError when the policy or the baseline is neither named nor found, or when `out` is in
        use.
        """
        found = {"policy": "", "baseline": config.model.path, "reward-model": config.reward.model}
        if run_dir is not None:
            folders = {"policy": "policy", "baseline": "finetuned", "reward-model": "reward-model"}
            found |= {role: str(run_dir / name) for role, name in folders.items() if (run_dir / name).is_dir()}
        named = {"policy": policy, "baseline": baseline, "reward-model": reward_model}
        models = {role: absolute(named[role] or found[role]) for role in found}
        for role in ("policy", "baseline"):
            if not models[role]:
                where = f"{run_dir} has none yet" if run_dir else "a recipe has none"
                raise ValueError(f"--{role}: must be given, since {where}; name the folder of a causal language model")
        out = (out or _new_folder(run_dir, recipe)).absolute()
        if _is_in_use(out):
            raise ValueError(
                f"--out: must be a new or empty folder, got {out}; choose another, nothing in it was touched"
            )
        return cls(
            policy=models["policy"],
            baseline=models["baseline"],
            reward_model=models["reward-model"],
            out=out,
            run_dir=run_dir,
        )


def _new_folder(run_dir: Path | None, recipe: str) -> Path:
    if run_dir is None:
        return Path("runs") / f"{recipe}-evaluation-{strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while _is_in_use(run_dir / f"evaluation-{number}"):
        number += 1
    return run_dir / f"evaluation-{number}"


def _is_in_use(out: Path) -> bool:
    """Whether `out` holds anything besides a log.

    A stopped evaluation leaves only its log, so the same command can begin it again.
    """
    return out.exists() and (not out.is_dir() or any(path.name != LOG for path in out.iterdir()))
