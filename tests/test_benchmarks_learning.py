"""The pure parts of the learning benchmark: what it would run, and what it makes of results.

Running it is the benchmark itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from learning_report import Result, gain, lead, plot, smooth, table
from learning_variants import VARIANTS, Variant, pretraining

from pipeline.algorithms.registry import ALGORITHMS

BENCHMARKS = Path(__file__).parent / "benchmarks"
OURS = [variant for variant in VARIANTS if not variant.trainer]
A, B = (Variant(name=name, panel="ours", algorithm={"name": "grpo"}, rate=1e-3) for name in ("A", "B"))
THEIRS = Variant(name="C", panel="theirs", algorithm={}, rate=1e-3, trainer="GRPO", beside="A")


def result(name: str, seed: int, after: list[float], curve: list[float]) -> Result:
    return Result(
        variant=name, seed=seed, settings={}, before=[0.5] * len(after), after=after, curve=curve, seconds=8.0
    )


@pytest.mark.parametrize("variant", OURS, ids=lambda variant: variant.name)
def test_every_variant_is_a_run_of_the_same_budget(variant: Variant) -> None:
    config = variant.config("model", seed=2, steps=7)
    assert (config.batch.samples, config.steps, config.seed, config.finetune.epochs, config.model.path) == (
        100,
        7,
        2,
        0,
        "model",
    )
    assert config.algorithm.name == variant.algorithm["name"]
    assert config.algorithm.needs_critic == (variant.critic_rate > 0)
    assert (config.model.width, config.sampling.max_new_tokens) == (64, 9), "the rest is the recipe's"


def test_no_algorithm_goes_unshown() -> None:
    assert {variant.algorithm["name"] for variant in OURS} == ALGORITHMS.keys()
    assert len({variant.file for variant in VARIANTS}) == len(VARIANTS)
    assert all(variant.beside in {ours.name for ours in OURS} for variant in VARIANTS if variant.trainer)


def test_all_begin_with_the_recipes_own_fine_tuning() -> None:
    config = pretraining(seed=1)
    assert (config.seed, config.steps, config.finetune.epochs, config.finetune.learner.learning_rate) == (
        1,
        1,
        15,
        1e-3,
    )


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a-0.json"
    assert Result.load(path) is None
    written = result("A", 0, [0.1, 1 / 3], [0.7])
    written.save(path)
    assert Result.load(path) == written


def test_gain_and_lead_are_over_seeds_and_start_nodes() -> None:
    ours = [result("A", 0, [0.6, 0.8], [0.5]), result("A", 1, [0.7, 0.9], [0.5])]
    assert gain(ours).mean == pytest.approx(0.25)
    assert gain(ours).low == pytest.approx(0.1, abs=0.06)
    same_seed = [result("C", 1, [0.6, 0.9], [0.5]), result("C", 5, [0.0, 0.0], [0.5])]
    assert lead(ours, same_seed).mean == pytest.approx((0.1 + 0.0) / 2), "a seed that only one has is left out"


def test_the_table_has_a_row_a_variant_and_the_comparison_below() -> None:
    results = {"A": [result("A", 0, [0.75, 0.75], [0.5, 0.7])], "C": [result("C", 0, [0.5, 0.5], [0.5, 0.5])], "B": []}
    lines = table((A, B, THEIRS), results).splitlines()
    assert lines[2] == "| A | rate 0.001, 4 x 1 updates | 1 | 0.500 | 0.750 | +0.250 (+0.250 to +0.250) | 0.600 | 8 |"
    assert lines[3].startswith("| C |")
    assert lines[-1] == "| A minus C | +0.250 (+0.250 to +0.250) | +0.100 |"


def test_smoothing_keeps_a_constant_and_averages_neighbours() -> None:
    assert smooth(np.full(9, 0.3)) == pytest.approx(np.full(9, 0.3))
    assert smooth(np.array([0.0, 0, 0, 5, 0, 0, 0]))[3] == 1.0


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    results = {name: [result(name, seed, [0.6, 0.7], [0.5, 0.6, 0.7]) for seed in range(2)] for name in ("A", "B", "C")}
    plot((A, B, THEIRS), results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["learning.py", "staleness.py", "overlap.py", "generation.py"])
def test_what_a_benchmark_imports_is_there(script: str) -> None:
    said = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--help"], capture_output=True, text=True, timeout=300
    )
    assert (said.returncode, said.stderr) == (0, "")
