"""The one place that chooses what a process computes on and how its gang talks.

What was left out: any guess. A process uses a GPU when its role was configured to have one and never otherwise, so a
machine with an idle GPU and one without train the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """device: where tensors live. backend: of the process group. accelerator: what DeepSpeed calls it."""

    device: torch.device
    backend: Literal["nccl", "gloo"]
    accelerator: Literal["cuda", "cpu"]


def assigned_compute(gpus: float) -> Compute:
    """The device of a process whose role has `gpus` GPUs: the first one Ray shows it, or the CPU for 0.

    Raises ValueError when the configuration asks for a GPU and torch sees none.
    """
    import torch

    if gpus == 0:
        return Compute(device=torch.device("cpu"), backend="gloo", accelerator="cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"gpus: must be 0 where torch sees no GPU, got {gpus}; set it to 0, or install a CUDA build of torch on a machine with a GPU")
    return Compute(device=torch.device("cuda", 0), backend="nccl", accelerator="cuda")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a configured `Dtype`."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
