"""The one place that chooses the device of a process and the communication backend of a gang.

Left out: guesses. A process uses a GPU only if its role was configured to have one, so a machine with an idle GPU and
one without train in the same way.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from actors.config import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """The device of a process, the backend of its process group, and DeepSpeed's name of the device."""

    device: torch.device
    backend: Literal["nccl", "gloo"]
    accelerator: Literal["cuda", "cpu"]


def assigned_compute(gpus: float) -> Compute:
    """The device of a process whose role has `gpus` GPUs: the first one that Ray shows it, or the CPU for 0.

    Raises ValueError when the configuration asks for a GPU and torch sees none.
    """
    import torch

    if gpus == 0:
        return Compute(device=torch.device("cpu"), backend="gloo", accelerator="cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"gpus: must be 0 where torch sees no GPU, got {gpus}; set it to 0, or install a CUDA build of torch on a "
            "machine with a GPU"
        )
    return Compute(device=torch.device("cuda", 0), backend="nccl", accelerator="cuda")


def computes_bfloat16(gpus: float) -> bool:
    """Whether the device of a role with `gpus` GPUs has arithmetic for bfloat16.

    Otherwise it is emulated, on a CPU at a hundredth of float32's speed. The hardware's flags decide, not a
    measurement, so one machine always gives the same answer. Raises ValueError for a GPU that torch does not see.
    """
    import torch

    if assigned_compute(gpus).accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # AVX-512 alone is not enough on x86: oneDNN then accepts bfloat16 and converts it back and forth. On ARM it checks
    # for the instructions themselves.
    return packs_bfloat16() and (platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported())


def bfloat16_slowdown(gpus: float = 0, *, size: int = 128, seconds: float = 0.1) -> float:
    """Time of a product of size x size matrices in bfloat16, divided by that in float32; below 1, it is faster.

    The measurement takes about 2 * seconds.
    """
    return matrix_speed("float32", gpus, size=size, seconds=seconds) / matrix_speed(
        "bfloat16", gpus, size=size, seconds=seconds
    )


def matrix_speed(dtype: Dtype, gpus: float = 0, *, size: int = 512, seconds: float = 0.2) -> float:
    """Operations a second in the product of two size x size matrices: the best within about `seconds`.

    gpus: of the role whose device is measured.
    """
    import torch

    matrix = torch.ones(size, size, dtype=torch_dtype(dtype), device=assigned_compute(gpus).device)
    float((matrix @ matrix)[0, 0])  # the first product sets things up and is not counted
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or least == float("inf"):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # the value is read, so that a GPU has finished
        least = min(least, time.perf_counter() - started)
    return 2 * size**3 / least


def packs_bfloat16() -> bool:
    """Whether oneDNN can pack bfloat16 weights on this CPU.

    Its operators raise where it cannot: on x86 without AVX-512, on ARM without bfloat16.
    """
    import torch

    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a configured `Dtype`."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
