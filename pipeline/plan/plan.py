"""What a recipe would run: processes and where they sit, the arithmetic of a step, and an estimate of memory.

Starts nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence, Sized
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.config import Dtype, settled
from actors.device import matrix_speed
from cluster.placement import NodeResources, Placement, described, place, shortages, usable_cores
from cluster.session import Session, cluster_address
from pipeline.config.rules import check
from pipeline.config.run_config import RunConfig
from pipeline.evaluation.evaluate import idle_examiners
from pipeline.folder.manifests import stages_of
from pipeline.folder.run_folder import check_run_dir
from pipeline.loop.wiring import demands
from pipeline.plan.dtypes import dtypes_of, emulated
from pipeline.plan.duration import Size, seconds, step
from pipeline.plan.idle import idle_workers
from pipeline.plan.memory import PROCESS_GB, Shape, commit_bytes, role_bytes, shape_of
from pipeline.plan.places import placements, sized_for
from pipeline.plan.preflight import PreflightResult, preflight, resolve, unfollowed
from pipeline.tasks.task import SPLITS, Split, Task, comparisons_of, demonstrations_of, prompts_of

_CHARACTERS, _LOOK = 4, 1000  # of a token, in English; rows by whose length that of all is told


def show(config: RunConfig, console: Console, run_dir: Path | None = None) -> None:
    """Print the plan of a recipe.

    Raises ValueError for what a run would refuse, in the same words; RunError when its cluster does not answer.
    """
    config = resolve(check(config))
    ready = preflight(config, fetch=False)
    if run_dir is not None:
        check_run_dir(run_dir)
    nodes = _nodes(config)
    notes: list[str] = []
    if nodes:
        config = sized_for(config, stages_of(config), nodes, notes.append)
    stages = stages_of(config)
    placement = place(config.cluster, demands(config))
    shape = None if "model.path" in ready.unseen else shape_of(config)
    console.print(_processes(config, placement, shape))
    needs = ", ".join(str(bundle) for bundle in placement.bundles)
    lines = [f"stages: {', '.join(stages)}", *_needs(config, ready), *_data(config, ready)]
    lines += [
        f"needs {len(placement.bundles)} bundle(s): {needs}; this machine has {usable_cores()} cores",
        *_on_the_cluster(config, nodes),
    ]
    if shape:
        total = sum(role_bytes(config, slot.role, shape) / 1e9 + PROCESS_GB for slot in placement.slots)
        lines.append(
            f"model {shape.parameters / 1e6:.1f} M parameters, context {shape.context}; about {total:.1f} GB in all"
        )
        disk = commit_bytes(config, shape.parameters) / 1e6
        lines.append(
            f"a commit every {config.commit_every} steps, at most {disk:,.0f} MB; {config.keep_commits} are kept, and "
            "one more while it is written"
        )
    else:
        lines.append(f"model {config.model.path}: not on this machine (a run would fetch it), so its size is not known")
    for line in (
        *lines,
        _arithmetic(config),
        *notes,
        *_notes(config, ready),
        *(f"warning: {line}" for line in emulated(config)),
        *_duration(config, ready, shape),
    ):
        console.print(Text(line), soft_wrap=True)


def _notes(config: RunConfig, ready: PreflightResult) -> list[str]:
    """What a look at the numbers does not tell."""
    unseen = {"model.path", "reward.model", "environment.partner"} & ready.unseen.keys()
    return [
        *ready.remarks,
        *idle_workers(config),
        *idle_examiners(config.evaluation, config.rollout),
        *([] if unseen else unfollowed(config)),
    ]


def _processes(config: RunConfig, placement: Placement, shape: Shape | None) -> Table:
    table = Table(title="processes", title_justify="left")
    for column in ("process", "bundle", "CPUs", "GPUs", "memory"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for slot in placement.slots:
        memory = f"{role_bytes(config, slot.role, shape) / 1e9 + PROCESS_GB:.2f} GB" if shape else "?"
        table.add_row(f"{slot.role}[{slot.index}]", str(slot.bundle), f"{slot.cpus:g}", f"{slot.gpus:g}", memory)
    return table


def _needs(config: RunConfig, ready: PreflightResult) -> list[str]:
    """What a run would have to fetch, a line each."""
    what = {
        key: ("data", "local files") if key.startswith("data.") else ("model", "its folder") for key in ready.unseen
    }
    return [
        f"a run downloads the {what[key][0]} {name!r} from the Hugging Face hub, unless {key} names {what[key][1]}"
        for key, name in ready.unseen.items()
    ]


def _data(config: RunConfig, ready: PreflightResult) -> list[str]:
    """What the task holds, in rows of training and held out."""
    if any(key.startswith("data.") for key in ready.unseen):
        return []
    kinds: list[tuple[str, Callable[[Task, Split], Sized]]] = [("prompts", prompts_of)]
    kinds += [("demonstrations", demonstrations_of)] if config.finetune.epochs else []
    kinds += (
        [("comparisons", comparisons_of)] if config.reward_model.epochs and config.reward_model.pairs == "task" else []
    )
    counts = {name: [len(give(ready.task, split)) for split in SPLITS] for name, give in kinds}
    found = [
        f"data: {', '.join(f'{train:,} {name} and {heldout:,} held out' for name, (train, heldout) in counts.items())}"
    ]
    if ready.prompts is not None:
        for split, fitted in ready.prompts.fitted.items():
            if fitted.shortened or fitted.merged or fitted.excluded:
                which = "prompts" if split == "train" else "held-out prompts"
                found.append(
                    f"      of the {which} {fitted.shortened:,} are shortened to fit, "
                    f"{len(fitted.excluded) + len(fitted.merged):,} left out"
                )
    return found


def _duration(config: RunConfig, ready: PreflightResult, shape: Shape | None) -> list[str]:
    """An estimate for this machine; nothing where it could mean nothing."""
    unseen = [key for key in ready.unseen if key != "reward.model"]
    if shape is None or unseen:
        return [f"estimate: none, since {', '.join(unseen)} would have to be fetched first"]
    if any(bundle.gpus for placement in placements(config, stages_of(config)).values() for bundle in placement.bundles):
        return ["estimate: none, since only what this machine's own processor does is measured"]
    speed: dict[str, float] = {dtype: matrix_speed(dtype) for dtype in _dtypes(config)}
    size = _size(config, ready, shape)
    took, each = seconds(config, size, speed), step(config, size, speed)
    speeds = ", ".join(f"{operations / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, operations in speed.items())
    stages = ", ".join(f"{stage} {_clock(time_s)}" for stage, time_s in took.items())
    return [
        f"estimate: about {_clock(sum(took.values()))} on this machine, by arithmetic at {speeds}, measured just now; "
        "it may take half or twice as long",
        f"          {stages}; a step {sum(each.values()):.2g} s: "
        f"{', '.join(f'{phase} {time_s:.2g}' for phase, time_s in each.items() if time_s)}",
    ]


def _dtypes(config: RunConfig) -> list[Dtype]:
    """In which the run computes anything; float32 always does."""
    found = {settled(dtype.dtype) for dtype in dtypes_of(config) if dtype.is_used}
    return sorted({"float32", *found}, reverse=True)


def _size(config: RunConfig, ready: PreflightResult, shape: Shape) -> Size:
    task = ready.task
    demonstrations = (
        [row for split in SPLITS for row in demonstrations_of(task, split)] if config.finetune.epochs else []
    )
    of_task = config.reward_model.epochs and config.reward_model.pairs == "task"
    comparisons = [row for split in SPLITS for row in comparisons_of(task, split)] if of_task else []
    texts = [row.prompt + row.response for row in demonstrations] or [
        row.prompt + row.replies[0] for row in comparisons
    ]
    train, heldout = (len(prompts_of(task, split)) for split in SPLITS)
    characters = sum(map(len, texts[:_LOOK])) / max(len(texts[:_LOOK]), 1)
    return Size(
        parameters=shape.parameters,
        layers=shape.layers,
        prompts=train,
        heldout=heldout,
        demonstrations=len(demonstrations),
        comparisons=len(comparisons),
        row_tokens=min(characters / _CHARACTERS, shape.context),
    )


def _clock(time_s: float) -> str:
    """Seconds in the unit that a person would say."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("min", 60)):
        if time_s >= 2 * size:
            return f"{time_s / size:.0f} {unit}"
    return f"{time_s:.0f} s"


def _nodes(config: RunConfig) -> list[NodeResources]:
    """Of the cluster that a run would join; none where it would start a Ray of its own.

    Raises RunError when nobody answers.
    """
    if not cluster_address(config.cluster):
        return []
    with tempfile.TemporaryDirectory() as folder, Session(config.cluster, Path(folder), packages=()) as session:
        return session.nodes()


def _on_the_cluster(config: RunConfig, nodes: Sequence[NodeResources]) -> list[str]:
    """The resources of a joined cluster, and the stages that do not fit at present; it may grow, so none is refused."""
    if not nodes:
        return []
    address = cluster_address(config.cluster)
    there = (
        f"{sum(node.cpus for node in nodes):g} CPUs and {sum(node.gpus for node in nodes):g} GPUs on {len(nodes)} "
        "node(s)"
    )
    lines = [f"the cluster at {address} has {there}"]
    stops = False
    for name, placement in placements(config, stages_of(config)).items():
        if reasons := shortages(placement.least, nodes):
            stops = True
            lines.append(f"{name} cannot begin: {' '.join(reasons)}")
        elif shortages(placement, nodes):
            least, whole = described(placement.least), described(placement)
            lines.append(f"{name} begins with {least}; to have all its workers the cluster must provide {whole}")
    if len(lines) == 1:
        return [f"{lines[0]}: every stage fits"]
    if stops:
        lines.append(
            "unless the cluster grows within cluster.place_timeout_s = "
            f"{config.cluster.place_timeout_s:g} s, a run stops at once"
        )
    return lines


def _arithmetic(config: RunConfig) -> str:
    batch, chunk = config.batch, config.rollout.chunk_size // config.batch.group_size * config.batch.group_size
    updates = batch.epochs * batch.minibatches
    talk, longest = config.environment, config.sampling.max_new_tokens
    tokens = f"{batch.max_prompt_tokens} + {longest} tokens"
    if talk.name:
        tokens = f"{talk.max_turns} turns of {longest} tokens, with {talk.name}"
    rollouts = batch.samples // batch.minibatches
    a_rank = -(-batch.samples // batch.minibatches // config.policy.ranks)
    passes = f"{batch.epochs} epoch(s) x {batch.minibatches} minibatch(es) = {updates} updates"
    samples = f"{batch.samples} {'conversations' if talk.name else 'rollouts'} of at most {tokens}"
    most = "" if config.repeats else "at most "
    by = f"\n        sampled by weights {most}{config.max_staleness} version(s) before those that it trains"
    behind = by if config.max_staleness else ""
    return f"""\
a step: {batch.prompts} prompts x {batch.group_size} = {samples},
        generated in {-(-batch.samples // chunk)} chunk(s) of at most {chunk}; {passes},
        each on about {rollouts} rollouts, {a_rank} a rank{behind}
a run:  {config.steps} steps = {config.steps * batch.samples:,} rollouts = {config.steps * updates:,} updates"""
