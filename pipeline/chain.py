"""The chain of stages of a run, and which of them are done: a manifest a stage.

    sft -> reward -> rl -> evaluate          stages/<stage>.json in the run folder

A manifest says what a stage depended on (the settings it reads, the data, what the stages before it made) and what it made, file by file
with checksums. A stage is done again when any of that is no longer so, and then everything that depended on what it made; what it had
made before is moved to `superseded/`, never deleted. A stage that was begun and not finished goes on by itself, from its own checkpoints.

Left out: what the stages do (run.py), and when settings may change under a stage that is under way (changes.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from cluster.config import Config
from cluster.storage import Folder, StoredFile
from pipeline.changes import differences, is_same_result
from pipeline.config import RunConfig

StageName = Literal["sft", "reward", "rl", "evaluate"]
ORDER: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """reads: sections or keys of the configuration it depends on. data: kinds of the task's data it depends on.

    made: what it leaves to later stages and to the user. workings: what else in the run folder is its own.
    """

    reads: tuple[str, ...]
    data: tuple[str, ...]
    made: tuple[str, ...]
    workings: tuple[str, ...] = ()
    remakes: bool = False
    """Whether it makes what is lost or damaged again from its workings."""


SPECS: dict[StageName, StageSpec] = {
    "sft": StageSpec(reads=("task", "data", "seed", "model", "finetune"), data=("model", "demonstrations"), made=("finetuned",), workings=("sft", "start")),
    "reward": StageSpec(
        reads=("task", "data", "seed", "model", "reward_model", "reward.function", "sampling"),
        data=("model", "comparisons"),
        made=("reward-model", "reward-model.json", "comparisons.parquet"),
        workings=("reward", "heldout-comparisons.parquet"),
    ),
    "rl": StageSpec(
        reads=(
            "task", "data", "seed", "model", "steps", "batch", "algorithm", "shaping", "sampling", "rollout", "reward", "reference", "policy", "critic"
        ),
        data=("model", "prompts"),
        made=("policy",),
        workings=("metrics.jsonl", "tensorboard", "experience", "checkpoints"),
        remakes=True,
    ),
    "evaluate": StageSpec(
        reads=("task", "data", "seed", "model", "evaluation", "sampling", "rollout", "reward"),
        data=("model", "heldout"),
        made=("evaluation.json", "report.md", "frontier.png"),
    ),
}  # fmt: skip


class Manifest(Config):
    """What a stage depended on and, once it is finished, what it made. result: what it told of it, as JSON."""

    stage: StageName
    depends: dict[str, Any]
    finished: bool = False
    files: tuple[StoredFile, ...] = ()
    result: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    when: str = ""


class Chain:
    """The stages of one run. Every method takes effect on the disk at once."""

    def __init__(self, config: RunConfig, folder: Path, data: Mapping[str, str], *, until: StageName = "evaluate", allowed: Collection[str] = ()) -> None:
        """data: kind -> fingerprint of what the task holds of it. until: the last stage wanted. allowed: settings that may differ in a stage under way."""
        self.config = config
        self.folder = folder
        self.stages = stages_of(config, until)
        self._data = data
        self._allowed = set(allowed)

    def manifest(self, stage: StageName) -> Manifest | None:
        """What is on the disk; None where there is nothing, or nothing that can be read."""
        try:
            return Manifest.model_validate_json(Folder(self.folder).read_text(_file(stage)))
        except (OSError, ValidationError):
            return None

    def finished(self, stage: StageName) -> Manifest | None:
        """The manifest of a stage that need not be done again."""
        manifest = self.manifest(stage)
        return manifest if manifest and manifest.finished and not self.stale(stage) else None

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return all(self.finished(stage) for stage in self.stages)

    def stale(self, stage: StageName) -> str:
        """Why what is there of a stage does not count, in words; "" when it counts as far as it goes, or there is nothing of it."""
        manifest = self.manifest(stage)
        if manifest is None:
            return ""
        return self.changed(stage) or next(filter(None, (Folder(self.folder).damage(file) for file in manifest.files)), "")

    def changed(self, stage: StageName) -> str:
        """What a stage depended on and is no longer so, in words; "" when nothing, or there is nothing of it."""
        manifest = self.manifest(stage)
        if manifest is None:
            return ""
        changed = {key: pair for key, pair in differences(manifest.depends, self.depends(stage)).items() if key not in self._allowed}
        return "; ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items())

    def begin(self, stage: StageName) -> str:
        """Take up a stage: what is there of it goes on if it still counts, and is moved aside if not. Returns why it does not, or ""."""
        why = self.stale(stage)
        if why and (self.changed(stage) or not SPECS[stage].remakes):
            self._move_aside(stage)
        self._write(Manifest(stage=stage, depends=self.depends(stage)))
        return why

    def finish(self, stage: StageName, result: Mapping[str, Any], seconds: float) -> Manifest:
        """A stage has made what it had to make."""
        files = tuple(Folder(self.folder).stored(name) for name in self._files(stage))
        manifest = Manifest(
            stage=stage,
            depends=self.depends(stage),
            finished=True,
            files=files,
            result=dict(result),
            seconds=round(seconds, 1),
            when=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        self._write(manifest)
        return manifest

    def depends(self, stage: StageName) -> dict[str, Any]:
        """Everything that decides what a stage makes, as a flat table."""
        spec, settings = SPECS[stage], self.config.model_dump(mode="json")
        read = {key: value for key, value in _flat(settings).items() if any(key == name or key.startswith(f"{name}.") for name in spec.reads)}
        own = {key: value for key, value in read.items() if not is_same_result(key)}
        data = {f"data of the task: {kind}": self._data[kind] for kind in spec.data if kind in self._data}
        return json.loads(json.dumps(own | data | self._inputs(stage)))  # type: ignore[no-any-return]

    def _inputs(self, stage: StageName) -> dict[str, str]:
        """What the stages before it made, file by file."""
        found: dict[str, str] = {}
        for before in ORDER[: ORDER.index(stage)]:
            manifest = self.manifest(before) if before in stages_of(self.config) else None
            found |= {f"made by {before}: {file.name}": file.checksum for file in (manifest.files if manifest else ())}
        return found

    def _files(self, stage: StageName) -> list[str]:
        names = []
        for made in SPECS[stage].made:
            path = self.folder / made
            found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
            names += [str(p.relative_to(self.folder)) for p in found]
        return names

    def _move_aside(self, stage: StageName) -> None:
        aside = self.folder / "superseded"
        aside = aside / f"{len(list(aside.glob('*'))) + 1:03d}-{stage}"
        spec = SPECS[stage]
        for name in (*spec.made, *spec.workings, _file(stage)):
            if (self.folder / name).exists():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).rename(aside / name)

    def _write(self, manifest: Manifest) -> None:
        Folder(self.folder).write_text(_file(manifest.stage), manifest.model_dump_json(indent=1))


def stages_of(config: RunConfig, until: StageName = "evaluate") -> tuple[StageName, ...]:
    """The stages that a recipe has, up to `until`."""
    skipped = {"sft"} if config.finetune.epochs == 0 else set()
    skipped |= {"reward"} if config.reward_model.epochs == 0 else set()
    return tuple(stage for stage in ORDER[: ORDER.index(until) + 1] if stage not in skipped)


def _file(stage: StageName) -> str:
    return f"stages/{stage}.json"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
