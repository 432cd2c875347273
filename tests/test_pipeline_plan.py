"""What a recipe would run: its arithmetic, its processes, and an estimate of memory that agrees with the models and the papers."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.config import LearnerConfig
from pipeline.config import RunConfig, load, recipe_path
from pipeline.plan import PROCESS_GB, Shape, _learner_bytes, _memory, _shape, show

GPT2 = {"layers": 12, "width": 768, "heads": 12, "context": 1024, "vocabulary": 50_257}


def config(**updates: dict[str, Any]) -> RunConfig:
    found = load(recipe_path("walks"))
    updates["rollout"] = {"chunk_size": 64, "slots": 64} | updates.get("rollout", {})
    for section, fields in updates.items():
        found = found.model_copy(update={section: getattr(found, section).model_copy(update=fields)})
    return found


def shown(found: RunConfig) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=120))
    return out.getvalue()


def test_the_arithmetic_of_a_step() -> None:
    """100 prompts x 3 = 300 rollouts; chunks of 64 hold 21 groups of 3, so 63 rollouts, so 5 chunks; 300 / 7 is 42 and some."""
    text = shown(config(batch={"group_size": 3, "epochs": 2, "minibatches": 7}, policy={"ranks": 4}))
    assert text.endswith("""\
a step: 100 prompts x 3 = 300 rollouts of at most 1 + 9 tokens,
        generated in 5 chunk(s) of at most 63; 2 epoch(s) x 7 minibatch(es) = 14 updates,
        each on about 42 rollouts, 11 a rank
a run:  40 steps = 12,000 rollouts = 560 updates
""")


def processes(text: str) -> list[tuple[str, int, str]]:
    """(process, bundle, memory) of each row."""
    rows = re.findall(r"│ (\w+\[\d+\]) +│ +(\d+) │[^│]+│[^│]+│ +(\S+(?: GB)?) │", text)
    return [(name, int(bundle), memory) for name, bundle, memory in rows]


def test_lm_human_preferences_is_planned_without_a_hub() -> None:
    """Its model is one that the hub would have to be asked for."""
    text = shown(load(recipe_path("lm-human-preferences")))
    assert {name for name, *_ in processes(text.replace("?", "0.0 GB"))} == {"policy[0]", "rollout[0]", "reward[0]", "reference[0]", "critic[0]"}
    assert "a step: 512 prompts x 1 = 512 rollouts of at most 64 + 24 tokens" in text


def test_every_process_has_its_seat() -> None:
    text = shown(config(rollout={"workers": 2}, algorithm={"kl_coef": 0.1}, cluster={"cpus_per_bundle": 3}))
    assert [(name, bundle) for name, bundle, _ in processes(text)] == [
        ("policy[0]", 0),
        ("rollout[0]", 0),
        ("rollout[1]", 1),
        ("reward[0]", 0),
        ("reference[0]", 0),
        ("critic[0]", 0),
    ]
    assert re.search(r"^needs 2 bundle\(s\): 3 CPUs, 3 CPUs; this machine has \d+ cores$", text, re.MULTILINE)


def test_devices_of_their_own() -> None:
    text = shown(config(cluster={"share_devices": False, "cpus_per_bundle": 1}, policy={"gpus": 1.0}))
    assert "needs 4 bundle(s): 1 CPU and 1 GPU, 1 CPU, 1 CPU, 1 CPU;" in text


def test_a_new_model_has_as_many_parameters_as_gpt2() -> None:
    shape = _shape(config(model=GPT2))
    assert shape == Shape(parameters=124_439_808, layers=12, kv_width=768, context=1024)


def test_a_given_model_is_measured(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = _shape(config(model={"path": str(tiny_model)}))
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert shape == Shape(parameters=parameters, layers=2, kv_width=32, context=64)


def test_a_model_far_too_large_for_this_machine_is_planned(tmp_path: Path) -> None:
    """Llama 3 70B from its config.json alone; 8 of 64 heads have keys and values, 128 numbers each."""
    from transformers import LlamaConfig

    llama = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    LlamaConfig(**llama, vocab_size=128_256, max_position_embeddings=8192).save_pretrained(tmp_path)
    assert _shape(config(model={"path": str(tmp_path)})) == Shape(parameters=70_553_706_496, layers=80, kv_width=1024, context=8192)


def test_a_model_that_cannot_be_looked_at_is_said_so() -> None:
    text = shown(config(model={"path": "nobody/nothing [/x]"}))
    assert "model nobody/nothing [/x]: not on this machine (a run would fetch it), so its size is not known" in text
    assert {memory for _, _, memory in processes(text)} == {"?"}
    assert "4,000 rollouts" in text


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_bytes_of_a_learner_are_those_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters in 16 bits on 64 ranks, K = 12."""
    learner = LearnerConfig(zero_stage=stage, ranks=64, dtype="bfloat16")  # type: ignore[arg-type]
    assert _learner_bytes(learner, 7_500_000_000) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "ranks", "each"),
    [(0, 1, 16), (0, 4, 16), (1, 1, 20), (1, 4, 8 + 12 / 4), (2, 4, 4 + 16 / 4), (3, 4, 20 / 4)],
)
def test_bytes_of_a_float32_parameter(stage: int, ranks: int, each: float) -> None:
    """Weight 4, gradient 4, two moments 8; a sharded optimiser steps on a flat copy of its part, 4 more."""
    learner = LearnerConfig(zero_stage=stage, ranks=ranks)  # type: ignore[arg-type]
    assert _learner_bytes(learner, 1000) == pytest.approx(1000 * each)


def test_memory_of_each_role_at_gpt2_size() -> None:
    """124 M parameters; a token's keys and values are 2 x 12 x 768 numbers, kept for 64 slots of 10 tokens."""
    found = config(model=GPT2, rollout={"dtype": "bfloat16"}, critic={"dtype": "bfloat16"}, policy={"zero_stage": 0})
    shape = _shape(found)
    assert shape is not None
    n = 124_439_808
    assert _memory(found, "policy", shape) == 16 * n
    assert _memory(found, "critic", shape) == 16 * n
    assert _memory(found, "rollout", shape) == 2 * n + 2 * 64 * 10 * 2 * 12 * 768
    assert _memory(found, "reference", shape) == 4 * n
    assert _memory(found, "reward", shape) == 0
    rows = {name: memory for name, _, memory in processes(shown(found))}
    assert rows["policy[0]"] == f"{16 * n / 1e9 + PROCESS_GB:.2f} GB"
    total = (16 + 16 + 2) * n / 1e9 + 2 * 64 * 10 * 2 * 12 * 768 / 1e9 + 4 * PROCESS_GB
    assert f"model 124.4 M parameters, context 1024; about {total:.1f} GB in all" in shown(found)
    assert f"a commit every 10 steps, at most {124.44e6 * 12 * 2 / 1e6:,.0f} MB; 2 are kept" in shown(found), "weights and two moments, of policy and critic"


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"reward": {"function": "nowhere:f"}}, r"^reward\.function: must be importable, got 'nowhere:f': No module named 'nowhere'"),
        ({"reward": {"function": "math:pi"}}, r"^reward\.function: must be callable, got 'math:pi': of type float"),
        ({"sampling": {"temperature": 0.0}}, r"^sampling\.temperature: must be > 0"),
        ({"policy": {"gpus": 2.0}}, r"^policy\.gpus: must be at most 1, got 2"),
    ],
)
def test_what_cannot_run_is_refused(updates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shown(config(**updates))


def test_a_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^task: must be one of smalltalk, walks, files or an import path package\.module:name, got 'chess'$"):
        shown(config().model_copy(update={"task": "chess"}))
