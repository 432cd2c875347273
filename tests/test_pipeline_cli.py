"""The command line, through its real entry point, from a folder of the user's: what it says, its exit codes, and what
it does not start.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from entry_point import NOWHERE, ROOT, raylign, raylign_afresh, raylign_warm
from pipeline.arguments.parsing import parse
from pipeline.config.recipe import save
from readme_example import readme_example

RECIPES = ", ".join(sorted(path.stem for path in (ROOT / "pipeline" / "recipes").glob("*.toml")))
HEAVY = {"torch", "ray", "deepspeed", "transformers"}


def test_help_comes_at_once(tmp_path: Path) -> None:
    """In 0.05 s on two idle cores, since none of the heavy packages is imported."""
    for flag in ("--help", "-h"):
        said = raylign_afresh(flag, cwd=tmp_path)
        assert said.code == 0
        assert said.err == ""
        for word in (
            "raylign quickstart",
            "raylign run RECIPE",
            "raylign plan RECIPE",
            "--run-dir DIR",
            f"recipes: {RECIPES}",
        ):
            assert word in said.out
        assert not {"pydantic", "tyro", "rich", *HEAVY} & said.imported


def test_no_command_is_a_mistake_that_gets_the_help(tmp_path: Path) -> None:
    said = raylign(cwd=tmp_path)
    assert said.code == 2
    assert "raylign run RECIPE" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fly"],
            "command: must be quickstart, run, sft, reward, train, plan, init, submit, push, resume, ledger, replay, "
            "chat or evaluate, got 'fly'; see raylign --help",
        ),
        (["train"], f"recipe: `raylign train` needs one, a TOML file or one of {RECIPES}"),
        (["plan", "--steps", "3"], f"recipe: `raylign plan` needs one, a TOML file or one of {RECIPES}"),
        (["train", "walk"], f"recipe: must be a TOML file or one of {RECIPES.split(', ')}, got 'walk'"),
        (["plan", "torn.toml"], "torn.toml: must be TOML: Invalid value (at end of document)"),
        (
            ["plan", "odd.toml"],
            "odd.toml: steps: input should be greater than or equal to 1, got 0\nmodle: unknown key; did you mean "
            "model?\n",
        ),
        (
            ["plan", "walks", "--sampling.top-k", "3"],
            "sampling: top_k must be 0 and top_p 1 in training, got 3 and 1.0",
        ),
        (
            ["plan", "walks", "--algorithm.name", "grpq"],
            "walks.toml: algorithm.name: must be one of 'ppo', 'reinforce', 'reinforce_baseline', 'a2c', 'rloo', "
            "'grpo', 'reinforce_pp', or the import path of your own, package.module:name, got 'grpq'",
        ),
        (["evaluate"], "TARGET: `raylign evaluate` needs one, the folder of a run or a recipe"),
        (
            ["evaluate", "walks", "--baseline", "gpt2"],
            "--policy: must be given, since a recipe has none; name the folder of a causal language model",
        ),
        (
            ["plan", "walks", "--task", "chess"],
            "task: must be one of smalltalk, twenty-questions, walks, world, world-conversations, world-options, files "
            "or an import path package.module:name, got 'chess'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_screen_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "torn.toml").write_text("steps = [")
    (tmp_path / "odd.toml").write_text('task = "walks"\nsteps = 0\n[modle]\npath = "gpt2"\n')
    said = raylign(*arguments, cwd=tmp_path)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("raylign: ")
    assert message in said.err
    assert "Traceback" not in said.err
    assert not HEAVY & said.imported


def test_an_unknown_override_suggests_the_right_key(tmp_path: Path) -> None:
    said = raylign("plan", "walks", "--batch.promts", "3", cwd=tmp_path)
    assert said.code == 2
    assert "Unrecognized options: --batch.promts" in said.err
    assert "Perhaps you meant:" in said.err
    assert "--batch.prompts INT" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "many"], ["--steps", "invalid literal for int() with base 10: 'many'"]),
        (["--steps", "0"], ["raylign: steps: input should be greater than or equal to 1, got 0\n"]),
        (["--algorithm.lam", "2"], ["raylign: algorithm.lam: input should be less than or equal to 1, got 2.0\n"]),
        (["--policy.zero-stage", "4"], ["--policy.zero-stage", "invalid choice", "'4'", "'3')"]),
        (
            ["--cluster.share-devices", "maybe"],
            ["--cluster.share-devices", "invalid choice", "'maybe'", "('true', 'false')"],
        ),
        (["--algorithm.name", "reinforce", "--algorithm.lam", "1"], ["Unrecognized options: --algorithm.lam"]),
        (["--run-dir"], ["raylign plan walks", "--run-dir: expected one argument"]),
        (["walks"], ["Unrecognized options: walks"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_override_is_named(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    said = raylign("plan", "walks", *arguments, cwd=tmp_path)
    assert said.code == 2
    for word in words:
        assert word in said.err
    assert "Traceback" not in said.err


def test_plan_prints_what_would_run_and_starts_nothing(tmp_path: Path) -> None:
    said = raylign_afresh("plan", "walks", cwd=tmp_path)
    assert said.code == 0
    assert said.err == ""
    for process in ("policy[0]", "rollout[0]", "reward[0]", "critic[0]"):
        assert process in said.out
    assert "a step: 100 prompts x 1 = 100 rollouts of at most 1 + 9 tokens," in said.out
    assert HEAVY & said.imported == {"torch", "transformers"}, "neither Ray nor DeepSpeed"
    assert list(tmp_path.iterdir()) == []


def test_overrides_are_spelled_as_in_a_recipe(tmp_path: Path) -> None:
    """Dashes or underscores, a space or an equals sign; booleans as in TOML, which leaves a text `true` as it is."""
    said = raylign_warm(
        "plan",
        "walks",
        "--cluster.share-devices=false",
        "--cluster.cpus_per_bundle",
        "1",
        "--batch.prompts=7",
        "--run-dir",
        "x",
        cwd=tmp_path,
    )
    assert said.code == 0
    assert "needs 4 bundle(s): 1 CPU, 1 CPU, 1 CPU, 1 CPU;" in said.out
    assert "7 prompts x 1" in said.out
    shared = raylign_warm(
        "plan",
        "walks",
        "--cluster.share-devices",
        "true",
        "--cluster.cpus-per-bundle",
        "2",
        "--sampling.stop",
        "true",
        "x",
        cwd=tmp_path,
    )
    assert "needs 1 bundle(s): 2 CPUs;" in shared.out


def test_another_algorithm_by_its_name(tmp_path: Path) -> None:
    said = raylign_warm("plan", "walks", "--algorithm.name", "reinforce", "--algorithm.kl-coef", "0.1", cwd=tmp_path)
    assert said.code == 0
    assert "critic[0]" not in said.out
    assert "reference[0]" in said.out


def test_an_algorithm_of_ones_own_has_its_settings_in_help_overrides_and_config_toml(tmp_path: Path) -> None:
    (tmp_path / "my_algorithms.py").write_text(readme_example())
    (tmp_path / "mine.toml").write_text(
        'task = "walks"\nsteps = 1\nbatch.group_size = 2\nmodel.path = "gpt2"\n'
        '[algorithm]\nname = "my_algorithms:Raft"\nmargin = 0.5\n'
    )
    (tmp_path / "elsewhere").mkdir()
    said = raylign("run", "../mine.toml", "--help", cwd=tmp_path / "elsewhere")
    assert said.code == 0 and not HEAVY & said.imported
    shown = " ".join(said.out.replace("│", " ").split())
    assert (
        "--algorithm.margin FLOAT How far above the mean a sample must be to be imitated, in standard deviations of "
        "its group. (default: 0.5)" in shown
    )
    assert "--algorithm.name STR" in shown and "(default: my_algorithms:Raft)" in shown
    assert "--algorithm.clip-low" not in shown
    config = parse(
        ["plan", str(tmp_path / "mine.toml"), "--algorithm.margin", "3", "--algorithm.kl-coef", "0.1"]
    ).config
    save(config, tmp_path / "config.toml")
    again = parse(["plan", str(tmp_path / "config.toml")]).config
    assert again == config
    assert again.algorithm.model_dump().items() >= {"name": "my_algorithms:Raft", "margin": 3.0, "kl_coef": 0.1}.items()


def test_an_override_may_give_what_another_algorithm_asks_for(tmp_path: Path) -> None:
    """The recipe's groups of one are not judged before they are overridden; left as they are, they are refused."""
    said = raylign_warm("plan", "walks", "--algorithm.name", "grpo", "--batch.group-size", "4", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert "100 prompts x 4" in said.out
    for overrides in ([], ["--batch.prompts", "9"]):
        refused = raylign_warm("plan", "walks", "--algorithm.name", "grpo", *overrides, cwd=tmp_path)
        assert refused.code == 2
        assert "batch.group_size: must be >= 2 for algorithm 'grpo', got 1" in refused.err


def test_a_recipe_of_ones_own_with_a_reward_from_the_folder_one_stands_in(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'task = "walks"\nsteps = 3\n[finetune]\nepochs = 1\n[reward]\nfunction = "my_reward:length"\n'
    )
    (tmp_path / "my_reward.py").write_text(
        "def length(prompts, responses, metadata):\n    return [len(r) for r in responses]\n"
    )
    said = raylign_warm("plan", "mine.toml", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert re.search(r"^a run:  3 steps", said.out, re.MULTILINE)


def test_the_installed_command_looks_there_too(tmp_path: Path) -> None:
    """A console script has its own folder first on its path, not the one it is called from."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (there / "raylign").write_text("import sys\nfrom pipeline.cli import main\nsys.exit(main())\n")
    (here / "my_reward.py").write_text("def zero(prompts, responses, metadata):\n    return [0.0] * len(responses)\n")
    command = [sys.executable, str(there / "raylign"), "plan", "walks", "--reward.function", "my_reward:zero"]
    done = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_of_a_command(tmp_path: Path) -> None:
    for name, words in {
        "train": ("usage: raylign train RECIPE [--run-dir DIR]", "default runs/<recipe>-<time>"),
        "resume": ("usage: raylign resume RUN_DIR", "--allow-change KEY"),
        "ledger": ("usage: raylign ledger RUN_DIR\n",),
        "replay": ("usage: raylign replay RUN_DIR --step N\n", "which step"),
        "evaluate": ("usage: raylign evaluate RUN_DIR|RECIPE", "--baseline DIR", "--reward-model DIR"),
        "plan": ("usage: raylign plan RECIPE", "starts nothing"),
        "init": ("usage: raylign init DIR\n", "new or empty folder"),
        "push": ("usage: raylign push RUN_DIR owner/name [--public]", "HF_TOKEN"),
    }.items():
        said = raylign(name, "-h", cwd=tmp_path)
        assert (said.code, said.err) == (0, "")
        for word in words:
            assert word in said.out
    assert raylign("replay", "nowhere", "--help", cwd=tmp_path).out == raylign("replay", "--help", cwd=tmp_path).out
    settings = raylign("train", "walks", "--help", cwd=tmp_path)
    assert settings.code == 0
    assert "usage: raylign train walks" in settings.out
    assert re.search(r"--batch\.prompts INT\s+│?\s+│?\s+Prompts \(groups\) of a step\. \(default: 100\)", settings.out)
    assert "--cluster.share-devices {true,false}" in settings.out
    assert not HEAVY & (said.imported | settings.imported)


def test_the_version(tmp_path: Path) -> None:
    said = raylign("--version", cwd=tmp_path)
    assert (said.code, said.out, said.err) == (0, f"raylign {metadata.version('raylign')}\n", "")
    assert not HEAVY & said.imported


def test_a_run_says_at_once_what_it_will_do_and_how_it_ended(tmp_path: Path) -> None:
    run_dir = tmp_path / "my run"
    said = raylign_warm("train", "walks", "--steps", "7", "--run-dir", str(run_dir), *NOWHERE, cwd=tmp_path)
    assert said.code == 1
    assert said.out.startswith(f"raylign train walks: fine-tuning, reinforcement learning (7 steps) -> {run_dir}\n")
    assert said.err.endswith(f"\nNothing was finished or committed yet. To begin again: raylign resume '{run_dir}'\n")


def test_help_into_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    line = f'"{sys.executable}" -m pipeline --help | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "function"), [("plan", "nowhere:reward"), ("plan", "math:no_such_thing"), ("train", "nowhere:reward")]
)
def test_a_reward_function_that_cannot_be_imported_is_refused_before_anything_starts(
    command: str, function: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    said = raylign_warm(
        command, "walks", "--reward.function", function, "--run-dir", str(run_dir), *NOWHERE, cwd=tmp_path
    )
    assert said.code == 2
    assert said.err.startswith(
        f"raylign: reward.function: must be {'importable' if 'nowhere' in function else 'callable'}, got '{function}'"
    )
    assert "ray" not in said.imported
    assert not run_dir.exists()


def test_a_run_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "run" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    said = raylign_warm("train", "walks", "--run-dir", "run", *NOWHERE, cwd=tmp_path)
    assert said.code == 2
    assert (
        said.err
        == f"raylign: --run-dir: must be new or empty, or the folder of a run, got {tmp_path / 'run'}; choose another, "
        "nothing in it was touched\n"
    )
    assert "ray" not in said.imported
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [("notes.txt", "mine")]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_in_the_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    said = raylign_warm("train", "walks", "--run-dir", "run", *NOWHERE, cwd=tmp_path)
    assert said.code == 2
    assert said.err.startswith(f"raylign: --run-dir: must be a folder that can be written, got {tmp_path / 'run'}")
    assert "ray" not in said.imported


@pytest.mark.parametrize(
    ("run_dir", "got"), [(["--run-dir", "runs/mine"], "runs/mine"), ([], "none")], ids=["relative", "default"]
)
def test_in_a_ray_job_the_run_folder_must_be_absolute(run_dir: list[str], got: str, tmp_path: Path) -> None:
    """A job's working directory is Ray's own copy, which goes when the job goes."""
    said = raylign("train", "walks", *run_dir, *NOWHERE, cwd=tmp_path, **{RAY_JOB_CONFIG_JSON_ENV_VAR: "{}"})
    assert said.code == 2
    message = (
        f"--run-dir: must be an absolute path in a Ray job, got {got}; a relative one would lie in Ray's own package "
        "folder"
    )
    assert said.err == f"raylign: {message}\n"
    assert not HEAVY & said.imported
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_exits_with_1_and_names_who_and_when(tmp_path: Path) -> None:
    """An absolute run folder is taken in a Ray job; what fails here is the cluster, which is not there."""
    said = raylign_warm(
        "train",
        "walks",
        "--run-dir",
        str(tmp_path / "run"),
        *NOWHERE,
        cwd=tmp_path,
        **{RAY_JOB_CONFIG_JSON_ENV_VAR: "{}"},
    )
    assert said.code == 1
    assert re.match(r"raylign: driver failed during 'connecting to the Ray cluster at 127\.0\.0\.1:1': ", said.err)
    assert "Traceback" not in said.err
    assert (tmp_path / "run" / "config.toml").exists()


def test_a_home_is_written_out_where_the_shell_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands `~` at the beginning of a word alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text('task = "walks"\nsteps = 3\n[finetune]\nepochs = 1\n')
    command = parse(["plan", "~/mine.toml", "--run-dir=~/run", "--model.path=~/m"])
    assert (command.run_dir, command.config.model.path) == (tmp_path / "run", str(tmp_path / "m"))
    comparison = parse(
        ["evaluate", "walks", "--policy=~/p", "--baseline=~/b", "--reward-model=~/r", "--out=~/out"]
    ).comparison
    assert comparison is not None
    assert [comparison.policy, comparison.baseline, comparison.reward_model, str(comparison.out)] == [
        str(tmp_path / name) for name in ("p", "b", "r", "out")
    ]
    with pytest.raises(
        ValueError, match=rf"^RUN_DIR: must be the folder of a run, got {tmp_path}/nowhere, which has no config.toml"
    ):
        parse(["resume", "~/nowhere"])


def test_a_parsed_command_is_checked() -> None:
    command = parse(["train", "walks", "--steps", "7", "--run-dir", "here", "--policy.betas", "0.5", "0.75"])
    assert (command.name, command.recipe, command.run_dir) == ("train", "walks", Path("here"))
    assert (command.config.steps, command.config.policy.betas, command.config.batch.prompts) == (7, (0.5, 0.75), 100)
    with pytest.raises(ValueError, match=r"^sampling: top_k must be 0 and top_p 1 in training, got 3 and 1\.0"):
        parse(["train", "walks", "--sampling.top-k", "3"])
