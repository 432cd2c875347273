"""The numbers and paths of a recipe: each number has its range, each path is expanded, and a recipe that cannot be read
is told in one line.
"""

from __future__ import annotations

import os
import re
import select
from pathlib import Path

import numpy as np
import pytest

from actors.config import RewardConfig
from cluster.config import ClusterConfig, Config
from pipeline.algorithms.ppo import PPO
from pipeline.arguments.overrides import override
from pipeline.config.recipe import load, recipe_path
from pipeline.config.rules import GROUPS
from pipeline.config.run_config import RunConfig

MINIMAL = 'task = "walks"\nsteps = 2\nmodel.path = "gpt2"\n'
ODD = ("nan", "inf", "-inf", "1e31", "-1e31", f"1{'0' * 400}", f"-1{'0' * 400}")


def recipe(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def numeric(model: type[Config] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every key that takes a number -> how its value is written, `{}` for the number; of the algorithm, PPO's."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        kind = PPO if name == "algorithm" else field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            found |= numeric(kind, f"{prefix}{name}.")
        elif kind in (int, float):
            found[prefix + name] = "{}"
        elif kind == tuple[float, float]:
            found[prefix + name] = "[{}, 0.5]"
    return found


@pytest.mark.parametrize("key", numeric())
def test_no_odd_number_is_taken_and_each_is_refused_in_one_line_that_names_the_key(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for odd in ODD:
        lines = [
            "" if key == "steps" else "steps = 2",
            'task = "walks"',
            "finetune.epochs = 1",
            'algorithm.name = "ppo"',
            "batch.max_prompt_tokens = 8",
        ]
        lines = [line for line in lines if not line.startswith(f"{key} ")]
        path.write_text("\n".join([*lines, f"{key} = {numeric()[key].format(odd)}"]))
        with pytest.raises(ValueError, match=re.escape(key)) as caught:
            load(path)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300, caught.value


def test_all_keys_that_take_numbers_are_looked_at() -> None:
    assert len(numeric()) > 90
    assert {
        "seed",
        "policy.betas",
        "cluster.peer_timeout_s",
        "finetune.learner.ranks",
        "shaping.eos_penalty",
        "algorithm.lam",
    } <= numeric().keys()


def test_the_longest_time_out_is_one_that_the_operating_system_takes() -> None:
    """`poll`, by which much is waited for, counts milliseconds in 31 bits: it takes no more than 2,147,483 s."""
    fields = [*ClusterConfig.model_fields.items(), *RewardConfig.model_fields.items()]
    longest = {
        max(rule.le for rule in field.metadata if hasattr(rule, "le"))
        for name, field in fields
        if name.endswith("timeout_s")
    }
    assert longest == {1_000_000}
    ready = select.poll()
    ready.register(os.open(os.devnull, os.O_RDONLY))
    assert ready.poll(1000 * 1_000_000)
    with pytest.raises(OverflowError):
        ready.poll(1000 * 2_200_000)


def test_the_largest_seed_is_one_that_every_generator_takes(tmp_path: Path) -> None:
    import torch

    largest = recipe(tmp_path, f"{MINIMAL}seed = {2**64 - 1}\n").seed
    torch.Generator().manual_seed(largest)
    np.random.Philox(largest)
    np.random.Philox(np.random.SeedSequence([largest, 0]))
    with pytest.raises((RuntimeError, ValueError)):
        torch.Generator().manual_seed(largest + 1)


def test_every_prompt_that_a_run_may_draw_has_a_number_below_those_of_evaluation(tmp_path: Path) -> None:
    from pipeline.evaluation.evaluate import _BEYOND

    assert GROUPS == _BEYOND
    with pytest.raises(
        ValueError,
        match=r"^steps: must be <= 137,438, got 137439; with batch.prompts and batch.max_refills it comes to more "
        r"prompts",
    ):
        recipe(tmp_path, f"{MINIMAL.replace('2', '137_439')}batch.prompts = 1_000_000\n")


def test_every_path_of_a_recipe_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    text = (
        'task = "files"\nsteps = 1\nfinetune.epochs = 1\n[model]\npath = "~/m"\n[reward]\nmodel = "~/judge"\n[data]\n'
    )
    config = recipe(
        tmp_path,
        text + "".join(f'{kind} = "~/{kind}.jsonl"\n' for kind in ("comparisons", "demonstrations", "prompts")),
    )
    paths = [
        config.model.path,
        config.reward.model,
        config.data.comparisons,
        config.data.demonstrations,
        config.data.prompts,
    ]
    assert paths == [
        f"/home/ada/{name}" for name in ("m", "judge", "comparisons.jsonl", "demonstrations.jsonl", "prompts.jsonl")
    ]
    config_of_walks = override(load(recipe_path("walks")), ["--model.path=~/m"], "raylign plan walks")
    assert config_of_walks.model.path == "/home/ada/m"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load(tmp_path / "mine.toml") == recipe(tmp_path, MINIMAL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\x02\x01\xff\x00", "must be TOML: byte 7 is not UTF-8; save it as text in UTF-8"),
        ("steps = [".encode("utf-16"), "must be TOML: byte 1 is not UTF-8"),
        (b"steps = 1" + b"0" * 5000, "must be TOML: Exceeds the limit (4300 digits) for integer string conversion"),
        (b"steps = " + b"[" * 5000, "must be TOML: maximum recursion depth exceeded"),
        (None, "must be a file that can be read: Is a directory"),
    ],
    ids=["binary", "UTF-16", "digits", "depth", "folder"],
)
def test_a_recipe_that_cannot_be_read_is_told_in_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}") as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^recipe: must be a TOML file or one of .*, got '{tmp_path}', a folder$"):
        recipe_path(str(tmp_path))
    (tmp_path / "config.toml").touch()
    with pytest.raises(ValueError, match=r"the folder of a run, which `raylign resume` goes on with$"):
        recipe_path(str(tmp_path))
