"""A published version of the weights as a file of a commit, so that its bytes are there again after a restart.

    version-12.safetensors   bucket-0, bucket-1, ...   uint8, as they were published
                             manager/...               float32, the manager's head, if there is one
                             one metadata entry, `manifest`: the Manifest as JSON

Nothing is unpickled. Whoever reads it compares the checksum of the bytes with the manifest's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from actors.weights import Manifest, Weights
from cluster.storage import Folder, StoredFile

Head = Mapping[str, npt.NDArray[np.float32]]

_METADATA = "manifest"
_BUCKET, _HEAD = "bucket-", "manager/"


def write_weights(folder: Folder, weights: Weights, head: Head | None) -> StoredFile:
    """Write one version, and the manager's head that was published with it."""
    tensors = {f"{_BUCKET}{index}": bucket for index, bucket in enumerate(weights.buckets)}
    tensors |= {f"{_HEAD}{name}": np.ascontiguousarray(array) for name, array in (head or {}).items()}
    metadata = {_METADATA: json.dumps(asdict(weights.manifest))}
    return folder.write_file(f"version-{weights.version}.safetensors", lambda path: save_file(tensors, path, metadata))


def read_weights(folder: Folder, name: str, version: int) -> tuple[Weights, Head | None]:
    """The version in a file, and the manager's head. Raises ValueError when it does not have its manifest's bytes."""
    with folder.local_file(name) as path, safe_open(path, framework="numpy") as file:
        said = json.loads(file.metadata()[_METADATA])
        manifest = Manifest(
            names=tuple(said["names"]),
            shapes=tuple(map(tuple, said["shapes"])),
            dtype=said["dtype"],
            offsets=tuple((bucket, start) for bucket, start in said["offsets"]),
            checksum=said["checksum"],
        )
        names = list(file.keys())
        buckets = [file.get_tensor(f"{_BUCKET}{i}") for i in range(sum(name.startswith(_BUCKET) for name in names))]
        head = {name.removeprefix(_HEAD): file.get_tensor(name) for name in names if name.startswith(_HEAD)}
    weights = Weights(version=version, manifest=manifest, buckets=buckets)
    weights.verify()
    return weights, head or None
