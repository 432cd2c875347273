"""What is looked at before anything starts, where no entry point is needed to see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.session import Session
from pipeline.config.recipe import load, recipe_path
from pipeline.config.run_config import RunConfig
from pipeline.folder.run_folder import check_run_dir
from pipeline.plan.hub import check_hub, on_hub
from pipeline.plan.places import placements
from pipeline.plan.preflight import preflight
from run_helpers import recipe


def changed(name: str = "quickstart", **sections: Any) -> RunConfig:
    config = load(recipe_path(name))
    return config.model_copy(
        update={key: getattr(config, key).model_copy(update=value) for key, value in sections.items()}
    )


def test_every_stage_s_processes_have_a_place() -> None:
    """Fine-tuning, comparers, the reward model, reinforcement learning, examiners; a bundle for each of the most
    workers that stand side by side.
    """
    learner = changed().finetune.learner.model_copy(update={"ranks": 5})
    config = changed(
        finetune={"learner": learner}, rollout={"workers": 3}, evaluation={"workers": 2}, cluster={"cpus_per_bundle": 2}
    )
    seats = placements(config, ("sft", "reward", "rl", "evaluate"))
    assert {name: len(placement.bundles) for name, placement in seats.items()} == {
        "sft": 5,
        "comparisons": 3,
        "reward": 1,
        "rl": 3,
        "evaluate": 2,
    }
    assert {bundle.cpus for placement in seats.values() for bundle in placement.bundles} == {2}
    assert list(placements(config, ("evaluate",))) == ["evaluate"]


def test_cores_are_shared_as_reinforcement_learning_needs_them_in_every_stage() -> None:
    config = changed(rollout={"workers": 4}, cluster={"cpus_per_bundle": 0})
    cpus = {
        bundle.cpus
        for placement in placements(config, ("sft", "rl", "evaluate")).values()
        for bundle in placement.bundles
    }
    assert len(cpus) == 1


def test_what_is_on_the_hub_by_its_key(tmp_path: Path) -> None:
    assert on_hub(changed("gpt2-imdb-sentiment")) == {
        "model.path": "gpt2",
        "reward.model": "lvwerra/distilbert-imdb",
        "data.demonstrations": "stanfordnlp/imdb:plain_text/train",
    }
    assert on_hub(changed("gpt2-hh"))["data.comparisons"].startswith("hf://datasets/")
    assert (
        on_hub(changed("gpt2-hh", model={"path": str(tmp_path)}, data={"comparisons": str(tmp_path / "*.jsonl")})) == {}
    )


@pytest.mark.parametrize(
    ("remote", "message"),
    [
        (
            {"model.path": "nobody/m"},
            r"^model\.path: must be a folder or hub name of a causal language model, got 'nobody/m': there is no such "
            r"folder; as for the",
        ),
        (
            {"reward.model": "nobody/r"},
            r"^reward\.model: must be a folder or hub name of a sequence classifier, got 'nobody/r': there is no such "
            r"folder; as for",
        ),
        (
            {"data.prompts": "nobody/d:default/train"},
            r"^data\.prompts: must be a file here or a data set of the Hugging Face hub, got 'nobody/d:default/train': "
            r"",
        ),
        (
            {"data.prompts": "hf://datasets/nobody/d/x.jsonl"},
            r"^data\.prompts: must be a file here or a data set of the Hugging Face hub, got 'hf://datasets/nob",
        ),
        (
            {"--baseline": "nobody/b"},
            r"^--baseline: must be a folder or hub name of a causal language model, got 'nobody/b': ",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_hub_does_not_give_is_blamed_on_the_key_that_names_it(remote: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_hub(remote)


def test_of_a_critic_that_begins_as_the_judge_the_judge_is_blamed(tiny_model: Path) -> None:
    config = changed(
        "walks",
        finetune={"epochs": 0},
        model={"path": str(tiny_model)},
        reward={"model": "lost/judge"},
        critic={"start": "reward"},
    )
    with pytest.raises(
        ValueError, match=r"^reward\.model: must be a folder or hub name of a sequence classifier, got 'lost/judge'"
    ):
        preflight(config)
    assert preflight(config, fetch=False).unseen == {"reward.model": "lost/judge"}


def test_a_run_folder_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    check_run_dir(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").touch()
    with pytest.raises(
        ValueError, match=r"^--run-dir: must be new or empty, or the folder of a run, got .*used; choose another"
    ):
        check_run_dir(tmp_path / "used")
    with pytest.raises(
        ValueError, match=r"^--run-dir: must be a folder that can be written, got .*notes/run: Not a directory$"
    ):
        check_run_dir(tmp_path / "used" / "notes" / "run")
    (tmp_path / "used" / "history.json").write_text("[")
    with pytest.raises(ValueError, match=r"^RUN_DIR: its history.json must be as a run writes it"):
        check_run_dir(tmp_path / "used")


def test_what_a_joined_cluster_lacks_is_said_in_a_plan_by_stage(ray_session: Session, tmp_path: Path) -> None:
    """A cluster of one node with 16 CPUs, which this process is connected to."""
    from pipeline.plan.plan import _nodes, _on_the_cluster

    cluster = recipe().cluster.model_copy(update={"address": "127.0.0.1:6379", "cpus_per_bundle": 4})
    fits = recipe(cluster=cluster)
    assert _on_the_cluster(fits, _nodes(fits)) == [
        "the cluster at 127.0.0.1:6379 has 16 CPUs and 0 GPUs on 1 node(s): every stage fits"
    ]
    few = fits.model_copy(update={"evaluation": fits.evaluation.model_copy(update={"workers": 6})})
    assert _on_the_cluster(few, _nodes(few)) == [
        "the cluster at 127.0.0.1:6379 has 16 CPUs and 0 GPUs on 1 node(s)",
        "evaluate begins with 1 bundle of 4 CPUs; to have all its workers the cluster must provide 6 bundles of 4 CPUs",
    ]
    ranks = fits.policy.model_copy(update={"ranks": 5})
    lacks = fits.model_copy(update={"policy": ranks})
    lines = _on_the_cluster(lacks, _nodes(lacks))
    assert lines[1].startswith("rl cannot begin: 1 of 5 bundles of 4 CPUs fit no node")
    assert lines[2:] == ["unless the cluster grows within cluster.place_timeout_s = 30 s, a run stops at once"]
