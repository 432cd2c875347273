"""What working ahead gains: seconds a step with workers and learners that take a known time, for several max_staleness.

    python tests/benchmarks/overlap.py [--steps 12] [--seconds 1.0]

Real driver, pools, gangs, ledger and files; the workers and the learner sleep. A step without overlap takes the time of
its generation and that of learning. With a straggler, one of the workers takes three times as long a chunk.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path

# so that it runs from a checkout, installed or not
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from actors.config import RolloutConfig  # noqa: E402
from cluster.config import ClusterConfig  # noqa: E402
from cluster.imports import OWN  # noqa: E402
from cluster.session import Session  # noqa: E402
from driver_setup import config, fake_driver  # noqa: E402
from forked_workers import forked_workers  # noqa: E402
from pipeline.algorithms.reinforce import Reinforce  # noqa: E402
from pipeline.config.sections import BatchConfig  # noqa: E402

WORKERS, CHUNKS = 4, 8
RESULTS = Path(__file__).parent / "results" / "overlap.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of generating a step, and of learning from it")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # nothing is learned, as the driver would say
    rows = []
    settings = ClusterConfig(address="local")
    with (
        tempfile.TemporaryDirectory() as folder,
        forked_workers(),
        Session(settings, Path(folder), packages=OWN, local_cpus=16) as session,
    ):
        for straggler in (False, True):
            alone = 0.0
            for ahead in (0, 1, 2):
                run_dir = Path(folder) / f"{straggler}-{ahead}"
                found = seconds_a_step(session, run_dir, ahead, straggler, arguments.steps, arguments.seconds)
                alone = alone or found
                rows.append((("no", "yes")[straggler], ahead, found, alone / found))
                print(f"straggler {rows[-1][0]}, max_staleness {ahead}: {found:.2f} s a step, x {alone / found:.2f}")
    RESULTS.write_text(report(rows, arguments.steps, arguments.seconds))
    print(f"written to {RESULTS}")


def seconds_a_step(session: Session, run_dir: Path, ahead: int, straggler: bool, steps: int, seconds: float) -> float:
    """The median over the steps in which all pools are at work. seconds: of generation, and of learning, a step."""
    run = config(steps=steps, commit_every=steps).model_copy(
        update={
            "max_staleness": ahead,
            "batch": BatchConfig(prompts=4 * CHUNKS),
            "rollout": RolloutConfig(chunk_size=4, workers=WORKERS),
            "algorithm": Reinforce(decoupled=True, importance_cap=2),
        }
    )
    rollout = {"seconds": seconds * WORKERS / CHUNKS, "straggler": str(run_dir) + ".slow" if straggler else ""}
    with fake_driver(session, run, run_dir, rollout=rollout, learner={"seconds": seconds}) as driver:
        driver.run(run_dir / "policy")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(step["time/step"] for step in metrics[2:-3])


def report(rows: list[tuple[str, int, float, float]], steps: int, seconds: float) -> str:
    lines = [
        "# What working ahead gains",
        "",
        f"`python tests/benchmarks/overlap.py`: {steps} steps a line, {WORKERS} workers, {CHUNKS} chunks a step. "
        f"Generating a step takes {seconds:g} s and learning from it {seconds:g} s, both asleep; all else is real. "
        "The median of a step; the first two and the last three are left out. Two overlapped halves gain at most 2. "
        "A straggler takes three times as long a chunk.",
        "",
        "| straggler | max_staleness | seconds a step | times as fast |",
        "|---|---|---|---|",
    ]
    lines += [f"| {straggler} | {ahead} | {found:.2f} | {ratio:.2f} |" for straggler, ahead, found, ratio in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
