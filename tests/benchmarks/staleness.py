"""What old samples cost: optimality on `walks` for several max_staleness, at equal numbers of samples.

    python tests/benchmarks/staleness.py [--seeds 0 1 2] [--steps 40] [--out DIR]

The same models, budget and judge as in learning.py, whose files these are, too. Writes results/staleness.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from learning import EPISODES, STEPS, Result, Session, Variant, result_of
from learning_report import table

from cluster.config import ClusterConfig
from cluster.imports import OWN

STALENESS = (0, 1, 4)
WEIGHTED = {"decoupled": True, "importance_cap": 2.0}
RESULTS = Path(__file__).parent / "results" / "staleness.md"


def variants() -> list[Variant]:
    """GRPO and PPO with the clipped ratio to the weights that sampled, and GRPO with truncated weights."""
    found = []
    for staleness in STALENESS:
        behind = f"{staleness} behind" if staleness else "fresh"
        of = {"panel": "", "rate": 1e-3, "staleness": staleness}
        found += [
            Variant(name=f"GRPO, {behind}", algorithm={"name": "grpo"}, **of),
            Variant(name=f"GRPO decoupled, {behind}", algorithm={"name": "grpo"} | WEIGHTED, **of),
            Variant(name=f"PPO, {behind}", algorithm={"name": "ppo"}, critic_rate=3e-3, **of),
        ]
    return sorted(found, key=lambda variant: variant.name.split(",")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/staleness"))
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Result]] = {}
    with Session(ClusterConfig(), out / "log", packages=OWN, local_cpus=8):  # one Ray for all runs
        for seed in arguments.seeds:
            for variant in variants():
                results.setdefault(variant.name, []).append(result_of(variant, seed, arguments.steps, out))
    RESULTS.write_text(
        f"""# What old samples cost

`python tests/benchmarks/staleness.py`: the task `walks`, {arguments.steps * EPISODES:,} episodes,
{len(arguments.seeds)} seeds, judged as in [learning.md](learning.md). "4 behind" is max_staleness 4: the samples of a
step come from the weights of four steps before.

{table(variants(), results)}""",
        encoding="utf-8",
    )
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
