"""What a recipe would run: processes and where they sit, the arithmetic of a step, and an estimate of memory. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.config import Dtype, LearnerConfig
from cluster.placement import usable_cores
from pipeline.chain import stages_of
from pipeline.config import RunConfig, check
from pipeline.roles import demands, place
from pipeline.tasks.task import task_of

PROCESS_GB = 0.45  # Python, torch, transformers and Ray's worker, measured on Linux without a GPU
_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What memory depends on. parameters: numbers, not bytes."""

    parameters: int
    layers: int
    kv_width: int
    context: int


def show(config: RunConfig, console: Console) -> None:
    """Print the plan of a checked configuration. Raises ValueError for a task or reward that cannot be imported."""
    from actors.reward import load_function

    check(config)
    task = task_of(config)
    if not config.reward.model and (rule := config.reward.function or task.reward):
        load_function(rule)
    placement = place(config, demands(config))
    shape = _shape(config)
    table = Table(title="processes", title_justify="left")
    for column in ("process", "bundle", "CPUs", "GPUs", "memory"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for slot in placement.slots:
        memory = f"{_memory(config, slot.role, shape) / 1e9 + PROCESS_GB:.2f} GB" if shape else "?"
        table.add_row(f"{slot.role}[{slot.index}]", str(slot.bundle), f"{slot.cpus:g}", f"{slot.gpus:g}", memory)
    console.print(table)
    needs = ", ".join(str(bundle) for bundle in placement.bundles)
    lines = [f"needs {len(placement.bundles)} bundle(s): {needs}; this machine has {usable_cores()} cores"]
    if shape:
        total = sum(_memory(config, slot.role, shape) / 1e9 + PROCESS_GB for slot in placement.slots)
        lines.append(f"model {shape.parameters / 1e6:.1f} M parameters, context {shape.context}; about {total:.1f} GB in all")
        disk = _commit_bytes(config, shape.parameters) / 1e6
        lines.append(f"a commit every {config.commit_every} steps, at most {disk:,.0f} MB; {config.keep_commits} are kept, and one more while it is written")
    else:
        lines.append(f"model {config.model.path}: not on this machine (a run would fetch it), so its size is not known")
    for line in (f"stages: {', '.join(stages_of(config))}", *_needs(config), *lines, _arithmetic(config)):
        console.print(Text(line), soft_wrap=True)


def _needs(config: RunConfig) -> list[str]:
    """What a run would have to fetch, a line each."""
    hub = "from the Hugging Face hub, or its folder by"
    named = [f"model {path!r} {hub} {key}" for key, path in (("model.path", config.model.path), ("reward.model", config.reward.model)) if _is_remote(path)]
    sources = {f"data.{name}": getattr(config.data, name) for name in ("comparisons", "demonstrations", "prompts")}
    named += [f"data {source!r}, or local files by {key}" for key, source in sources.items() if _is_remote(source)]
    return [f"needs {what}" for what in named]


def _is_remote(name: str) -> bool:
    return bool(name) and not Path(name).exists()


def _arithmetic(config: RunConfig) -> str:
    batch, chunk = config.batch, config.rollout.chunk_size // config.batch.group_size * config.batch.group_size
    updates = batch.epochs * batch.minibatches
    return f"""\
a step: {batch.prompts} prompts x {batch.group_size} = {batch.samples} rollouts of at most {batch.max_prompt_tokens} + {config.sampling.max_new_tokens} tokens,
        generated in {-(-batch.samples // chunk)} chunk(s) of at most {chunk}; {batch.epochs} epoch(s) x {batch.minibatches} minibatch(es) = {updates} updates,
        each on about {batch.samples // batch.minibatches} rollouts, {-(-batch.samples // batch.minibatches // config.policy.ranks)} a rank
a run:  {config.steps} steps = {config.steps * batch.samples:,} rollouts = {config.steps * updates:,} updates"""


def _shape(config: RunConfig) -> Shape | None:
    model = config.model
    if not model.path:
        blocks = model.layers * (12 * model.width**2 + 13 * model.width)
        parameters = blocks + (model.vocabulary + model.context + 2) * model.width
        return Shape(parameters=parameters, layers=model.layers, kv_width=model.width, context=model.context)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        found = AutoConfig.from_pretrained(model.path, trust_remote_code=False, local_files_only=True)  # a plan starts nothing, and waits for nobody
    except OSError:
        return None
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(found).parameters())
    heads = getattr(found, "num_key_value_heads", None) or found.num_attention_heads
    kv_width = found.hidden_size // found.num_attention_heads * heads
    return Shape(parameters=parameters, layers=found.num_hidden_layers, kv_width=kv_width, context=found.max_position_embeddings)


def _memory(config: RunConfig, role: str, shape: Shape) -> float:
    """Bytes of one process of the role, beyond the process itself."""
    if role in ("policy", "critic"):
        return _learner_bytes(config.policy if role == "policy" else config.critic, shape.parameters)
    if role == "rollout":
        width = _BYTES[config.rollout.dtype]
        tokens = config.batch.max_prompt_tokens + config.sampling.max_new_tokens
        return width * (shape.parameters + 2 * config.rollout.slots * tokens * shape.layers * shape.kv_width)
    return _BYTES[config.reference.dtype] * shape.parameters if role == "reference" else 0.0


def _commit_bytes(config: RunConfig, parameters: int) -> float:
    """Weights and two moments in float32 of each learner; of heads alone it is less."""
    return 12.0 * parameters * (2 if config.algorithm.needs_critic else 1)


def _learner_bytes(learner: LearnerConfig, parameters: int) -> float:
    """Weights, gradients, and the optimiser's two moments and master copy, divided by what the ZeRO stage shards (Rajbhandari et al. 2020)."""
    width = _BYTES[learner.dtype]
    state = 12.0 if learner.dtype == "bfloat16" else 8.0 + (4.0 if learner.zero_stage else 0.0)
    share = [1 / learner.ranks if learner.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    return parameters * (width * share[2] + width * share[1] + state * share[0])
