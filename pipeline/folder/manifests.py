"""The chain of stages of a run, with a manifest for each stage, which says whether it is done.

    sft -> reward -> rl -> evaluate          stages/<stage>.json in the run folder

A manifest lists what a stage depended on (the settings it reads, the data, the files of earlier stages) and what it
made, file by file with checksums. A stage is done again when any of this has changed, and then every stage that depends
on its files. Earlier results are moved to `superseded/`, never deleted. A stage that was begun and not finished goes on
from its own checkpoints.

Left out: the work of the stages (`pipeline/run/stages.py`), and the settings that may change under a stage that is
under way (`compatibility.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from cluster.config import Config
from cluster.storage import Folder, StoredFile
from pipeline.config.run_config import RunConfig
from pipeline.folder.compatibility import completed, differences, is_same_result, owner_of

StageName = Literal["sft", "reward", "rl", "evaluate"]
ORDER: tuple[StageName, ...] = get_args(StageName)
STEPS = "steps"
DATA = "data of the task: "  # prefix, in `Manifest.depends`, of the checksums of data and models


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """What a stage depends on, and which files are its own.

    reads: sections or keys of the configuration. data: kinds of the task's data; a kind may have parts, such as "model
    weights". made: files for later stages and for the user. workings: its other files in the run folder. notes: files
    in what is made that only people read; they may be written again later, so no manifest holds their checksums.
    """

    reads: tuple[str, ...]
    data: tuple[str, ...]
    made: tuple[str, ...]
    workings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    remakes: bool = False
    """Whether the stage can restore lost or damaged files from its workings."""


SPECS: dict[StageName, StageSpec] = {
    "sft": StageSpec(
        reads=("task", "data", "seed", "model", "finetune"),
        data=("model", "demonstrations"),
        made=("finetuned",),
        workings=("sft", "start"),
    ),
    "reward": StageSpec(
        reads=("task", "data", "seed", "model", "reward_model", "reward.function", "sampling"),
        data=("model", "comparisons"),
        made=("reward-model", "reward-model.json", "comparisons.parquet"),
        workings=("reward", "heldout-comparisons.parquet"),
    ),
    "rl": StageSpec(
        reads=(
            "task",
            "data",
            "seed",
            "model",
            "steps",
            "batch",
            "algorithm",
            "shaping",
            "sampling",
            "environment",
            "manager",
            "rollout",
            "reward",
            "reference",
            "policy",
            "critic",
        ),
        data=("model", "reward model", "partner model", "prompts"),
        made=("policy",),
        notes=("policy/README.md",),
        workings=("start-with-options", "metrics.jsonl", "tensorboard", "experience", "checkpoints"),
        remakes=True,
    ),
    "evaluate": StageSpec(
        reads=(
            "task",
            "data",
            "seed",
            "model",
            "evaluation",
            "sampling",
            "environment",
            "manager",
            "rollout",
            "reward",
        ),
        data=("model", "reward model", "partner model", "heldout"),
        made=("evaluation.json", "report.md", "frontier.png"),
    ),
}


class Manifest(Config):
    """What a stage depended on and, once it is finished, the files it made and its result as JSON values."""

    stage: StageName
    depends: dict[str, Any]
    finished: bool = False
    files: tuple[StoredFile, ...] = ()
    result: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    when: str = ""


class Chain:
    """The stages of one run. Every method takes effect on the disk at once."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        data: Mapping[str, str],
        *,
        until: StageName = "evaluate",
        allowed: Collection[str] = (),
        moved: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """The chain of a run in `folder`.

        data: kind -> checksum of the task's data. until: the last stage that is asked for. allowed: `data` or `model`,
        whose contents may differ from when a stage was done or begun; an evaluation is always of the present contents.
        moved: setting -> former path, of files and models with the same contents at another path.
        """
        self.config = config
        self.folder = folder
        self.until = until
        self.stages = stages_of(config, until)
        self._data = data
        self._allowed = set(allowed)
        self._moved = moved

    def manifest(self, stage: StageName) -> Manifest | None:
        """The manifest on the disk; None if there is none, or none that can be read."""
        try:
            return Manifest.model_validate_json(Folder(self.folder).read_text(_file(stage)))
        except (OSError, ValidationError):
            return None

    def finished(self, stage: StageName) -> Manifest | None:
        """The manifest of a stage that is done, and still valid; else None."""
        manifest = self.manifest(stage)
        done = manifest and manifest.finished and manifest.depends.get(STEPS) == self.depends(stage).get(STEPS)
        return manifest if done and not self.stale(stage) else None

    @property
    def is_finished(self) -> bool:
        """Whether every stage is done."""
        return all(self.finished(stage) for stage in self.stages)

    @property
    def left(self) -> tuple[StageName, ...]:
        """The first stage that is not done, and all later ones, which may depend on it."""
        done = next((number for number, stage in enumerate(self.stages) if not self.finished(stage)), len(self.stages))
        return self.stages[done:]

    def stale(self, stage: StageName) -> str:
        """The reason why the files of a stage are not valid (a changed input, a damaged file); "" if they are."""
        manifest = self.manifest(stage)
        if manifest is None:
            return ""
        return self.changed(stage) or next(
            filter(None, (Folder(self.folder).damage(file) for file in manifest.files)), ""
        )

    def changed(self, stage: StageName) -> str:
        """The inputs of a stage that have changed since, in words; "" if none has.

        Another number of `steps` is no change: it is the same stage, made longer.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            return ""
        now, defaults = self.depends(stage), _flat(completed({}, self.config))
        unknown = {key: defaults[key] for key in now if key in defaults and key not in manifest.depends}
        changed = differences(unknown | manifest.depends, now)
        return "; ".join(
            f"{key}: {_short(old)} -> {_short(new)}"
            for key, (old, new) in changed.items()
            if not self._goes_on(stage, key, old, new)
        )

    def accept(self) -> None:
        """Record in the manifests that earlier work counts for the present data and models.

        These are those that were allowed to change, and those that are at another path.
        """
        allowing = [stage for stage in self.stages if stage != "evaluate"]
        for stage in stages_of(self.config):  # of a stage that is not asked for, too, the paths have moved
            manifest = self.manifest(stage)
            if manifest is None:
                continue
            before = manifest.depends
            now = {
                key: value
                for key, value in self.depends(stage).items()
                if (key.startswith(DATA) and owner_of(key) in self._allowed and stage in allowing)
                or (key in before and self._moved.get(key) == before[key])
            }
            if now:
                self._write(manifest.model_copy(update={"depends": before | now}))

    def _goes_on(self, stage: StageName, key: str, old: Any, new: Any) -> bool:
        """Whether a stage stays valid although this input differs."""
        if not key.startswith(DATA):
            return key == STEPS or (old is not None and self._moved.get(key) == old)
        # None: another release did not record it
        return old is None or new is None or (stage != "evaluate" and owner_of(key) in self._allowed)

    def begin(self, stage: StageName) -> str:
        """Begin a stage, or go on with it; files that are no longer valid are moved to `superseded/`.

        Returns the reason why they are not valid, or "".
        """
        why = self.stale(stage)
        if why and (self.changed(stage) or not SPECS[stage].remakes):
            self._move_aside(stage)
        self._write(Manifest(stage=stage, depends=self.depends(stage)))
        return why

    def finish(self, stage: StageName, result: Mapping[str, Any], seconds: float) -> Manifest:
        """Write the manifest of a finished stage, with the checksums of its files."""
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
        """All inputs that decide the result of a stage, as a flat mapping."""
        spec, settings = SPECS[stage], self.config.model_dump(mode="json")
        read = {
            key: value
            for key, value in _flat(settings).items()
            if any(key == name or key.startswith(f"{name}.") for name in spec.reads)
        }
        own = {key: value for key, value in read.items() if not is_same_result(key)}
        data = {
            f"{DATA}{name}": value
            for name, value in self._data.items()
            if any(name == kind or name.startswith(f"{kind} ") for kind in spec.data)
        }
        return json.loads(json.dumps(own | data | self._inputs(stage)))  # type: ignore[no-any-return]

    def _inputs(self, stage: StageName) -> dict[str, str]:
        """The checksums of the files that earlier stages made."""
        found: dict[str, str] = {}
        for before in ORDER[: ORDER.index(stage)]:
            manifest = self.manifest(before) if before in stages_of(self.config) else None
            found |= {f"made by {before}: {file.name}": file.checksum for file in (manifest.files if manifest else ())}
        return found

    def _files(self, stage: StageName) -> list[str]:
        names = []
        for made in SPECS[stage].made:
            path = self.folder / made
            found = (
                sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
            )
            names += [name for p in found if (name := str(p.relative_to(self.folder))) not in SPECS[stage].notes]
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
