"""Which stages are done, which must be done again, and what becomes of what they had made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.config.sections import FinetuneConfig, ModelConfig, RewardModelConfig
from pipeline.folder.manifests import Chain, StageName, stages_of
from run_helpers import recipe

DATA = {"model": "m", "demonstrations": "d", "comparisons": "c", "prompts": "p", "heldout": "h"}
MADE: dict[StageName, tuple[str, ...]] = {
    "sft": ("finetuned/model.safetensors", "finetuned/config.json"),
    "reward": ("reward-model/model.safetensors", "reward-model.json"),
    "rl": ("policy/model.safetensors",),
    "evaluate": ("evaluation.json", "report.md"),
}


def whole(**changes: Any) -> RunConfig:
    return recipe(reward_model=RewardModelConfig(epochs=1), **changes)


def done(
    folder: Path, config: RunConfig | None = None, data: dict[str, str] = DATA, content: str = "as made first"
) -> list[str]:
    """Do what is left of a chain, each stage by writing its files; which stages those were."""
    chain, did = Chain(config or whole(), folder, data), []
    for stage in chain.stages:
        if chain.finished(stage) is None:
            chain.begin(stage)
            did.append(stage)
            for name in MADE[stage]:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(f"{stage} {content}")
            chain.finish(stage, {"number": 1.5}, 2.0)
    assert chain.is_finished
    return did


def test_a_recipe_names_its_stages() -> None:
    assert stages_of(whole()) == ("sft", "reward", "rl", "evaluate")
    assert stages_of(recipe()) == ("sft", "rl", "evaluate")
    assert stages_of(recipe(finetune=FinetuneConfig(epochs=0))) == ("rl", "evaluate")
    assert stages_of(whole(), until="reward") == ("sft", "reward")


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    assert done(tmp_path) == ["sft", "reward", "rl", "evaluate"]
    assert done(tmp_path) == []
    manifest = Chain(whole(), tmp_path, DATA).finished("reward")
    assert manifest is not None
    assert manifest.result == {"number": 1.5}
    assert [file.name for file in manifest.files] == ["reward-model/model.safetensors", "reward-model.json"]


@pytest.mark.parametrize(
    ("section", "change", "again"),
    [
        ("finetune", {"epochs": 7}, ["sft", "reward", "rl", "evaluate"]),
        ("reward_model", {"epochs": 7}, ["reward", "rl", "evaluate"]),
        ("policy", {"learning_rate": 0.5}, ["rl", "evaluate"]),
        ("batch", {"prompts": 8}, ["rl", "evaluate"]),
        ("evaluation", {"prompts": 7}, ["evaluate"]),
        ("sampling", {"temperature": 0.5}, ["reward", "rl", "evaluate"]),
        ("policy", {"ranks": 2, "zero_stage": 3}, []),
        ("rollout", {"workers": 3}, []),
        ("cluster", {"call_timeout_s": 7.0}, []),
    ],
)
def test_a_changed_setting_does_its_stage_again_and_all_that_come_of_it(
    section: str, change: dict[str, Any], again: list[str], tmp_path: Path
) -> None:
    done(tmp_path)
    config = whole()
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update=change)})
    assert done(tmp_path, changed, content="as made later") == again


def test_a_setting_that_a_stage_did_not_know_had_its_default(tmp_path: Path) -> None:
    """A manifest of an older release lacks a setting of the algorithm, whose value here is not the default, and another
    whose value is: the stage is done again for the first alone.
    """
    done(tmp_path)
    path = tmp_path / "stages" / "rl.json"
    manifest = json.loads(path.read_text())
    assert manifest["depends"].pop("algorithm.mask_low") == 0.0
    path.write_text(json.dumps(manifest))
    assert Chain(whole(), tmp_path, DATA).changed("rl") == ""
    assert manifest["depends"].pop("algorithm.decoupled") is True
    path.write_text(json.dumps(manifest))
    assert Chain(whole(), tmp_path, DATA).changed("rl") == "algorithm.decoupled: False -> True"


def test_what_is_at_another_path_and_the_same_does_nothing_again(tmp_path: Path) -> None:
    config, elsewhere = (
        whole().model_copy(update={"model": ModelConfig(path=path)}) for path in ("/models/a", "/models/b")
    )
    done(tmp_path, config)
    assert "model.path: /models/a -> /models/b" in Chain(elsewhere, tmp_path, DATA).changed("rl")
    chain = Chain(elsewhere, tmp_path, DATA, moved={"model.path": "/models/a"})
    assert chain.is_finished
    assert not Chain(elsewhere, tmp_path, DATA, moved={"model.path": "/models/c"}).is_finished, "another path before"
    # a later start knows the new path only, so it is written down for the stages that are not asked for, too
    Chain(elsewhere, tmp_path, DATA, until="sft", moved={"model.path": "/models/a"}).accept()
    assert Chain(elsewhere, tmp_path, DATA).is_finished


def test_what_comes_out_the_same_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    """Fine-tuning is done again because its file was damaged; to the bit the same, so nothing downstream
    has changed.
    """
    done(tmp_path)
    (tmp_path / "finetuned" / "model.safetensors").write_text("torn")
    assert "finetuned/model.safetensors has 4 bytes" in Chain(whole(), tmp_path, DATA).stale("sft")
    assert done(tmp_path) == ["sft"]


@pytest.mark.parametrize(
    ("kind", "first"),
    [("demonstrations", "sft"), ("comparisons", "reward"), ("prompts", "rl"), ("heldout", "evaluate")],
)
def test_other_data_count_as_a_change(kind: str, first: str, tmp_path: Path) -> None:
    done(tmp_path)
    assert (
        Chain(whole(), tmp_path, DATA | {kind: "other"}).stale(first)
        == f"data of the task: {kind}: {DATA[kind]} -> other"
    )
    assert done(tmp_path, data=DATA | {kind: "other"}, content="of other data")[0] == first


def test_what_was_made_before_is_moved_aside_and_not_lost(tmp_path: Path) -> None:
    done(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    config = whole()
    done(
        tmp_path,
        config.model_copy(update={"batch": config.batch.model_copy(update={"prompts": 8})}),
        content="as made later",
    )
    [rl, evaluate] = sorted((tmp_path / "superseded").iterdir())
    assert (rl.name, evaluate.name) == ("001-rl", "002-evaluate")
    assert (rl / "policy" / "model.safetensors").read_text() == "rl as made first"
    assert (rl / "checkpoints").is_dir()
    assert not (tmp_path / "checkpoints").exists()
    assert (evaluate / "report.md").exists()


def test_a_stage_under_way_goes_on_and_so_it_does_with_other_steps(tmp_path: Path) -> None:
    Chain(whole(), tmp_path, DATA).begin("rl")
    (tmp_path / "checkpoints").mkdir()
    assert Chain(whole(), tmp_path, DATA).begin("rl") == ""
    assert Chain(whole(steps=9), tmp_path, DATA).begin("rl") == ""
    assert Chain(whole(), tmp_path, DATA).begin("rl") == ""
    assert (tmp_path / "checkpoints").is_dir()


def test_more_steps_extend_what_is_finished_and_it_is_evaluated_again(tmp_path: Path) -> None:
    done(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    longer = Chain(whole(steps=9), tmp_path, DATA)
    assert (longer.finished("rl"), longer.changed("rl"), longer.is_finished) == (None, "", False)
    assert done(tmp_path, whole(steps=9), content="after more steps") == ["rl", "evaluate"]
    assert (tmp_path / "checkpoints").is_dir()
    assert [path.name for path in (tmp_path / "superseded").iterdir()] == ["001-evaluate"]


def test_other_data_that_are_allowed_leave_what_is_done_but_for_the_evaluation(tmp_path: Path) -> None:
    """Also at the start after the next, at which nothing is allowed any more."""
    done(tmp_path)
    other = DATA | {"demonstrations": "other", "prompts": "other", "heldout": "other", "model": "other"}
    chain = Chain(whole(), tmp_path, other, allowed=["data", "model"])
    assert [chain.changed(stage) for stage in ("sft", "reward", "rl")] == [""] * 3
    assert chain.changed("evaluate") == "data of the task: model: m -> other; data of the task: heldout: h -> other"
    chain.accept()
    assert done(tmp_path, data=other) == ["evaluate"]


def test_a_part_of_a_model_counts_and_one_that_was_not_recorded_then_does_not(tmp_path: Path) -> None:
    parts = DATA | {"model weights": "w", "reward model weights": "r"}
    done(tmp_path, data=parts)
    assert Chain(whole(), tmp_path, parts | {"model ends": "[2]"}).is_finished
    changed = Chain(whole(), tmp_path, parts | {"reward model weights": "other"})
    assert [stage for stage in changed.stages if changed.changed(stage)] == ["rl", "evaluate"], (
        "the reward that the recipe names trains no earlier stage"
    )
    assert (
        Chain(whole(), tmp_path, parts | {"model weights": "other"}).changed("sft")
        == "data of the task: model weights: w -> other"
    )


def test_a_lost_policy_is_made_again_from_the_checkpoints(tmp_path: Path) -> None:
    done(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "policy" / "model.safetensors").unlink()
    assert Chain(whole(), tmp_path, DATA).begin("rl") == "policy/model.safetensors is missing"
    assert (tmp_path / "checkpoints").is_dir()


def test_a_manifest_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    done(tmp_path)
    (tmp_path / "stages" / "rl.json").write_text("{")
    assert done(tmp_path) == ["rl"]
