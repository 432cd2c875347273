"""A rank's share of the training state at each ZeRO stage: float32 master weights and AdamW's two moments.

DeepSpeed stores this state in four layouts, by stage and dtype. Here all of them become ranges of named parameters.
Only this file knows the layouts. It works on the optimiser objects that it is given and imports nothing from DeepSpeed.

DeepSpeed's own links from parameters to moments (`optim_fragment`) are not used, because they may point at tensors that
AdamW no longer uses.
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

    numel: number of elements of the whole parameter. start: where the range begins in the flattened parameter. step:
    AdamW's step counter, shared by all fragments in one flat tensor.
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
        """Part number `rank` of `ranks` nearly equal parts; it may be empty."""
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
    """Where a range lies: `size` elements of a parameter from `start` on are elements of `master` from `offset` on.

    master: the tensor that AdamW steps.
    """

    parameter: nn.Parameter
    start: int
    size: int
    master: Tensor
    offset: int


def fragments_of(model: nn.Module, optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> list[Fragment]:
    """The fragments that this rank holds of the trainable parameters. optimizer: DeepSpeed's wrapper of `adamw`.

    If AdamW has no state yet, it is made here, as AdamW would make it at its next step: a counter of 0 with zero
    moments is equal to no state.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    out = []
    for place in _LAYOUTS[type(optimizer).__name__](optimizer, adamw, rank):
        state = adamw_state(adamw, place.master)
        flat = {"weight": place.master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        views = {kind: tensor.detach().view(-1).narrow(0, place.offset, place.size) for kind, tensor in flat.items()}
        out.append(
            Fragment(
                name=names[place.parameter],
                numel=numel_of(place.parameter),
                start=place.start,
                step=state["step"],
                **views,
            )
        )
    return out


def working_of(model: nn.Module, rank: int) -> Iterator[Working]:
    """The trainable parameters as this rank holds them: whole or, at stage 3, its partition."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            start, size = _share(parameter, rank)
            yield Working(name=name, start=start, values=parameter.ds_tensor.detach()[:size])
        else:
            yield Working(name=name, start=0, values=parameter.detach().view(-1))


def numel_of(parameter: nn.Parameter) -> int:
    """The number of elements of a whole parameter; a partitioned parameter itself holds none."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def adamw_state(adamw: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Adam's state of a tensor that it steps, made as Adam makes it if there is none yet."""
    state: dict[str, Tensor] = adamw.state[master]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format, requires_grad=False)
    return state


def _plain(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stage 0 in float32: AdamW steps the model's parameters themselves."""
    for group in adamw.param_groups:
        for parameter in group["params"]:
            yield _Place(parameter, 0, parameter.numel(), parameter, 0)


def _copies(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stage 0 in bfloat16: AdamW steps a float32 copy of each parameter."""
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            yield _Place(parameter, 0, parameter.numel(), master, 0)


def _flat_partition(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stages 1 and 2: the parameters of a group are laid end to end and cut into one piece for each rank."""
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    for parameters, group in zip(groups, adamw.param_groups, strict=True):
        [master] = group["params"]
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _Place(parameter, there.start, here.numel, master, here.start)


def _partitioned_parameters(optimizer: Any, adamw: torch.optim.Optimizer, rank: int) -> Iterator[_Place]:
    """Stage 3: each parameter is padded and cut into one piece for each rank; a rank's pieces lie end to end."""
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            yield _Place(parameter, *_share(parameter, rank), master, offset)
            offset += parameter.partition_numel()


def _share(parameter: Any, rank: int) -> tuple[int, int]:
    """(start, size) of this rank's piece of a partitioned parameter, without padding; size 0 if it is all padding."""
    start = min(rank * parameter.partition_numel(), parameter.ds_numel)
    return start, min(parameter.partition_numel(), parameter.ds_numel - start)


_LAYOUTS = {
    "AdamW": _plain,
    "FP16_UnfusedOptimizer": _copies,
    "BF16_Optimizer": _flat_partition,
    "DeepSpeedZeroOptimizer": _flat_partition,
    "DeepSpeedZeroOptimizer_Stage3": _partitioned_parameters,
}
