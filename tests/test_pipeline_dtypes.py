"""`auto` becomes what the device computes, once; bfloat16 that is emulated is warned of with what it costs."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors import device
from actors.config import settled
from pipeline.algorithms.reinforce import Reinforce
from pipeline.config.recipe import load, recipe_path
from pipeline.config.run_config import RunConfig
from pipeline.plan import dtypes
from pipeline.plan.dtypes import emulated, settle
from pipeline.plan.plan import show
from pipeline.plan.preflight import resolve


def walks(**sections: dict[str, Any]) -> RunConfig:
    config = load(recipe_path("walks"))
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


@pytest.fixture(params=[True, False], ids=["real", "emulated"])
def real(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A machine with, and one without, arithmetic for bfloat16."""
    monkeypatch.setattr(device, "computes_bfloat16", lambda gpus: request.param)
    monkeypatch.setattr(device, "bfloat16_slowdown", lambda gpus: 87.25)
    return bool(request.param)


def test_auto_is_what_the_machine_computes(real: bool) -> None:
    config = walks(policy={"dtype": "auto"}, rollout={"dtype": "auto"}, critic={"dtype": "bfloat16"})
    for found in (settle(config), resolve(config)):
        expected = "bfloat16" if real else "float32"
        assert (found.policy.dtype, found.rollout.dtype, found.reference.dtype, found.critic.dtype) == (
            expected,
            expected,
            "float32",
            "bfloat16",
        )
        assert (
            found.model_copy(update={"policy": config.policy, "rollout": config.rollout, "cluster": config.cluster})
            == config
        )


def test_a_learner_within_a_section_is_settled_too(real: bool) -> None:
    config = walks()
    finetune = config.finetune.model_copy(
        update={"learner": config.finetune.learner.model_copy(update={"dtype": "auto"})}
    )
    assert settle(config.model_copy(update={"finetune": finetune})).finetune.learner.dtype == (
        "bfloat16" if real else "float32"
    )


def test_only_bfloat16_that_is_used_and_emulated_is_warned_of(real: bool) -> None:
    config = walks(policy={"dtype": "bfloat16"}, rollout={"dtype": "bfloat16"})
    expected = [
        "policy.dtype, rollout.dtype: bfloat16 is emulated on this machine's CPU, where a matrix product takes 87.2 "
        "times as long as in float32; "
        "use float32, or auto, which decides by the machine"
    ]
    assert emulated(config) == ([] if real else expected)
    assert emulated(walks()) == []
    out = io.StringIO()
    show(config, Console(file=out, width=100))
    assert (f"warning: {expected[0]}" in out.getvalue()) is not real


def test_a_plan_measures_no_dtype_that_nothing_computes_in() -> None:
    config = walks(critic={"dtype": "bfloat16"}).model_copy(update={"algorithm": Reinforce()})
    out = io.StringIO()
    show(config, Console(file=out, width=200))
    assert "GFLOP/s in float32" in out.getvalue()
    assert "bfloat16" not in out.getvalue(), "there is no critic"


def test_a_gpu_that_is_not_here_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_sees_gpu", lambda: False)
    message = (
        r"^policy\.dtype: must be float32 or bfloat16 where policy\.gpus is 1 and this machine has no GPU to ask, got "
        r"'auto'; name one$"
    )
    with pytest.raises(ValueError, match=message):
        settle(walks(policy={"dtype": "auto", "gpus": 1}))
    assert emulated(walks(policy={"dtype": "bfloat16", "gpus": 1})) == [], (
        "what the workers' machines can do is theirs to say"
    )


def test_nothing_computes_in_auto() -> None:
    assert settled("bfloat16") == "bfloat16"
    with pytest.raises(AssertionError, match="auto is settled before anything starts"):
        settled("auto")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only of x86 can torch be told to do without AVX-512")
def test_a_cpu_without_avx512_is_recognised_and_its_emulation_measured() -> None:
    """The same machine, told to do without: what a run would find on an older one."""
    program = (
        "from actors.device import *; print(packs_bfloat16(), computes_bfloat16(0), bfloat16_slowdown(seconds=0.05))"
    )
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": str(Path(device.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    packs, computes, factor = done.stdout.split()
    assert (packs, computes) == ("False", "False")
    assert float(factor) > 5
