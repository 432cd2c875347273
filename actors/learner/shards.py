"""A learner's training state in one file for each rank; any number of ranks at any ZeRO stage can read the files.

    rank-0.safetensors   wte.weight/weight, wte.weight/exp_avg, wte.weight/exp_avg_sq, ...   float32, of this rank
                         one metadata entry, `shard`: the Header as JSON

Each tensor is a range of one parameter; the header says which. The same state gives the same bytes. Nothing is
unpickled. Left out: frozen parameters, which come from the starting model, and random state, which a learner does not
have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actors.learner.fragments import Fragment, Working
from cluster.config import Config
from cluster.storage import Folder, StoredFile

_KINDS = ("weight", "exp_avg", "exp_avg_sq")
_METADATA = "shard"


class ParameterRange(Config):
    """A range of a parameter in one file.

    numel: number of elements of the whole parameter. start: the first element in this file; the length of the tensors
    says how many there are. step: AdamW's step counter.
    """

    numel: int
    start: int
    step: int


class Header(Config):
    """The header of a shard file: who wrote it, and which ranges it holds."""

    format: Literal[1] = 1
    role: str
    rank: int
    ranks: int
    parameters: dict[str, ParameterRange]


class _Shard(NamedTuple):
    name: str
    header: Header
    file: Any  # from safe_open, whose methods have no types


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements [start, stop) of a parameter are in this shard."""

    start: int
    stop: int
    shard: _Shard


def write_shard(folder: Folder, fragments: Iterable[Fragment], *, role: str, rank: int, ranks: int) -> StoredFile:
    """Write one rank's fragments; the fragments of all ranks together must cover every parameter once."""
    held = [fragment for fragment in fragments if len(fragment.weight)]
    parameters = {f.name: ParameterRange(numel=f.numel, start=f.start, step=int(f.step)) for f in held}
    assert len(parameters) == len(held), "one range of a parameter in one file"
    header = Header(role=role, rank=rank, ranks=ranks, parameters=parameters)
    tensors = {f"{fragment.name}/{kind}": tensor for fragment in held for kind, tensor in fragment.tensors.items()}
    metadata = {_METADATA: json.dumps(header.model_dump(), sort_keys=True)}
    return folder.write_file(f"rank-{rank}.safetensors", lambda path: save_file(tensors, path, metadata))


class Shards:
    """All files of one commit of a learner, open."""

    def __init__(self, folder: str, shards: list[_Shard]) -> None:
        """Raises ValueError unless the shards are one commit, and hold each element of each parameter exactly once."""
        self._folder = folder
        self._shards = shards
        self._check_ranks()
        self._pieces = self._all_pieces()
        self._check_coverage()

    @property
    def ranks(self) -> int:
        """Number of ranks that wrote the commit."""
        return len(self._shards)

    def step(self, name: str) -> int:
        """AdamW's step counter of a parameter."""
        return max(piece.shard.header.parameters[name].step for piece in self._pieces[name])

    def check(self, role: str, sizes: Mapping[str, int]) -> None:
        """Raises ValueError unless this is the state of that role with exactly these trainable parameters.

        sizes: name of each parameter -> its number of elements.
        """
        for shard in self._shards:
            if shard.header.role != role:
                raise ValueError(
                    f"{self._folder}/{shard.name}: must be a shard of the {role}, got one of the {shard.header.role}"
                )
        missing, unknown = sorted(sizes.keys() - self._pieces.keys()), sorted(self._pieces.keys() - sizes.keys())
        if missing or unknown:
            kind = "missing from the shards" if missing else "unknown to the model"
            raise ValueError(
                f"{self._folder}: must hold the model's {len(sizes)} trainable parameters, {(missing or unknown)[0]!r} "
                f"is {kind}"
            )
        for name, size in sizes.items():
            if (found := self._numel(name)) != size:
                raise ValueError(f"{self._folder}: {name!r} must have the model's {size} elements, got {found}")

    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Write the committed state into a rank's fragments."""
        for fragment in fragments:
            fragment.step.zero_()
        for fragment in fragments:
            for kind, tensor in fragment.tensors.items():
                self._read(fragment.name, kind, fragment.start, tensor)
            # Parameters that share a counter take the highest one. A parameter with a lower counter never had a
            # gradient, so its moments are zero at any count.
            fragment.step.clamp_(min=self.step(fragment.name))

    def fill_working(self, parameters: Iterable[Working]) -> None:
        """Write the committed weights into a rank's working parameters, rounded to their dtype as AdamW's step is."""
        for parameter in parameters:
            self._read(parameter.name, "weight", parameter.start, parameter.values)

    def _read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        stop = start + len(out)
        for piece in self._pieces[name]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                values = piece.shard.file.get_slice(f"{name}/{kind}")[first - piece.start : last - piece.start]
                out[first - start : last - start].copy_(values)

    def _check_ranks(self) -> None:
        found = [shard.header.rank for shard in self._shards]
        for shard in self._shards:
            if sorted(found) != list(range(shard.header.ranks)):
                raise ValueError(
                    f"{self._folder}: must be given the shards of ranks 0 to {shard.header.ranks - 1}, each once, got "
                    f"those of {found}"
                )

    def _all_pieces(self) -> dict[str, list[_Piece]]:
        pieces: dict[str, list[_Piece]] = {}
        for shard in self._shards:
            for name, part in shard.header.parameters.items():
                pieces.setdefault(name, []).append(_Piece(part.start, part.start + self._length(shard, name), shard))
        return {name: sorted(parts, key=lambda piece: piece.start) for name, parts in pieces.items()}

    def _length(self, shard: _Shard, name: str) -> int:
        keys = shard.file.keys()
        shapes = [
            shard.file.get_slice(key).get_shape() if (key := f"{name}/{kind}") in keys else None for kind in _KINDS
        ]
        if shapes[0] is None or len(shapes[0]) != 1 or shapes.count(shapes[0]) != len(_KINDS):
            raise ValueError(
                f"{self._folder}/{shard.name}: {name!r} must have {', '.join(_KINDS)} of one length, got shapes "
                f"{shapes}"
            )
        return int(shapes[0][0])

    def _numel(self, name: str) -> int:
        return self._pieces[name][0].shard.header.parameters[name].numel

    def _check_coverage(self) -> None:
        for name, pieces in self._pieces.items():
            end, numels = 0, {piece.shard.header.parameters[name].numel for piece in pieces}
            for piece in pieces:
                if piece.start != end:
                    raise ValueError(self._uncovered(name))
                end = piece.stop
            if numels != {end}:
                raise ValueError(self._uncovered(name))

    def _uncovered(self, name: str) -> str:
        found = ", ".join(f"{piece.start}:{piece.stop} in {piece.shard.name}" for piece in self._pieces[name])
        return (
            f"{self._folder}: the shards must hold each of the {self._numel(name)} elements of {name!r} once, got "
            f"{found}"
        )


@contextmanager
def open_shards(folder: Folder, files: Sequence[str]) -> Iterator[Shards]:
    """Open the files of one commit for as long as the block runs.

    Raises ValueError for a file that is not a shard, OSError for a missing file.
    """
    with ExitStack() as stack:
        yield Shards(folder.url, [_open(folder, name, stack) for name in files])


def _open(folder: Folder, name: str, stack: ExitStack) -> _Shard:
    try:
        file = stack.enter_context(safe_open(stack.enter_context(folder.local_file(name)), framework="pt"))
        header = Header.model_validate_json((file.metadata() or {}).get(_METADATA, ""))
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{folder.url}/{name}: must be a shard that a learner wrote, format 1, got one that is not: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return _Shard(name, header, file)
