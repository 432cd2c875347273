"""A run's whole configuration: typed, frozen, closed; read from a TOML recipe, overridden from the command line.

Impossible combinations are refused here, before Ray starts, each naming field, rule, value and remedy.
Torch-free and Ray-free.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import Field, ValidationError

from actors.config import CriticConfig, LearnerConfig, ReferenceConfig, RewardConfig, RolloutConfig, SamplingConfig, TrainingConfig
from cluster.config import ClusterConfig, Config
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.registry import AnyAlgorithm
from pipeline.algorithms.shaping import ShapingConfig
from pipeline.data.config import DataConfig


class ModelConfig(Config):
    """The model to align: one that exists, or the shape of a GPT-2 to train from scratch on the task's text."""

    path: str = ""
    """Hugging Face folder or hub name of a causal language model. Empty: build a new GPT-2 of the shape below and fine-tune it first."""

    layers: int = Field(default=4, ge=1)
    """Transformer blocks of a new model."""

    width: int = Field(default=128, ge=8)
    """Hidden size of a new model; a multiple of heads."""

    heads: int = Field(default=4, ge=1)
    """Attention heads of a new model."""

    context: int = Field(default=128, ge=8)
    """Longest sequence of a new model, in tokens."""

    vocabulary: int = Field(default=1024, ge=2)
    """Words of a new model's tokenizer, at most; trained on the task's text."""


class FinetuneConfig(Config):
    """Supervised fine-tuning on the task's demonstrations, before reinforcement learning."""

    epochs: int = Field(default=0, ge=0)
    """Passes over the demonstrations; 0 skips fine-tuning."""

    early_stop: bool = True
    """Stop once held-out perplexity rises and keep the weights of its lowest. False: keep the last ones, for demonstrations to be learned by heart."""

    batch_size: int = Field(default=32, ge=1)
    """Demonstrations of one optimiser step."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Optimiser steps from one checkpoint to the next, and of one sign of progress, at most: what a lost worker costs."""

    learner: TrainingConfig = TrainingConfig(learning_rate=1e-3)
    """The gang that trains."""


class RewardModelConfig(Config):
    """A reward model trained on comparisons, between fine-tuning and reinforcement learning, which then is rewarded by it."""

    epochs: int = Field(default=0, ge=0)
    """Passes over the comparisons; 0 trains no reward model."""

    early_stop: bool = True
    """Stop once the held-out loss rises and keep the weights of its lowest. False: keep the last ones."""

    batch_size: int = Field(default=32, ge=1)
    """Comparisons of one optimiser step."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Optimiser steps from one checkpoint to the next, and of one sign of progress, at most: what a lost worker costs."""

    standardise: bool = True
    """Shift and scale the reward so that over the comparisons it has mean 0 and variance 1 (Huang et al. 2023, detail 5)."""

    pairs: Literal["task", "sampled"] = "task"
    """Whose comparisons: the task's own, or of replies that the fine-tuned model samples, judged by the task's reward function (or reward.function)."""

    samples: int = Field(default=8, ge=2)
    """Replies sampled to each prompt, with pairs = "sampled"; ranked all together."""

    learner: TrainingConfig = TrainingConfig()
    """The gang that trains."""


class BatchConfig(Config):
    """What one step of the driver's loop is made of."""

    prompts: int = Field(default=64, ge=1)
    """Prompts (groups) of a step."""

    group_size: int = Field(default=1, ge=1)
    """Samples of each prompt."""

    dynamic_sampling: bool = False
    """Leave out groups whose scores are all the same, which compare to nothing, and fill the step up from fresh prompts (DAPO, Yu et al. 2025)."""

    max_refills: int = Field(default=8, ge=1)
    """Groups that may be issued to fill one step up, in multiples of the step, before the run stops."""

    epochs: int = Field(default=4, ge=1)
    """Passes over a step's experience, reshuffled each time."""

    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps of one pass."""

    max_prompt_tokens: int = Field(default=64, ge=1)
    """Longest prompt allowed, in tokens."""

    @property
    def samples(self) -> int:
        """Rollouts of a step."""
        return self.prompts * self.group_size


class EvaluationConfig(Config):
    """The comparison on held-out prompts: the policy against the model it was aligned from, and against best-of-n sampling from that model."""

    prompts: int = Field(default=128, ge=2)
    """Held-out prompts, at most."""

    samples: int = Field(default=4, ge=1)
    """Replies of the policy to each prompt; the confidence interval is over prompts."""

    best_of: int = Field(default=16, ge=1)
    """Largest n of best-of-n sampling: so many replies of the baseline to each prompt. 1 leaves best-of-n out."""

    demonstrations: int = Field(default=1024, ge=0)
    """Held-out demonstrations whose perplexity is measured, at most."""

    shown: int = Field(default=5, ge=0)
    """Pairs of replies, of policy and baseline, to print; all are saved."""

    workers: int = Field(default=1, ge=1)
    """Examiners, each of which loads one model at a time. Their number never changes what is found."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of each examiner."""


class RunConfig(Config):
    """Everything a run depends on."""

    task: str
    """Where prompts and rewards come from: `smalltalk`, `walks`, `files` (see data), or your own as `package.module:name`."""

    steps: int = Field(ge=1)
    """Steps of reinforcement learning; each ends in one new version of the policy."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random in the run."""

    commit_every: int = Field(default=10, ge=1)
    """Steps from one commit to the next: what is lost at most, and done again, when the run breaks off. The last step and a stop are committed, too."""

    keep_commits: int = Field(default=2, ge=2)
    """Commits that are kept; older ones are removed once a new one is on the disk. At least two, so that a damaged one is not the only one."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    batch: BatchConfig = BatchConfig()
    algorithm: AnyAlgorithm = PPO()
    shaping: ShapingConfig = ShapingConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    reference: ReferenceConfig = ReferenceConfig()
    policy: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()


def check(config: RunConfig) -> RunConfig:
    """The configuration, if its fields go together. Raises ValueError for a combination that no single field can judge."""
    for rule in (_number_rules, _data_rules, _reward_rules, _batch_rules, _algorithm_rules, _sampling_rules, _model_rules, _learner_rules):
        rule(config)
    return config


def _number_rules(config: RunConfig) -> None:
    for key, value in _numbers(config.model_dump()):
        if not math.isfinite(value):
            raise ValueError(f"{key}: must be a finite number, got {value}; where it is a limit, give a large one")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(key, value) of every number in a configuration."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, f"{key}.{name}" if key else name)
    elif isinstance(value, tuple):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, float):
        yield key, value


def _data_rules(config: RunConfig) -> None:
    data, template = config.data, config.data.template
    if config.task != "files":
        if data != DataConfig():
            raise ValueError(f"data: must be left out unless task is files, got settings for task {config.task!r}; such a task has its own data")
        return
    if not (data.comparisons or data.demonstrations or data.prompts):
        raise ValueError("data: must name at least one source when task is files, got none; give data.comparisons, data.demonstrations or data.prompts")
    if not (config.reward.function or config.reward.model or config.reward_model.epochs):
        raise ValueError(
            "reward: must have a function or a model when task is files, or [reward_model] epochs to train one, got none; "
            "files say nothing of how a new reply is judged"
        )
    if config.finetune.epochs and not (data.comparisons or data.demonstrations):
        raise ValueError("data.demonstrations: must be given to fine-tune, got prompts alone; give it or data.comparisons, or set finetune.epochs to 0")
    if template.kind == "plain" and data.format in ("transcript", "messages"):
        raise ValueError(f"data.template.kind: must be chat or roles for {data.format}, got plain; it has no place for whose turn it is")
    if template.kind == "chat" and not config.model.path:
        raise ValueError("data.template.kind: must be roles when model.path is empty, got chat; a new model's tokenizer has no chat template")
    names = [getattr(data.columns, name) for name in type(data.columns).model_fields]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"data.columns: must be different names, none empty, got {names}; two columns cannot have one name")


def _reward_rules(config: RunConfig) -> None:
    reward, trained = config.reward, config.reward_model
    if reward.function and reward.model:
        raise ValueError(f"reward: must have a function or a model, got both ({reward.function!r}, {reward.model!r}); remove one")
    if reward.model and trained.epochs:
        raise ValueError(f"reward.model: must be left out when reward_model.epochs is {trained.epochs}, got {reward.model!r}; a run has one reward model")
    if reward.label >= 0 and not reward.model:
        raise ValueError(f"reward.label: must be left out without reward.model, got {reward.label}; it is the number of one of that model's outputs")
    if trained.epochs and config.task == "files" and trained.pairs == "sampled" and not reward.function:
        raise ValueError("reward.function: must be given when reward_model.pairs is sampled and task is files; it says which sampled reply is better")
    if trained.epochs and config.task == "files" and trained.pairs == "task" and not config.data.comparisons:
        raise ValueError(
            "data.comparisons: must be given to train a reward model, got none; give it, or sample pairs with reward_model.pairs and reward.function"
        )


def _batch_rules(config: RunConfig) -> None:
    batch = config.batch
    if batch.minibatches > batch.samples:
        raise ValueError(
            f"batch.minibatches: must be <= batch.prompts * batch.group_size = {batch.samples}, got {batch.minibatches}; lower it or raise batch.prompts"
        )
    if batch.dynamic_sampling and batch.group_size < 2:
        raise ValueError(f"batch.group_size: must be >= 2 when batch.dynamic_sampling is true, got {batch.group_size}; one sample has no variance")
    if config.rollout.chunk_size < batch.group_size:
        raise ValueError(f"rollout.chunk_size: must be >= batch.group_size = {batch.group_size}, got {config.rollout.chunk_size}; a group is never split")


def _algorithm_rules(config: RunConfig) -> None:
    algorithm, group_size = config.algorithm, config.batch.group_size
    if group_size < algorithm.min_group_size:
        raise ValueError(
            f"batch.group_size: must be >= {algorithm.min_group_size} for algorithm {algorithm.name!r}, got {group_size}; it compares samples of one prompt"
        )
    algorithm.rules()
    overlong, longest = config.shaping.overlong_tokens, config.sampling.max_new_tokens
    if overlong > longest:
        raise ValueError(
            f"shaping.overlong_tokens: must be <= sampling.max_new_tokens = {longest}, got {overlong}; they are the last ones of a completion, so lower it"
        )


def _sampling_rules(config: RunConfig) -> None:
    sampling = config.sampling
    if sampling.top_k != 0 or sampling.top_p != 1.0:
        raise ValueError(
            f"sampling: top_k must be 0 and top_p 1 in training, got {sampling.top_k} and {sampling.top_p}; "
            "the learner could not recompute the log-probs of a cut-off distribution"
        )
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature: must be > 0 in training, got 0.0; greedy samples carry no gradient")


def _model_rules(config: RunConfig) -> None:
    model = config.model
    if not model.path:
        if model.width % model.heads:
            near = max(model.width // model.heads, 1) * model.heads
            raise ValueError(f"model.width: must be a multiple of model.heads, got {model.width} and {model.heads}; use {near}")
        needed = config.batch.max_prompt_tokens + config.sampling.max_new_tokens
        if needed > model.context:
            raise ValueError(
                f"model.context: must be >= batch.max_prompt_tokens + sampling.max_new_tokens = {needed}, got {model.context}; raise it or shorten one of them"
            )
        if config.finetune.epochs == 0:
            raise ValueError("finetune.epochs: must be >= 1 when model.path is empty, got 0; a new model knows no text, so give model.path or fine-tune first")


def _learner_rules(config: RunConfig) -> None:
    learners = {
        "policy": config.policy,
        "critic": config.critic,
        "finetune.learner": config.finetune.learner,
        "reward_model.learner": config.reward_model.learner,
    }
    for name, learner in learners.items():
        if not all(0 <= beta < 1 for beta in learner.betas):
            raise ValueError(f"{name}.betas: must be >= 0 and < 1, got {learner.betas}; they are AdamW's decay rates, such as (0.9, 0.95)")
        if learner.ranks > 1 and learner.gpus not in (0, 1):
            raise ValueError(f"{name}.gpus: must be 0 or 1 when there are several ranks, got {learner.gpus:g}; each rank needs a GPU of its own")
    if config.critic.start == "reward" and not (config.reward.model or config.reward_model.epochs):
        raise ValueError("critic.start: must be 'policy' when there is no reward model, got 'reward'; give reward.model, or train one with reward_model.epochs")
    gpus = {name: learner.gpus for name, learner in learners.items()}
    gpus |= {"rollout": config.rollout.gpus, "reward": config.reward.gpus, "evaluation": config.evaluation.gpus}
    for name, count in gpus.items():
        if count > 1:
            raise ValueError(f"{name}.gpus: must be at most 1, got {count:g}; a process computes on one device, so use more ranks or workers")


def absolute(model: str) -> str:
    """A model's folder of this machine by its full name, since workers stand elsewhere; a hub name, or none, as it is."""
    return str(Path(model).absolute()) if model and Path(model).is_dir() else model


def recipe_path(recipe: str) -> Path:
    """A recipe by file name, or by the name of one that comes with the package. Raises ValueError listing those."""
    path = Path(recipe)
    if path.is_file():
        return path
    bundled = {p.name.removesuffix(".toml"): p for p in (resources.files("pipeline") / "recipes").iterdir() if p.name.endswith(".toml")}
    if recipe in bundled:
        return Path(str(bundled[recipe]))
    raise ValueError(f"recipe: must be a TOML file or one of {sorted(bundled)}, got {recipe!r}")


def load(path: Path, algorithm: str = "", *, checked: bool = True) -> RunConfig:
    """Read a recipe; `algorithm` names another than its own, which keeps those of the recipe's settings that it has, too.

    checked: whether its fields must go together as they are; not so where some will be overridden.

    Raises ValueError with one line a fault, each naming field, rule and value.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        config = RunConfig.model_validate(_with_algorithm(recipe, algorithm) if algorithm else recipe)
        return check(config) if checked else config
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be TOML: {error}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, every default spelled out."""
    path.write_text(tomli_w.dumps(config.model_dump(mode="json")), encoding="utf-8")


def explain(error: ValidationError) -> str:
    """pydantic's findings, one line each: field, what is wrong, the value, and the nearest right key for an unknown one."""
    lines = []
    for fault in error.errors():
        place = [str(part) for part in fault["loc"]]
        if place[:1] == ["algorithm"]:  # pydantic puts the algorithm's name between, which is in no key
            del place[1:2]
        where = ".".join(place)
        match fault["type"]:
            case "extra_forbidden":
                lines.append(f"{where}: unknown key{_nearest(where)}")
            case "missing":
                lines.append(f"{where}: must be given")
            case "union_tag_not_found":
                lines.append(f"{where}.name: must be given")
            case "union_tag_invalid":
                lines.append(f"{where}.name: must be one of {fault['ctx']['expected_tags']}, got {fault['ctx']['tag']!r}")
            case _:
                lines.append(f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}")
    return "\n".join(lines)


def _with_algorithm(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    kinds: tuple[type[Config], ...] = get_args(RunConfig.model_fields["algorithm"].annotation)
    known = {field for kind in kinds if kind.model_fields["name"].default == name for field in kind.model_fields}
    kept = {key: value for key, value in recipe.get("algorithm", {}).items() if key in known}
    return recipe | {"algorithm": kept | {"name": name}}


def _nearest(where: str) -> str:
    import difflib

    keys = leaves(RunConfig)
    if where in keys:
        return "; another algorithm has it"
    sections = {key.rpartition(".")[0] for key in keys if "." in key}
    close = difflib.get_close_matches(where, [*sections, *keys], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def leaves(model: type[Config], prefix: str = "") -> list[str]:
    """Every key of a configuration, as `section.field`; of the algorithm, those of any."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kinds = [k for k in (getattr(field.annotation, "__args__", None) or (field.annotation,)) if isinstance(k, type) and issubclass(k, Config)]
        keys += [prefix + name] if not kinds else [key for kind in kinds for key in leaves(kind, f"{prefix}{name}.")]
    return keys
