"""How near to the best play each algorithm comes: whole conversations in the world and in twenty questions.

    python tests/benchmarks/conversation_learning.py [world|twenty-questions ...] [--only NAME ...] [--seeds 0 1 2 3 4]
                                                     [--steps 20] [--out DIR]

Whole runs, with all their actors, in one local Ray; the evaluation of each run judges its policy on held-out openings.
The return is given as a share of the best possible one, which dynamic programming knows. Each finished (algorithm,
seed) leaves a file and is not done again, so a benchmark that was interrupted goes on, and two processes can share the
seeds. Writes conversations.md and conversations.png from all results that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

# so small a model only waits for a second thread
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# so that it runs from a checkout, installed or not
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from conversation_report import Result, best_returns, plot, tables  # noqa: E402
from conversation_variants import GAMES, Game, Variant  # noqa: E402
from rich.console import Console  # noqa: E402

from cluster.config import ClusterConfig  # noqa: E402
from cluster.imports import OWN  # noqa: E402
from cluster.session import Session  # noqa: E402
from cluster.stopping import Stopped  # noqa: E402
from pipeline.observe.observer import read_metrics  # noqa: E402
from pipeline.run.start import run_stages  # noqa: E402

LAST = 5  # steps whose use of options is reported


def main() -> None:
    arguments = parse()
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    games = {name: GAMES[name] for name in arguments.games or GAMES}
    try:
        with Session(ClusterConfig(), out / f"log-{os.getpid()}", packages=OWN, local_cpus=8):  # one Ray for all runs
            for name, game in games.items():
                chosen = [one for one in game.variants if not arguments.only or one.file in arguments.only]
                for seed in arguments.seeds:
                    for variant in chosen:
                        play(game, variant, seed, arguments.steps, out / name)
    except Stopped as stopped:
        sys.exit(f"{stopped}; the same command goes on with what is missing")
    found = {name: Result.all_of(out / name) for name in GAMES}
    (out / "conversations.md").write_text(tables(GAMES, found), encoding="utf-8")
    plot(GAMES, found, out / "conversations.png")
    print(f"\n{tables(GAMES, found)}\n{out / 'conversations.md'}\n{out / 'conversations.png'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("games", nargs="*", metavar="GAME", help=f"{', '.join(GAMES)}; default all")
    names = sorted({variant.file for game in GAMES.values() for variant in game.variants})
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/conversations"))
    found = parser.parse_args()
    if strange := sorted({*found.games} - {*GAMES}):
        parser.error(f"GAME: must be {' or '.join(GAMES)}, got {strange[0]}")
    return found


def play(game: Game, variant: Variant, seed: int, steps: int, out: Path) -> None:
    """Train and judge one algorithm with one seed, unless an earlier call did so with these settings."""
    path, folder, settings = (
        out / f"{variant.file}-{seed}.json",
        out / f"{variant.file}-{seed}",
        variant.settings(seed, steps),
    )
    known = Result.load(path)
    if known is not None and known.settings == settings:
        return
    model = fine_tuned(game, variant.start, out)
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    run_stages(variant.config(str(model), seed, steps), folder, Console(quiet=True), until="evaluate")
    metrics = read_metrics(folder)
    # the account is of the whole run
    trained = np.diff([step["ledger/trained"] for step in metrics], prepend=0.0).tolist()
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    rewards = next(iter(evaluation["rewards"].values()))
    best = best_returns(game.name, [reply["prompt"] for reply in evaluation["replies"]])
    result = Result(
        variant=variant.name,
        seed=seed,
        settings=settings,
        before=[sum(own) / len(own) for own in rewards["baseline"]],
        after=[sum(own) / len(own) for own in rewards["policy"]],
        best=best,
        curve=[step["reward/mean"] for step in metrics],
        tokens=[step["rollout/response_tokens"] * count for step, count in zip(metrics, trained, strict=True)],
        conversations=trained,
        turns=[step["conversation/turns"] for step in metrics],
        options={
            name: sum(step[name] for step in metrics[-LAST:]) / LAST
            for name in metrics[-1]
            if name.startswith("option/")
        },
        seconds=sum(step["time/step"] for step in metrics),
    )
    result.save(path)
    print(
        f"{game.name}, {variant.name}, seed {seed}: {result.share('before'):.1%} -> {result.share('after'):.1%} of the "
        f"best return ({time.monotonic() - started:.0f} s)",
        flush=True,
    )


def fine_tuned(game: Game, recipe: str, out: Path) -> Path:
    """The folder of the model that the recipe's own fine-tuning gives."""
    folder = out / f"start-{recipe}"
    # in a folder where that is done, it does nothing
    run_stages(game.fine_tuning(recipe), folder, Console(quiet=True), until="sft")
    return folder / "finetuned"


if __name__ == "__main__":
    main()
