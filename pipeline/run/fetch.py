"""A run fetched from its storage into an empty folder, from which it goes on as if it had been there always.

    history.json, files.json --> all files but commits --> the newest commit that is whole --> history.json

The way there, and why a manifest can be trusted, is in `pipeline/folder/mirror.py`. A commit is used only if each of
its files is there with its size and checksum; one that is not is told of, and the one before it is taken. Every other
file is checked against the list of files. What is missing or differs is told of, and the stages' own manifests decide
what is done again. The history is written last, so a fetch that breaks off is begun again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.config import ClusterConfig
from cluster.manifest import MANIFEST
from cluster.remote import RemoteFolder
from cluster.storage import Folder, StoredFile
from pipeline.config.recipe import as_toml
from pipeline.folder.mirror import CHECKPOINTS, FIELD, INDEX, STAGES, Mirror, index_of
from pipeline.folder.run_folder import HISTORY, RunStart, history_of, locked, read_history
from pipeline.loop.commits import COMMITS, Commit, names_of

_MARK = ".being-fetched"
_WITHOUT_MANIFEST = "start-with-options"
"""A model that no manifest covers; it is made again from the fine-tuned one, unless all of it was fetched."""
_SHOWN = 3  # problems that are told one by one
_RECIPE_S = 60.0  # the longest wait for the recipe, whose own setting is not known yet

Say = Callable[[str], None]


def open_storage(config: ClusterConfig, run_dir: Path, say: Say) -> Mirror | None:
    """The mirror of a run; None without a storage. A run on the storage is fetched, unless there is one in the folder.

    Raises ValueError for a storage that this machine cannot write to, and the errors of `fetch`.
    """
    mirror = Mirror.of(config)
    if mirror is not None and _has_no_run(run_dir) and mirror.holds_run():
        say(f"fetching the run from {mirror.remote.url}")
        fetch(mirror.remote, run_dir, say)
    return mirror


@contextmanager
def recipe_of(url: str) -> Iterator[Path]:
    """The recipe of the run on a storage, as a file in a folder of its own, beside the run's history.

    Raises ValueError when there is none.
    """
    with TemporaryDirectory(prefix="raylign-recipe-") as folder:
        try:
            RemoteFolder(url, _RECIPE_S).get(HISTORY, Path(folder) / HISTORY)
            recipe = _write_recipe(Path(folder), read_history(Path(folder)))
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(
                f"URL: must be the storage of a run, got {url}: {error}; a run writes there with --{FIELD} {url}"
            ) from error
        yield recipe


def _write_recipe(folder: Path, history: Sequence[RunStart]) -> Path:
    """Write the settings of the last start, which a run that broke off early may not have copied as a recipe."""
    Folder(folder).write_text("config.toml", as_toml(history[-1].config))
    return folder / "config.toml"


def _has_no_run(run_dir: Path) -> bool:
    """Whether a folder is empty, or holds only part of a run that was being fetched."""
    if not run_dir.is_dir():
        return not run_dir.exists()  # a file is refused later
    return not (run_dir / HISTORY).exists() and ((run_dir / _MARK).exists() or not any(run_dir.iterdir()))


def fetch(remote: RemoteFolder, run_dir: Path, say: Say) -> None:
    """Fetch a run into an empty folder, or one in which a fetch was broken off.

    Raises ValueError when there is no run on the storage, none of its commits is whole, or it does not answer.
    """
    try:
        _fetch(remote, run_dir, say)
    except OSError as error:
        raise ValueError(f"{FIELD}: must be a run that can be read, got {remote.url}: {error}") from error


def _fetch(remote: RemoteFolder, run_dir: Path, say: Say) -> None:
    text = remote.text(HISTORY)
    if text is None:
        raise ValueError(
            f"{FIELD}: must hold a run, got {remote.url}, which has no {HISTORY}; a run writes it there with "
            f"--{FIELD} {remote.url}"
        )
    history = history_of(text, f"{remote.url}/{HISTORY}", FIELD)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        _empty(run_dir)
        _fetch_files(remote, run_dir, say)
        _fetch_commit(remote, run_dir, history, say)
        _write_recipe(run_dir, history)
        Folder(run_dir).write_text(HISTORY, text)
        (run_dir / _MARK).unlink()


def _empty(run_dir: Path) -> None:
    """Remove what an earlier fetch has left, and mark the folder as one that is being fetched."""
    for path in run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_MARK, ".lock"):
            path.unlink()
    (run_dir / _MARK).touch()


def _fetch_files(remote: RemoteFolder, run_dir: Path, say: Say) -> None:
    """Fetch everything but commits."""
    index = [file for file in index_of(remote.text(INDEX)) if not file.name.startswith(f"{COMMITS}/")]
    said = remote.at_once(lambda file: _fetch_file(remote, run_dir, file), index)
    problems = {file.name: problem for file, problem in zip(index, said, strict=True) if problem}
    for number, problem in enumerate(problems.values()):
        if number < _SHOWN:
            say(f"{remote.url}: {problem}")
    if len(problems) > _SHOWN:
        say(f"{remote.url}: {len(problems)} files in all are missing or differ from what was written")
    if any(name.startswith(f"{_WITHOUT_MANIFEST}/") for name in problems):
        shutil.rmtree(run_dir / _WITHOUT_MANIFEST, ignore_errors=True)
    manifests = [
        *remote.sizes(STAGES),
        *(name for below in CHECKPOINTS if below != COMMITS for name in remote.sizes(below) if MANIFEST in name),
    ]
    for name in manifests:
        remote.get(name, run_dir / name)


def _fetch_file(remote: RemoteFolder, run_dir: Path, file: StoredFile) -> str:
    """Returns what is wrong with the file, or ""."""
    try:
        found = remote.get(file.name, run_dir / file.name)
    except FileNotFoundError:
        return f"{file.name} is missing"
    # an upload that broke off before its list may have left a newer one, which is of use
    return "" if found.checksum == file.checksum else f"{file.name} is not as it was listed"


def _fetch_commit(remote: RemoteFolder, run_dir: Path, history: Sequence[RunStart], say: Say) -> None:
    """Fetch the newest commit that is whole. Raises ValueError when there are commits, but none is whole."""
    there = remote.sizes(COMMITS)
    names = names_of({name.split("/")[1] for name in there}, history)
    damaged = 0
    for name in names:
        path = f"{COMMITS}/{name}"
        if f"{path}/{MANIFEST}" not in there:
            say(f"commit {name} in {remote.url} has no {MANIFEST}: its upload was broken off")
            continue
        if not (problem := _fetch_whole(remote, run_dir, path, there)):
            return
        damaged += 1
        shutil.rmtree(run_dir / path, ignore_errors=True)
        say(f"commit {name} in {remote.url} is damaged: {problem}; looking for the one before it")
    if damaged:
        raise ValueError(
            f"{FIELD}: must hold a commit that is whole, got {damaged} damaged in {remote.url}; start anew: "
            f"raylign run RECIPE --{FIELD} another folder"
        )


def _fetch_whole(remote: RemoteFolder, run_dir: Path, path: str, there: dict[str, int]) -> str:
    """Fetch a commit, its manifest last; returns what is wrong with it, or ""."""
    try:
        text = remote.text(f"{path}/{MANIFEST}") or ""
        files = [*Commit.from_text(text).files()]
    except ValueError as error:
        return f"{MANIFEST} is not whole ({str(error).splitlines()[0]})"
    for file in files:  # sizes first: nothing is fetched in vain
        if (size := there.get(f"{path}/{file.name}")) != file.size:
            return f"{file.name} is missing" if size is None else f"{file.name} has {size} bytes, must have {file.size}"
    got = remote.at_once(lambda file: remote.get(f"{path}/{file.name}", run_dir / path / file.name), files)
    for file, found in zip(files, got, strict=True):
        if found.checksum != file.checksum:
            return f"{file.name} has other bytes than were written"
    Folder(run_dir / path).write_text(MANIFEST, text)
    return ""
