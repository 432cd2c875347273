"""A run's configuration: what recipes may say, what is refused and in which words, and that every key is read by
somebody.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import Config
from pipeline.algorithms import registry
from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.config.recipe import load, recipe_path, save
from pipeline.config.rules import check
from pipeline.config.run_config import RunConfig, leaves

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "pipeline" / "recipes").glob("*.toml"))
ALGORITHMS = (
    "'ppo', 'reinforce', 'reinforce_baseline', 'a2c', 'rloo', 'grpo', 'reinforce_pp', or the import path of your own, "
    "package.module:name"
)
MINIMAL = 'task = "walks"\nsteps = 2\nmodel.path = "gpt2"\n'


def classes(model: type[Config] = RunConfig) -> set[type[Config]]:
    """Every configuration class a run can hold."""
    found = {model, *registry.ALGORITHMS.values()}
    for field in model.model_fields.values():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            found |= classes(kind)
    return found


def recipe(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def changed(**updates: Any) -> RunConfig:
    """The walks recipe with other sections, unchecked."""
    config = load(recipe_path("walks"))
    for section, fields in updates.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})
    return config


def keys(table: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        k
        for name, value in table.items()
        for k in (keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    ]


# What comes with the package.


def test_the_bundled_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"lm-human-preferences", "quickstart", "walks"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_bundled_recipe_loads_and_has_at_most_25_keys(path: Path) -> None:
    config = load(path)
    given = keys(tomllib.loads(path.read_text()))
    assert len(given) <= 25
    assert set(given) <= set(leaves(RunConfig))
    assert recipe_path(path.stem) == path
    assert recipe_path(str(path)) == path
    assert check(config) is config


def test_lm_human_preferences_has_the_documented_details() -> None:
    """By their numbers in Huang et al. 2023. What each key does is held where the key is read."""
    config = load(recipe_path("lm-human-preferences"))
    algorithm, shaping, sampling = config.algorithm, config.shaping, config.sampling
    assert isinstance(algorithm, PPO)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 0, 1.0)  # 3, 4
    assert (shaping.missing_eos, shaping.eos_penalty, sampling.stop) == ("replace", -1.0, (".",))  # 6
    assert (shaping.whiten, algorithm.whiten_advantages) == ("scale", True)  # 7
    # 9
    assert (config.batch.epochs, algorithm.clip_low, algorithm.clip_high, algorithm.value_clip) == (
        4,
        0.2,
        0.2,
        0.2,
    )
    # 9
    assert all(
        (learner.adam_epsilon, learner.schedule) == (1e-5, "linear") for learner in (config.policy, config.critic)
    )
    # 10
    assert (algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon, algorithm.kl_in, algorithm.kl_estimator) == (
        0.15,
        6.0,
        10_000,
        "reward",
        "k1",
    )
    assert (algorithm.gamma, algorithm.lam) == (1.0, 0.95)
    assert config.batch.samples * config.steps // 10_000 == 99  # a million episodes
    assert (algorithm.needs_critic, algorithm.needs_reference, algorithm.needs_proximal) == (True, True, False)


def test_an_unknown_recipe_is_told_which_there_are() -> None:
    names = re.escape(str(sorted(path.stem for path in RECIPES)))
    with pytest.raises(ValueError, match=rf"^recipe: must be a TOML file or one of {names}, got 'walk'$"):
        recipe_path("walk")


def test_two_keys_and_a_model_are_enough(tmp_path: Path) -> None:
    config = recipe(tmp_path, MINIMAL)
    assert (config.task, config.steps, config.seed, config.algorithm) == ("walks", 2, 0, PPO())


# Classes and keys.


@pytest.mark.parametrize("kind", sorted(classes(), key=str))
def test_every_class_and_every_key_is_described(kind: type[Config]) -> None:
    """The description is the docstring under the field, and what `--help` prints; a section has that of its class."""
    assert kind.__doc__
    assert kind.__doc__.strip().endswith(".")
    here = {key for key in leaves(kind) if "." not in key}
    for name in here:
        assert (kind.model_fields[name].description or "").strip().endswith("."), f"{kind.__name__}.{name}"
    assert here


def test_a_configuration_does_not_change() -> None:
    config = load(recipe_path("walks"))
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3


def test_the_leaves_are_every_key_once_a_section() -> None:
    found = leaves(RunConfig)
    assert {"task", "seed", "finetune.learner.zero_stage", "algorithm.clip_low", "cluster.share_devices"} <= set(found)
    assert not {"model", "algorithm", "finetune.learner"} & set(found)


SOURCES = [
    path
    for floor in ("cluster", "actors", "pipeline")
    for path in (ROOT / floor).rglob("*.py")
    if path.name != "config.py"
]


def readings(source: str) -> set[tuple[str, str]]:
    """(owner, attribute) of every attribute that is read: `self.config.batch.epochs` gives (batch, epochs) among
    others.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            found.add((name.removeprefix("_"), node.attr))
    return found


def unread(model: type[Config], sources: list[str], algorithms: list[str]) -> list[str]:
    """Keys that no code reads from something called after their section, or plainly `config`; an algorithm reads its
    own from `self`.
    """
    everywhere = set().union(*(readings(source) for source in sources))
    own = {attribute for source in algorithms for owner, attribute in readings(source) if owner == "self"}
    lost = []
    for key in leaves(model):
        section, _, leaf = key.rpartition(".")
        owners = {section.rpartition(".")[2], "config", "check"} | (
            {"learner"} if section in ("policy", "critic") else set()
        )
        if not any((owner, leaf) in everywhere for owner in owners) and not (section == "algorithm" and leaf in own):
            lost.append(key)
    return lost


def test_every_key_is_read_by_code() -> None:
    algorithms = [path.read_text() for path in SOURCES if path.parent.name == "algorithms"]
    lost = unread(RunConfig, [path.read_text() for path in SOURCES], algorithms)
    assert lost == []


def test_a_key_that_nobody_reads_would_be_noticed() -> None:
    class Batch(Config):
        prompts: int = 1
        forgotten: int = 1

    class Run(Config):
        steps: int = 1
        batch: Batch = Batch()

    source = (
        "def f(config, other):\n    config.forgotten = 3\n    return config.steps + config.batch.prompts + "
        "other.forgotten"
    )
    assert unread(Run, [source], []) == ["batch.forgotten"]


# What a recipe may not say.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[batch]\npromts = 3", "batch.promts: unknown key; did you mean batch.prompts?"),
        ("[rolout]\nworkers = 2", "rolout: unknown key; did you mean rollout?"),
        ("[policy]\nlearning_rates = 1", "policy.learning_rates: unknown key; did you mean policy.learning_rate?"),
        ("[finetune.lerner]\nranks = 1", "finetune.lerner: unknown key; did you mean finetune.learner?"),
        ("[model]\nmax_new_tokens = 9", "model.max_new_tokens: unknown key; did you mean sampling.max_new_tokens?"),
        ('[algorithm]\nname = "ppo"\nlamb = 1', "algorithm.lamb: unknown key; did you mean algorithm.lam?"),
        ('[algorithm]\nname = "reinforce"\nlam = 1', "algorithm.lam: unknown key; another algorithm has it"),
        ("qqqqqqqq = 1", "qqqqqqqq: unknown key"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/mine.toml: {message}')}$"):
        recipe(tmp_path, f'task = "walks"\nsteps = 2\n{text}\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1.5", "seed: input should be a valid integer, got a number with a fractional part, got 1.5"),
        ('seed = "many"', "seed: input should be a valid integer, unable to parse string as an integer, got 'many'"),
        ("batch = 3", "batch: input should be a valid dictionary or instance of BatchConfig, got 3"),
        ("[batch]\nprompts = 0", "batch.prompts: input should be greater than or equal to 1, got 0"),
        ("[policy]\nzero_stage = 4", "policy.zero_stage: input should be 0, 1, 2 or 3, got 4"),
        (
            "[policy]\nlearning_rate = nan",
            "policy.learning_rate: must be a finite number, got nan; where it is a limit, give a large one",
        ),
        ("[finetune.learner]\nranks = 0", "finetune.learner.ranks: input should be greater than or equal to 1, got 0"),
        (
            '[rollout]\ndtype = "float16"',
            "rollout.dtype: input should be 'float32', 'bfloat16' or 'auto', got 'float16'",
        ),
        ("[rollout]\nslots = 12", "rollout.slots: input should be a multiple of 8, got 12"),
        ('[sampling]\nstop = "a"', "sampling.stop: input should be a valid tuple, got 'a'"),
        (
            "[cluster]\nshare_devices = 3",
            "cluster.share_devices: input should be a valid boolean, unable to interpret input, got 3",
        ),
        ('[algorithm]\nname = "grpq"', f"algorithm.name: must be one of {ALGORITHMS}, got 'grpq'"),
        ("[algorithm]\nlam = 1", "algorithm.name: must be given"),
        ("[algorithm]\nname = 3", "algorithm.name: input should be a valid string, got 3"),
        ("algorithm = 3", "algorithm: input should be a valid dictionary or instance of Algorithm, got 3"),
        ('[algorithm]\nname = "ppo"\nlam = 2', "algorithm.lam: input should be less than or equal to 1, got 2"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/mine.toml: {message}')}$"):
        recipe(tmp_path, f"{MINIMAL}{text}\n")


@pytest.mark.parametrize("stop", [[""], ["\n", ""]])
def test_an_empty_stop_string_is_refused(stop: list[str], tmp_path: Path) -> None:
    message = f"sampling.stop: must have no empty string, got {stop}; every reply would end after one token"
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(tmp_path, f"{MINIMAL}[sampling]\nstop = {json.dumps(stop)}\n")


def test_every_fault_has_a_line_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine") as caught:
        recipe(tmp_path, 'task = "walks"\n[batch]\nprompts = 0\npromts = 3\n')
    assert str(caught.value).split(": ", 1)[1].splitlines() == [
        "steps: must be given",
        "batch.prompts: input should be greater than or equal to 1, got 0",
        "batch.promts: unknown key; did you mean batch.prompts?",
    ]


@pytest.mark.parametrize(
    "text", [b"steps = [", b"steps = 1\nsteps = 2", b"task = 'caf\xe9'"], ids=["syntax", "doubled", "encoding"]
)
def test_what_is_not_toml_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"^{path}: must be TOML: "):
        load(path)


# Fields that do not go together.


class Grouped(PPO):
    """An algorithm that compares the samples of one prompt."""

    @property
    def min_group_size(self) -> int:
        return 2


RULES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "a controller that could switch itself off": (
        {
            "algorithm": {"kl_target": 6.0, "kl_coef": 0.2, "kl_horizon": 100},
            "batch": {"prompts": 128, "group_size": 4},
        },
        "algorithm.kl_horizon: must be above batch.prompts * batch.group_size / 5 = 102.4, got 100; "
        "the controller could take kl_coef to 0 in one step, so raise it or lower batch.prompts",
    ),
    "more minibatches than samples": (
        {"batch": {"prompts": 3, "group_size": 2, "minibatches": 7}},
        "batch.minibatches: must be <= batch.prompts * batch.group_size = 6, got 7; lower it or raise batch.prompts",
    ),
    "no variance among one": (
        {"batch": {"dynamic_sampling": True}},
        "batch.group_size: must be >= 2 when batch.dynamic_sampling is true, got 1; one sample has no variance",
    ),
    "a group that is split": (
        {"batch": {"group_size": 9}, "rollout": {"chunk_size": 8}},
        "rollout.chunk_size: must be >= batch.group_size = 9, got 8; a group is never split",
    ),
    "more workers at the start than ever": (
        {"rollout": {"workers": 2, "min_workers": 3}},
        "rollout.min_workers: must be <= rollout.workers = 2, got 3; the run would wait for workers that it never asks "
        "for",
    ),
    "two rewards": (
        {"reward": {"function": "mine:f", "model": "folder"}},
        "reward: must have a function or a model, got both ('mine:f', 'folder'); remove one",
    ),
    "a target without a penalty": (
        {"algorithm": {"kl_target": 6.0}},
        "algorithm.kl_coef: must be > 0 when algorithm.kl_target is 6, got 0; the controller multiplies it, so give it "
        "a start value, or remove kl_target",
    ),
    "a penalty for more tokens than there are": (
        {"shaping": {"overlong_tokens": 10}},
        "shaping.overlong_tokens: must be <= sampling.max_new_tokens = 9, got 10; they are the last ones of a "
        "completion, so lower it",
    ),
    "a cap without weights": (
        {"algorithm": {"importance_cap": 2.0}},
        "algorithm.decoupled: must be true when algorithm.importance_cap is 2, got false; "
        "the cap limits the decoupled objective's weights, so set it, or remove importance_cap",
    ),
    "top-k": (
        {"sampling": {"top_k": 5}},
        "sampling: top_k must be 0 and top_p 1 in training, got 5 and 1.0; the learner could not recompute the "
        "log-probs of a cut-off distribution",
    ),
    "top-p": (
        {"sampling": {"top_p": 0.9}},
        "sampling: top_k must be 0 and top_p 1 in training, got 0 and 0.9; the learner could not recompute the "
        "log-probs of a cut-off distribution",
    ),
    "greedy": (
        {"sampling": {"temperature": 0.0}},
        "sampling.temperature: must be > 0 in training, got 0.0; greedy samples carry no gradient",
    ),
    "a width that heads do not divide": (
        {"model": {"width": 65, "heads": 2}},
        "model.width: must be a multiple of model.heads, got 65 and 2; use 64",
    ),
    "a width less than heads": (
        {"model": {"width": 8, "heads": 12}},
        "model.width: must be a multiple of model.heads, got 8 and 12; use 12",
    ),
    "a context too short": (
        {"batch": {"max_prompt_tokens": 8}},
        "model.context: must be >= batch.max_prompt_tokens + sampling.max_new_tokens = 17, got 16; raise it or shorten "
        "one of them",
    ),
    "an examiner on two GPUs": (
        {"evaluation": {"gpus": 2.0}},
        "evaluation.gpus: must be at most 1, got 2; a process computes on one device, so use more ranks or workers",
    ),
    "a model that knows nothing": (
        {"finetune": {"epochs": 0}},
        "finetune.epochs: must be >= 1 when model.path is empty, got 0; a new model knows no text, so give model.path "
        "or fine-tune first",
    ),
    "two reward models": (
        {"reward_model": {"epochs": 1}, "reward": {"model": "judge"}},
        "reward.model: must be left out when reward_model.epochs is 1, got 'judge'; a run has one reward model",
    ),
}


GPUS = ("rollout", "reward", "reference", "policy", "critic", "evaluation", "finetune.learner", "reward_model.learner")


def test_these_are_all_sections_with_gpus() -> None:
    assert {key.removesuffix(".gpus") for key in leaves(RunConfig) if key.endswith(".gpus")} == set(GPUS)


@pytest.mark.parametrize("section", GPUS)
def test_a_process_has_one_gpu_at_most(section: str) -> None:
    message = (
        f"{section}.gpus: must be at most 1, got 2; a process computes on one device, so use more ranks or workers"
    )
    outer, _, inner = section.partition(".")
    found = getattr(changed(), outer)
    updates = {inner: getattr(found, inner).model_copy(update={"gpus": 2.0})} if inner else {"gpus": 2.0}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(changed(**{outer: updates}))


@pytest.mark.parametrize("rule", RULES)
def test_what_does_not_go_together_is_refused(rule: str) -> None:
    updates, message = RULES[rule]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(changed(**updates))


@pytest.mark.parametrize(
    "algorithm", [Reinforce(), Reinforce(decoupled=True), A2C(), PPO(mask_high=2.0), PPO(decoupled=True)]
)
def test_old_samples_are_refused_where_nothing_corrects_for_them(algorithm: Algorithm) -> None:
    config = changed().model_copy(update={"algorithm": algorithm, "max_staleness": 1})
    message = (
        f"max_staleness: must be 0 for algorithm {algorithm.name!r} as it is set, got 1; nothing corrects for samples "
        "of older weights. Set algorithm.decoupled to true and algorithm.importance_cap to 2, or take an algorithm "
        "with a clipped ratio"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(config)
    check(config.model_copy(update={"max_staleness": 0}))


def test_the_freshest_weights_need_more_than_one_version() -> None:
    with pytest.raises(ValueError, match=r"^max_staleness: must be >= 1 for schedule freshest, got 0; "):
        check(changed().model_copy(update={"schedule": "freshest"}))


@pytest.mark.parametrize(
    "algorithm", [Reinforce(decoupled=True, importance_cap=2), PPO(), GRPO(decoupled=True, importance_cap=2)]
)
def test_old_samples_are_taken_by_an_algorithm_that_corrects_for_them(algorithm: Algorithm) -> None:
    batch = changed().batch.model_copy(update={"group_size": 2})
    check(changed().model_copy(update={"algorithm": algorithm, "max_staleness": 4, "batch": batch}))


def test_an_algorithm_may_ask_for_groups() -> None:
    config = changed().model_copy(update={"algorithm": Grouped()})
    message = "batch.group_size: must be >= 2 for algorithm 'ppo', got 1; it compares samples of one prompt"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(config)
    check(config.model_copy(update={"batch": config.batch.model_copy(update={"group_size": 2})}))


@pytest.mark.parametrize(
    "updates",
    [
        {"batch": {"prompts": 3, "group_size": 2, "minibatches": 6}},
        {"batch": {"group_size": 8}, "rollout": {"chunk_size": 8}},
        {"reward": {"model": "folder"}},
        {"algorithm": {"kl_target": 6.0, "kl_coef": 0.1}},
        {"batch": {"max_prompt_tokens": 7}},
        # an existing model has its own shape
        {
            "model": {"path": "gpt2", "width": 65, "context": 8},
            "finetune": {"epochs": 0},
        },
    ],
    ids=str,
)
def test_what_just_goes_together_is_taken(updates: dict[str, dict[str, Any]]) -> None:
    check(changed(**updates))


def test_a_recipe_is_checked_as_a_whole_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sampling\.temperature: must be > 0"):
        recipe(tmp_path, f"{MINIMAL}[sampling]\ntemperature = 0\n")


# Saving, and another algorithm.

UNUSUAL = """
task = "my.package:Täsk"
steps = 3
seed = 7
[model]
path = 'C:\\models\\"mine"'
[batch]
group_size = 4
[algorithm]
name = "reinforce"
kl_coef = 1e-7
whiten_advantages = false
[sampling]
stop = ["\\n", "end\\t\\"of\\" text", "…"]
temperature = 0.1
[policy]
betas = [0.5, 0.999]
learning_rate = 3e-5
"""


@pytest.mark.parametrize(
    "text",
    [UNUSUAL, MINIMAL, *(path.read_text() for path in RECIPES)],
    ids=["unusual", "minimal", *(path.stem for path in RECIPES)],
)
def test_what_is_saved_is_the_same_run_again_with_every_default_spelled_out(text: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, text)
    save(config, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml") == config
    spelled = keys(tomllib.loads((tmp_path / "config.toml").read_text(encoding="utf-8")))
    others = {
        f"algorithm.{field}"
        for kind in registry.ALGORITHMS.values()
        for field in kind.model_fields.keys() - type(config.algorithm).model_fields.keys()
    }
    assert set(spelled) == set(leaves(RunConfig)) - others


def test_another_algorithm_keeps_the_settings_it_has_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'{MINIMAL}[algorithm]\nname = "ppo"\nkl_coef = 0.5\ngamma = 0.9\nlam = 0.5\n')
    assert load(path).algorithm == PPO(kl_coef=0.5, gamma=0.9, lam=0.5)
    assert load(path, algorithm="reinforce").algorithm == Reinforce(kl_coef=0.5, gamma=0.9)
    assert load(path, algorithm="ppo") == load(path)
    with pytest.raises(ValueError, match=rf"algorithm\.name: must be one of {ALGORITHMS}, got 'grpq'$"):
        load(path, algorithm="grpq")
