"""A published version of the policy's weights: a few flat buckets of bytes, and a manifest of their contents.

Buckets are plain numpy arrays, so they go through Ray's object store without a copy on either side; the receiver gets
read-only shared memory. A checksum over everything tells whether two processes have the same weights.

Left out: deltas, sharded publication and compression. One version is one contiguous copy of the model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor, nn

from actors.config import Dtype
from actors.device import torch_dtype

Bucket = npt.NDArray[np.uint8]

BUCKET_BYTES = 256 * 1024 * 1024
_ALIGN = 64  # bytes; every tensor starts on a cache line


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of the buckets. Tied parameters appear once, under their name in `named_parameters()`.

    offsets:  (bucket, first byte) of each tensor.
    checksum: xxh3-128, hexadecimal, over names, shapes, dtype, offsets and every byte of every bucket.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: Dtype
    offsets: tuple[tuple[int, int], ...]
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One version of a model's weights."""

    version: int
    manifest: Manifest
    buckets: list[Bucket]

    @property
    def checksum(self) -> str:
        return self.manifest.checksum

    def verify(self) -> None:
        """Raises ValueError when the bytes are not those that were packed."""
        m = self.manifest
        found = _checksum(m.names, m.shapes, m.dtype, m.offsets, self.buckets)
        if found != m.checksum:
            raise ValueError(
                f"weights: version {self.version} must have checksum {m.checksum}, got {found}; it was damaged on the "
                "way, publish it again"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, read-only view into the buckets) of every parameter, unverified.

        The views keep the buckets alive; never write to them.
        """
        dtype = torch_dtype(self.manifest.dtype)
        with warnings.catch_warnings():
            # torch cannot mark a tensor read-only and warns of memory that is; these views are only ever copied from.
            warnings.simplefilter("ignore", UserWarning)
            flat = [torch.from_numpy(bucket) for bucket in self.buckets]
        for name, shape, (bucket, start) in zip(
            self.manifest.names, self.manifest.shapes, self.manifest.offsets, strict=True
        ):
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            yield name, flat[bucket][start : start + size].view(dtype).view(shape)


class WeightsSource(Protocol):
    """A handle on one published version: cheap to pass, and fetched only by a worker that has other weights."""

    @property
    def version(self) -> int: ...

    @property
    def checksum(self) -> str: ...

    @property
    def manager(self) -> Mapping[str, npt.NDArray[np.float32]] | None:
        """The manager's published head (see `OptionHead`), or None where there is no manager."""
        ...

    def fetch(self) -> Weights:
        """The weights of that version and checksum, within a deadline of the source's own."""
        ...


def copy_parameters(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Copy these tensors into the model's parameters, all or none; tied ones appear once.

    The model keeps its dtype and device. Raises ValueError naming one that is unknown, missing or of another shape.
    """
    own, new = dict(model.named_parameters()), dict(named)
    for name in sorted(own.keys() ^ new.keys()):
        kind = "missing" if name in own else "unknown to the model"
        raise ValueError(
            f"weights: must hold the model's {len(own)} parameters, {name!r} is {kind}; publish the model that the "
            "pool was given"
        )
    for name, tensor in new.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"weights: {name!r} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in new.items():
            own[name].copy_(tensor)


def pack(named_tensors: Iterable[tuple[str, Tensor]], dtype: Dtype, version: int) -> Weights:
    """Copy tensors, converted to `dtype`, into flat buckets of about BUCKET_BYTES.

    A larger tensor gets a bucket of its own.
    """
    target = torch_dtype(dtype)
    named = list(named_tensors)
    offsets, sizes = _layout([tensor.numel() * target.itemsize for _, tensor in named])
    # Zeroed, not empty: alignment gaps are part of the checksum.
    buckets = [np.zeros(size, np.uint8) for size in sizes]
    flat = [torch.from_numpy(bucket) for bucket in buckets]
    for (_, tensor), (bucket, start) in zip(named, offsets, strict=True):
        flat[bucket][start : start + tensor.numel() * target.itemsize].view(target).copy_(tensor.detach().reshape(-1))
    names = tuple(name for name, _ in named)
    shapes = tuple(tuple(tensor.shape) for _, tensor in named)
    checksum = _checksum(names, shapes, dtype, offsets, buckets)
    return Weights(
        version=version,
        manifest=Manifest(names=names, shapes=shapes, dtype=dtype, offsets=offsets, checksum=checksum),
        buckets=buckets,
    )


def parameters_checksum(model: nn.Module) -> str:
    """xxh3-128 over names, shapes, dtypes and bytes of a model's parameters, in hexadecimal.

    Only one parameter is copied at a time.
    """
    named = list(model.named_parameters())
    digest = xxhash.xxh3_128(json.dumps([[name, tuple(p.shape), str(p.dtype)] for name, p in named]).encode())
    for _, parameter in named:
        # the buffer protocol, as below
        data: Any = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def _layout(sizes: list[int]) -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """(bucket, first byte) of each tensor, and the size of each bucket; sizes: of the tensors, in bytes."""
    offsets: list[tuple[int, int]] = []
    buckets: list[int] = []
    for size in sizes:
        padded = -(-size // _ALIGN) * _ALIGN
        if not buckets or (buckets[-1] and buckets[-1] + padded > BUCKET_BYTES):
            buckets.append(0)
        offsets.append((len(buckets) - 1, buckets[-1]))
        buckets[-1] += padded
    return tuple(offsets), buckets


def _checksum(
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtype: Dtype,
    offsets: tuple[tuple[int, int], ...],
    buckets: list[Bucket],
) -> str:
    digest = xxhash.xxh3_128(json.dumps([names, shapes, dtype, offsets]).encode())
    for bucket in buckets:
        data: Any = bucket  # the buffer protocol; xxhash's stub names bytes only
        digest.update(data)
    return digest.hexdigest()
