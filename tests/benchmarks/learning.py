"""Which algorithm learns how fast: optimality against episodes on `walks`, every algorithm, three seeds, with TRL's
GRPO and RLOO beside ours.

    python tests/benchmarks/learning.py [--only NAME ...] [--seeds 0 1 2] [--steps 40] [--out DIR] [--no-trl]

One model a seed is pre-trained on random walks, and every algorithm starts from it. Ours are whole runs, with all their
actors, in one local Ray; TRL's are trained in this process. All final models are judged alike: the same samples of
every start node, from the same random numbers. Each finished (algorithm, seed) leaves a file and is not done again, so
a benchmark that was interrupted goes on. Writes learning.md and learning.png.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path

# so small a model only waits for a second thread
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# so that it runs from a checkout, installed or not
sys.path[:0] = [
    str(Path(__file__).parents[2]),
    str(Path(__file__).parent),
]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import trl_baseline  # noqa: E402
from learning_report import Result, gain, plot, table  # noqa: E402
from learning_variants import BATCH, EPISODES, STEPS, VARIANTS, Variant, pretraining  # noqa: E402
from rich.console import Console  # noqa: E402

from actors.config import RolloutConfig, SamplingConfig  # noqa: E402
from actors.engine.protocol import Request  # noqa: E402
from actors.engine.torch_engine import TorchEngine  # noqa: E402
from cluster.config import ClusterConfig  # noqa: E402
from cluster.imports import OWN  # noqa: E402
from cluster.session import Session  # noqa: E402
from cluster.stopping import Stopped  # noqa: E402
from pipeline.observe.observer import read_metrics  # noqa: E402
from pipeline.run.start import run_stages  # noqa: E402
from pipeline.tasks.walks import RandomWalks, optimality  # noqa: E402

JUDGED = 100  # samples of each start node


def main() -> None:
    arguments = parse()
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    variants = [variant for variant in VARIANTS if not arguments.only or variant.file in arguments.only]
    if not arguments.trl or not trl_baseline.is_installed():
        print(
            "without TRL" + ("" if trl_baseline.is_installed() else f", which is not installed: {trl_baseline.INSTALL}")
        )
        variants = [variant for variant in variants if not variant.trainer]
    results: dict[str, list[Result]] = {}
    try:
        with Session(ClusterConfig(), out / "log", packages=OWN, local_cpus=8):  # one Ray for all runs
            for seed in arguments.seeds:
                for variant in variants:
                    results.setdefault(variant.name, []).append(result_of(variant, seed, arguments.steps, out))
    except Stopped as stopped:
        sys.exit(f"{stopped}; the same command goes on with what is missing")
    plot(variants, results, out / "learning.png")
    (out / "learning.md").write_text(f"{heading(arguments.steps)}\n{table(variants, results)}", encoding="utf-8")
    print(f"\n{table(variants, results)}\n{out / 'learning.md'}\n{out / 'learning.png'}")
    not_learnt = [name for name, found in results.items() if gain(found).low <= 0]
    sys.exit(f"no clear improvement: {', '.join(not_learnt)}" if not_learnt else 0)


def heading(steps: int) -> str:
    """What the table is of, and where and when it was made."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    packages = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("torch", "ray", "transformers", *(["trl"] if trl_baseline.is_installed() else []))
    )
    return f"""# Which algorithm learns how fast

Optimality (1 is a shortest way) on the task `walks` after {steps * EPISODES:,} episodes, {EPISODES} a step,
from one pre-trained model a seed. Before and after: {JUDGED} walks from each of the 20 starts at temperature 1;
intervals are bootstrapped over seeds and starts.
Mean on the way: over all episodes of training. Seconds: of all steps, without starting processes.
Updates: passes over a step's rollouts x minibatches.

Made by `python tests/benchmarks/learning.py` at commit {commit or "unknown"} on {time.strftime("%Y-%m-%d")}:
Python {platform.python_version()}, {packages}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores.

![optimality against episodes](learning.png)
"""


def parse() -> argparse.Namespace:
    names = [variant.file for variant in VARIANTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/learning"))
    parser.add_argument("--no-trl", dest="trl", action="store_false")
    return parser.parse_args()


def result_of(variant: Variant, seed: int, steps: int, out: Path) -> Result:
    """The result that an earlier call left, if its settings were these, or a new one."""
    model = pretrained(seed, out)
    path, folder = out / f"{variant.file}-{seed}.json", out / f"{variant.file}-{seed}"
    settings = variant.settings(seed, steps)
    known = Result.load(path)
    if known is not None and known.settings == settings:
        return known
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    if variant.trainer:
        policy = folder
        curve, seconds = trl_baseline.train(
            variant.trainer, str(model), policy, seed=seed, steps=steps, batch=BATCH, settings=variant.trl
        )
    else:
        policy = folder / "policy"
        run_stages(variant.config(str(model), seed, steps), folder, Console(quiet=True), until="rl")
        metrics = read_metrics(folder)
        curve, seconds = [step["reward/mean"] for step in metrics], sum(step["time/step"] for step in metrics)
    before, after = judge(model, seed), judge(policy, seed)
    result = Result(
        variant=variant.name, seed=seed, settings=settings, before=before, after=after, curve=curve, seconds=seconds
    )
    result.save(path)
    print(
        f"{variant.name}, seed {seed}: {np.mean(before):.3f} -> {np.mean(after):.3f}  "
        f"({time.monotonic() - started:.0f} s)",
        flush=True,
    )
    return result


def pretrained(seed: int, out: Path) -> Path:
    """The folder of the model that imitates random walks: what the recipe's own fine-tuning gives with this seed."""
    folder = out / f"pretrained-{seed}"
    # in a folder where that is done, it does nothing
    run_stages(pretraining(seed), folder, Console(quiet=True), until="sft")
    return folder / "finetuned"


@cache
def judge(model: Path, seed: int) -> list[float]:
    """Mean optimality from each start node, of JUDGED samples at temperature 1 whose randomness depends on the seed
    alone.
    """
    starts = [prompt.text for prompt in RandomWalks().prompts("heldout") for _ in range(JUDGED)]
    engine = TorchEngine(str(model), RolloutConfig(slots=104), torch.device("cpu"))
    prompts = [np.asarray(engine.tokenizer.encode(start, add_special_tokens=False), np.int32) for start in starts]
    requests = [
        Request(sample_id=(1 << 40) + number, group_id=(1 << 40) + number // JUDGED, prompt=prompt)
        for number, prompt in enumerate(prompts)
    ]
    completions = engine.generate(requests, SamplingConfig(max_new_tokens=9), seed=seed)
    walks = engine.tokenizer.batch_decode([completion.tokens for completion in completions], skip_special_tokens=True)
    return [
        float(mean) for mean in np.reshape(optimality(starts, walks, [{}] * len(starts)), (-1, JUDGED)).mean(axis=1)
    ]


if __name__ == "__main__":
    main()
