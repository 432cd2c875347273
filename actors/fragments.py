"""Where each ZeRO stage keeps a rank's share of what training changes: the float32 master weights and AdamW's two moments.

DeepSpeed cuts and stores them in four ways, by stage and dtype; here all become ranges of named parameters. This is the one file that knows
those layouts. It works on the optimiser objects it is given and imports nothing of DeepSpeed.

DeepSpeed's own links from parameters to moments (`optim_fragment`) are not used: they may point at tensors that AdamW no longer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A range of one parameter's training state, as views to read and to fill.

    numel: of the whole parameter. start: of the range, in the flattened parameter. step: AdamW's counter, one for all fragments
    that lie in one flat tensor.
    """

    name: str
    numel: int
    start: int
    weight: Tensor  # (n,) float32
    exp_avg: Tensor  # (n,) float32
    exp_avg_sq: Tensor  # (n,) float32
    step: Tensor  # () float32

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def part(self, rank: int, ranks: int) -> Fragment:
        """The rank-th of `ranks` nearly equal parts; one may be empty."""
        first, last = (len(self.weight) * i // ranks for i in (rank, rank + 1))
        weight, exp_avg, exp_avg_sq = (tensor[first:last] for tensor in self.tensors.values())
        return replace(self, start=self.start + first, weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """A range of one parameter in the dtype the model computes in, as a view to fill."""

    name: str
    start: int
    values: Tensor  # (n,)


class _Place(NamedTuple):
    """`size` elements of a parameter, from `start` on, lie in the tensor that AdamW steps, from `offset` on."""

    parameter: nn.Parameter
    start: int
    size: int
    master: Tensor
    offset: int


def fragments_of(model: nn.Module, optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> list[Fragment]:
    """What this rank holds of every trainable parameter. optimizer: what DeepSpeed made of `adamw`.

    Where AdamW has no state yet it is made, as AdamW would at its next step: a counter at 0 with zero moments is the same as none.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    out = []
    for place in _LAYOUTS[type(optimizer).__name__](optimizer, adamw, rank):
        state = _adamw_state(adamw, place.master)
        flat = {"weight": place.master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        views = {kind: tensor.detach().view(-1).narrow(0, place.offset, place.size) for kind, tensor in flat.items()}
        out.append(Fragment(name=names[place.parameter], numel=numel_of(place.parameter), start=place.start, step=state["step"], **views))
    return out


def working_of(model: nn.Module, rank: int) -> Iterator[Working]:
    """The trainable parameters as this rank holds them: whole, and at stage 3, where they must be partitioned, its share."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            start, size = _share(parameter, rank)
            yield Working(name=name, start=start, values=parameter.ds_tensor.detach()[:size])
        else:
            yield Working(name=name, start=0, values=parameter.detach().view(-1))


def numel_of(parameter: nn.Parameter) -> int:
    """Of the whole parameter; a partitioned one has no elements of its own."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _adamw_state(adamw: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    state: dict[str, Tensor] = adamw.state[master]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format, requires_grad=False)
    return state


def _plain(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stage 0, float32: the model's parameters themselves."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            yield _Place(parameter, 0, parameter.numel(), parameter, 0)


def _copies(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stage 0, bfloat16: a float32 copy of each parameter."""
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            yield _Place(parameter, 0, parameter.numel(), master, 0)


def _flat_partition(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stages 1 and 2: the parameters of a group end to end, cut into one piece per rank; most ranks hold parts of few parameters."""
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    for parameters, group in zip(groups, adamw.param_groups, strict=True):
        [master] = group["params"]
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _Place(parameter, there.start, here.numel, master, here.start)


def _partitioned_parameters(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stage 3: each parameter padded and cut into one piece per rank; this rank's pieces end to end."""
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            yield _Place(parameter, *_share(parameter, rank), master, offset)
            offset += parameter.partition_numel()


def _share(parameter: Any, rank: int) -> tuple[int, int]:
    """(start, size) of this rank's piece of a partitioned parameter, without its padding; the last ranks' pieces may be nothing else."""
    start = min(rank * parameter.partition_numel(), parameter.ds_numel)
    return start, min(parameter.partition_numel(), parameter.ds_numel - start)


_LAYOUTS = {
    "AdamW": _plain,
    "FP16_UnfusedOptimizer": _copies,
    "BF16_Optimizer": _flat_partition,
    "DeepSpeedZeroOptimizer": _flat_partition,
    "DeepSpeedZeroOptimizer_Stage3": _partitioned_parameters,
}
