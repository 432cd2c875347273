"""What a recipe would run: its arithmetic, its processes, and an estimate of memory that agrees with the models and the
papers.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.config import LearnerConfig, TrainingConfig
from cluster.placement import NodeResources
from pipeline.config.recipe import load, recipe_path
from pipeline.config.run_config import RunConfig
from pipeline.plan.idle import idle_workers
from pipeline.plan.memory import PROCESS_GB, Shape, learner_bytes, role_bytes, shape_of
from pipeline.plan.plan import show

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
    """100 prompts x 3 = 300 rollouts; chunks of 64 hold 21 groups of 3, so 63 rollouts, so 5 chunks; 300 / 7 is 42 and
    some.
    """
    text = shown(config(batch={"group_size": 3, "epochs": 2, "minibatches": 7}, policy={"ranks": 4}))
    assert (
        """\
a step: 100 prompts x 3 = 300 rollouts of at most 1 + 9 tokens,
        generated in 5 chunk(s) of at most 63; 2 epoch(s) x 7 minibatch(es) = 14 updates,
        each on about 42 rollouts, 11 a rank
a run:  40 steps = 12,000 rollouts = 560 updates
"""
        in text
    )


def test_the_data_are_opened_and_counted(tmp_path: Path) -> None:
    """Every second conversation is held out, by a hash of its words."""
    rows = [f'{{"prompt": "Say {number}", "response": "{number}"}}' for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"demonstrations": str(tmp_path / "rows.jsonl"), "heldout": 0.5}
    text = shown(config(data=data, reward={"function": "builtins:len"}).model_copy(update={"task": "files"}))
    found = re.search(
        r"^data: (\d+) prompts and (\d+) held out, (\d+) demonstrations and (\d+) held out$", text, re.MULTILINE
    )
    assert found is not None, text
    train, heldout, *demonstrations = map(int, found.groups())
    assert (train + heldout, demonstrations) == (40, [train, heldout])


def test_the_duration_is_called_an_estimate_and_says_what_it_rests_on() -> None:
    text = shown(config())
    assert re.search(
        r"^estimate: about \d+ (s|min) on this machine, by arithmetic at [\d,]+ GFLOP/s in float32, measured just now; "
        r"it may take half",
        text,
        re.MULTILINE,
    )
    assert re.search(
        r"^ +sft \d+ (s|min), rl \d+ (s|min), evaluate \d+ (s|min); a step [\d.]+ s: rollout", text, re.MULTILINE
    )


def processes(text: str) -> list[tuple[str, int, str]]:
    """(process, bundle, memory) of each row."""
    rows = re.findall(r"│ (\w+\[\d+\]) +│ +(\d+) │[^│]+│[^│]+│ +(\S+(?: GB)?) │", text)
    return [(name, int(bundle), memory) for name, bundle, memory in rows]


def test_lm_human_preferences_is_planned_without_a_hub() -> None:
    """Its model is one that the hub would have to be asked for."""
    text = shown(load(recipe_path("lm-human-preferences")))
    assert {name for name, *_ in processes(text.replace("?", "0.0 GB"))} == {
        "policy[0]",
        "rollout[0]",
        "reward[0]",
        "reference[0]",
        "critic[0]",
    }
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
    text = shown(config(cluster={"share_devices": False, "cpus_per_bundle": 1}))
    assert "needs 4 bundle(s): 1 CPU, 1 CPU, 1 CPU, 1 CPU;" in text


def test_a_new_model_has_as_many_parameters_as_gpt2() -> None:
    shape = shape_of(config(model=GPT2))
    assert shape == Shape(parameters=124_439_808, layers=12, kv_width=768, context=1024)


def test_a_given_model_is_measured(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = shape_of(config(model={"path": str(tiny_model)}))
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert shape == Shape(parameters=parameters, layers=2, kv_width=32, context=64)


def test_a_model_far_too_large_for_this_machine_is_planned(tmp_path: Path) -> None:
    """Llama 3 70B from its config.json alone; 8 of 64 heads have keys and values, 128 numbers each."""
    from transformers import LlamaConfig

    llama = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    LlamaConfig(**llama, vocab_size=128_256, max_position_embeddings=8192).save_pretrained(tmp_path)
    assert shape_of(config(model={"path": str(tmp_path)})) == Shape(
        parameters=70_553_706_496, layers=80, kv_width=1024, context=8192
    )


def test_a_model_that_cannot_be_looked_at_is_said_so() -> None:
    text = shown(config(model={"path": "nobody/[bold]nothing[x]"}))
    assert "model nobody/[bold]nothing[x]: not on this machine (a run would fetch it), so its size is not known" in text
    assert {memory for _, _, memory in processes(text)} == {"?"}
    assert "4,000 rollouts" in text


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_bytes_of_a_learner_are_those_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters in 16 bits on 64 ranks, K = 12."""
    learner = LearnerConfig(zero_stage=stage, ranks=64, dtype="bfloat16")  # type: ignore[arg-type]
    assert learner_bytes(learner, 7_500_000_000) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "ranks", "each"),
    [(0, 1, 16), (0, 4, 16), (1, 1, 20), (1, 4, 8 + 12 / 4), (2, 4, 4 + 16 / 4), (3, 4, 20 / 4)],
)
def test_bytes_of_a_float32_parameter(stage: int, ranks: int, each: float) -> None:
    """Weight 4, gradient 4, two moments 8; a sharded optimiser steps on a flat copy of its part, 4 more."""
    learner = LearnerConfig(zero_stage=stage, ranks=ranks)  # type: ignore[arg-type]
    assert learner_bytes(learner, 1000) == pytest.approx(1000 * each)


def test_memory_of_each_role_at_gpt2_size() -> None:
    """124 M parameters; a token's keys and values are 2 x 12 x 768 numbers, kept for 64 slots of 10 tokens."""
    found = config(model=GPT2, rollout={"dtype": "bfloat16"}, critic={"dtype": "bfloat16"}, policy={"zero_stage": 0})
    shape = shape_of(found)
    assert shape is not None
    n = 124_439_808
    assert role_bytes(found, "policy", shape) == 16 * n
    assert role_bytes(found, "critic", shape) == 16 * n
    cache = 2 * 64 * 10 * 2 * 12 * 768
    assert role_bytes(found, "rollout", shape) == 2 * n + cache + 2 * n, (
        "the model, its cache, and now and then the start, to see the KL to it"
    )
    unseen = found.model_copy(update={"algorithm": found.algorithm.model_copy(update={"kl_every": 0})})
    assert role_bytes(unseen, "rollout", shape) == 2 * n + cache
    assert role_bytes(found, "reference", shape) == 4 * n
    assert role_bytes(found, "reward", shape) == 0
    rows = {name: memory for name, _, memory in processes(shown(found))}
    assert rows["policy[0]"] == f"{16 * n / 1e9 + PROCESS_GB:.2f} GB"
    total = (16 + 16 + 2 + 2) * n / 1e9 + 2 * 64 * 10 * 2 * 12 * 768 / 1e9 + 4 * PROCESS_GB
    assert f"model 124.4 M parameters, context 1024; about {total:.1f} GB in all" in shown(found)
    assert f"a commit every 10 steps, at most {124.44e6 * 12 * 2 / 1e6:,.0f} MB; 2 are kept" in shown(found), (
        "weights and two moments, of policy and critic"
    )
    ahead = found.model_copy(update={"max_staleness": 3})
    assert f"at most {124.44e6 * (12 * 2 + 3 * 2) / 1e6:,.0f} MB" in shown(ahead), "and three older versions"
    assert "sampled by weights 3 version(s) before those that it trains" in shown(ahead)
    assert "sampled by weights" not in shown(found)


def test_a_partner_is_held_beside_the_policy_by_each_rollout_worker(tiny_model: Path) -> None:
    alone = config(model=GPT2, environment={"name": "mine:Talk"})
    both = config(model=GPT2, environment={"name": "mine:Talk", "partner": str(tiny_model)})
    shape, partner = shape_of(both), shape_of(config(model={"path": str(tiny_model)}))
    assert shape.partner == partner
    cache = 2 * 64 * partner.context * 2 * 32  # keys and values of 64 slots, 2 layers of width 32
    more = role_bytes(both, "rollout", shape) - role_bytes(alone, "rollout", shape_of(alone))
    assert more == 4 * (partner.parameters + cache)
    elsewhere = config(model=GPT2, environment={"name": "mine:Talk", "partner": "nobody/nothing"})
    assert shape_of(elsewhere).partner is None


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (
            {"reward": {"function": "nowhere:f"}},
            r"^reward\.function: must be importable, got 'nowhere:f': No module named 'nowhere'",
        ),
        ({"reward": {"function": "math:pi"}}, r"^reward\.function: must be callable, got 'math:pi': of type float"),
        ({"sampling": {"temperature": 0.0}}, r"^sampling\.temperature: must be > 0"),
        ({"policy": {"gpus": 2.0}}, r"^policy\.gpus: must be at most 1, got 2"),
    ],
)
def test_what_cannot_run_is_refused(updates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shown(config(**updates))


def test_a_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^task: must be one of smalltalk, twenty-questions, walks, world, .*, files or an .*, got 'chess'$",
    ):
        shown(config().model_copy(update={"task": "chess"}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rollout": {"workers": 2}}, []),  # 100 prompts in chunks of 64
        (
            {"rollout": {"workers": 4}},
            [
                "rollout.workers = 4, but a step has 2 chunk(s): 2 of them will idle; lower it, or set "
                "rollout.chunk_size = 25"
            ],
        ),
        (
            {"batch": {"prompts": 3, "group_size": 4}, "reward": {"workers": 5}},
            ["reward.workers = 5, but a step has 1 chunk(s): 4 of them will idle; lower it"],
        ),
        (
            {"batch": {"minibatches": 50}, "policy": {"ranks": 3}},
            ["policy.ranks = 3, but a minibatch has 2 rollout(s): 1 of them will idle; lower it"],
        ),
        (
            {"finetune": {"learner": TrainingConfig(ranks=70)}},
            ["finetune.learner.ranks = 70, but finetune.batch_size = 64: 6 of them will idle; lower it"],
        ),
        (
            {"evaluation": {"workers": 9}},
            ["evaluation.workers = 9, but an evaluation has 4 chunk(s) at most: 5 of them will idle; lower it"],
        ),
    ],
)
def test_who_will_have_nothing_to_do_is_said(settings: dict[str, dict[str, Any]], told: list[str]) -> None:
    assert [line for line in shown(config(**settings)).splitlines() if "idle" in line] == told


def test_the_chunk_size_that_is_proposed_keeps_everybody_busy() -> None:
    for workers in (6, 7, 40, 100):
        for size in (1, 3):
            found = config(batch={"group_size": size}, rollout={"workers": workers})
            [line] = [line for line in idle_workers(found) if line.startswith("rollout")]
            better = int(line.rpartition(" ")[2])
            assert (
                idle_workers(
                    found.model_copy(update={"rollout": found.rollout.model_copy(update={"chunk_size": better})})
                )
                == []
            )


def test_the_plan_of_a_cluster_is_that_of_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPUs of a bundle are what its nodes have for each, as in a run, unless the recipe says so."""
    nodes = [NodeResources(name=f"10.0.0.{number}", cpus=12, gpus=0) for number in (1, 2)]
    monkeypatch.setattr("pipeline.plan.plan._nodes", lambda config: nodes)
    apart = {"address": "10.0.0.1:6379", "share_devices": False}
    assert re.search(r"policy\[0\] .* 6 ", shown(config(cluster={**apart, "cpus_per_bundle": 0})))
    assert re.search(r"policy\[0\] .* 4 ", shown(config(cluster={**apart, "cpus_per_bundle": 4})))
    nodes[:] = [NodeResources(name="head", cpus=2, gpus=0)]
    assert "no node has room for all bundles yet, so each gets 1 CPU" in shown(
        config(cluster={**apart, "cpus_per_bundle": 0})
    )
