"""Linear layers that keep their weight in oneDNN's own layout, so that no product converts it again. For CPUs.

Shapes: B rows, I inputs, O outputs.

Generation multiplies a few rows by the same weights thousands of times between two versions. With this layout, and with
bias and activation inside the product, the linear layers of GPT-2 are 1.5 times as fast, at the price of a second copy
of the weights. Left out: quantisation (the learner could not recompute the log-probs), and GPUs (nothing to gain).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actors.device import packs_bfloat16

ROWS = 64  # number of rows for which the layout is chosen; it works for any number
SMALLEST = 2**18  # weights; with fewer, float32 products outside oneDNN are as fast or, when tiny, four times as fast


class PackedLinear(nn.Module):
    """A linear layer with the parameters of another one, (B, I) -> (B, O). gelu: apply GELU (tanh form) after it."""

    def __init__(self, layer: Any, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self._transposed = not isinstance(layer, nn.Linear)
        self._activation = ("gelu", "tanh") if gelu else ("none", "")
        self._packed = torch.empty(0)
        self._version = -1  # version of the weight when it was packed

    def forward(self, rows: Tensor) -> Tensor:
        if self._version != self.weight._version:
            weight = self.weight.detach().t() if self._transposed else self.weight.detach()  # (O, I)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
            self._version = self.weight._version
        kind, form = self._activation
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, kind, [], form)  # type: ignore[no-any-return]


def pack_linears(model: nn.Module) -> None:
    """Replace a model's linear layers where that is faster; names, ties and values of its parameters stay."""
    from transformers.activations import GELUTanh, NewGELUActivation
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        if isinstance(module, GPT2MLP) and isinstance(module.act, (NewGELUActivation, GELUTanh)):
            # the activation alone takes 0.3 ms of a layer's 3 ms; inside the product it takes almost none
            if _pays(module.c_fc.weight):
                module.c_fc, module.act = PackedLinear(module.c_fc, gelu=True), nn.Identity()
            else:
                module.act = nn.GELU(approximate="tanh")  # the same function in one pass instead of eight
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, Conv1D)) and _pays(child.weight):
                setattr(module, name, PackedLinear(child))


def _pays(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return packs_bfloat16()
    return weight.dtype == torch.float32 and weight.numel() >= SMALLEST
