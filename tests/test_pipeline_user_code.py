"""Where a recipe's files and a user's modules are looked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from actors.config import RewardConfig
from actors.reward.worker import load_function
from cluster.imports import roots, use_roots
from cluster.storage import StoredFile
from driver_setup import config
from entry_point import raylign_afresh
from pipeline.arguments.parsing import parse
from pipeline.config.recipe import load, located, recipe_path, save
from pipeline.folder.run_folder import RunFolder
from pipeline.folder.user_code import changes_of, code_of, roots_of, told_where
from readme_example import readme_example

RECIPE = """
task = "files"
steps = 1
[data]
prompts = "{prompts}"
[model]
path = "{model}"
[reward]
function = "mine:f"
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder; the current one is another beside it."""
    for folder in ("recipes", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "recipes"


def test_a_path_is_one_of_the_recipes_folder_first_then_of_the_current_one(recipe: Path) -> None:
    here = recipe.parent / "here"
    for file in (recipe / "both.jsonl", here / "both.jsonl", here / "here.jsonl", recipe / "a-1.jsonl"):
        file.touch()
    assert located("both.jsonl", recipe) == str(recipe / "both.jsonl")
    assert located("here.jsonl", recipe) == str(here / "here.jsonl")
    assert located("a-*.jsonl", recipe) == str(recipe / "a-*.jsonl")
    assert located("../here/here.jsonl", recipe) == f"{recipe}/../here/here.jsonl"
    for other in ("owner/name", "s3://bucket/both.jsonl", "/etc/both.jsonl", "~/both.jsonl", ""):
        assert located(other, recipe) == other


def test_a_recipe_is_read_with_full_paths_and_what_is_nowhere_is_of_its_folder(recipe: Path) -> None:
    (recipe / "model").mkdir()
    (recipe / "mine.toml").write_text(RECIPE.format(prompts="missing.jsonl", model="model"))
    found = load(recipe / "mine.toml")
    assert (found.data.prompts, found.model.path) == (str(recipe / "missing.jsonl"), str(recipe / "model"))
    (recipe / "mine.toml").write_text(RECIPE.format(prompts="owner/name", model="owner/model"))
    found = load(Path("../recipes/mine.toml"))
    assert (found.data.prompts, found.model.path) == ("owner/name", "owner/model"), "of the hub"


def test_modules_are_found_beside_the_recipe_and_where_a_run_remembers(recipe: Path) -> None:
    assert roots_of(recipe / "mine.toml") == (str(recipe),)
    assert roots_of(recipe_path("walks")) == (), "the package's own have none"
    (recipe / "history.json").write_text(json.dumps([{"roots": ["/first"]}, {"roots": ["/second", "/third"]}]))
    assert roots_of(recipe / "config.toml") == ("/second", "/third")
    (recipe / "history.json").write_text("[")
    assert roots_of(recipe / "config.toml") == (str(recipe),)


def test_the_files_of_a_users_modules_are_named_and_a_change_is_told(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("cluster.imports._roots", [])
    (recipe / "rewards_of_mine.py").write_text("def f(*_):\n    return []\n")
    use_roots([str(recipe)])
    assert roots() == (str(recipe),)
    load_function("rewards_of_mine:f")
    run = config().model_copy(update={"task": "walks", "reward": RewardConfig(function="rewards_of_mine:f")})
    before = code_of(run, "pipeline.tasks.walks:optimality")
    assert {name: file.name for name, file in before.items()} == {
        "rewards_of_mine:f": str(recipe / "rewards_of_mine.py")
    }
    assert changes_of(before, before) == []
    with pytest.raises(ValueError, match=r"^no module$"), told_where(before):
        raise ValueError("no module")
    (recipe / "rewards_of_mine.py").write_text("def f(*_):\n    return [1.0]\n")
    [line] = changes_of(before, code_of(run, ""))
    assert line == (
        f"the code of rewards_of_mine:f has changed, {recipe}/rewards_of_mine.py is not what it was: the run goes on "
        "with it as it is"
    )


def test_packages_of_the_users_with_the_names_of_ours_are_not_taken_for_ours(tmp_path: Path) -> None:
    """`python -m pipeline` looks in the current folder first."""
    for name in ("actors", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not meant')")
    said = raylign_afresh("plan", "walks", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")


def test_where_a_module_was_is_told_when_it_is_gone() -> None:
    before = {"mine:f": StoredFile(name="/gone/mine.py", size=1, checksum="")}
    with (
        pytest.raises(ValueError, match=r"^no module; when the run was last started, mine:f was in /gone/mine.py$"),
        told_where(before),
    ):
        raise ValueError("no module")


def test_an_algorithm_that_is_gone_is_told_with_where_it_was(recipe: Path) -> None:
    """Already when the recipe of the run is read."""
    module = recipe / "my_algorithms.py"
    module.write_text(readme_example())
    (recipe / "mine.toml").write_text(
        'task = "walks"\nsteps = 1\nmodel.path = "gpt2"\nbatch.group_size = 2\nalgorithm.name = "my_algorithms:Raft"\n'
    )
    use_roots([str(recipe)])
    run = load(recipe / "mine.toml")
    with RunFolder.take(recipe / "run") as folder:
        save(run, folder.path / "config.toml")
        folder.begin(run, from_step=0, code=code_of(run, ""))
    assert parse(["resume", str(recipe / "run")]).config == run
    module.unlink()
    del sys.modules["my_algorithms"]
    gone = (
        r"config\.toml: algorithm\.name: must be importable, got 'my_algorithms:Raft': No module named 'my_algorithms'"
        rf"; .*; when the run was last started, my_algorithms:Raft was in {module}$"
    )
    with pytest.raises(ValueError, match=gone):
        parse(["resume", str(recipe / "run")])
