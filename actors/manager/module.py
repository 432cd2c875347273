"""The manager's model: two linear heads on LN(h). Imports RLlib, so import this file late.

    pi(o | h) = softmax(W · LN(h) + b) over the options on offer        V(h) = v · LN(h) + c

The layer norm has no parameters of its own: W and v can take up its scale and shift. So the heads share nothing that is
trained, and the value's loss does not move the policy. All weights begin at zero: every option on offer is equally
likely, V is 0, and there is no random initialisation.

Shapes: B turns, D features, K options.
"""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn
from torch.nn import functional

from actors.manager.option_head import EPSILON

FEATURES, OFFERED = "features", "offered"  # of an observation


class OptionModule(TorchRLModule, ValueFunctionAPI):
    """The model as RLlib asks for it. model_config: {"width": D, "options": K}."""

    def setup(self) -> None:
        width, options = self.model_config["width"], self.model_config["options"]
        self.policy_weight = nn.Parameter(torch.zeros(options, width))
        self.policy_bias = nn.Parameter(torch.zeros(options))
        self.value_weight = nn.Parameter(torch.zeros(1, width))
        self.value_bias = nn.Parameter(torch.zeros(1))

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        """Logits (B, K), minus infinity for options that are not on offer."""
        seen = batch[Columns.OBS]
        logits = functional.linear(_normed(seen[FEATURES]), self.policy_weight, self.policy_bias)
        return {Columns.ACTION_DIST_INPUTS: logits.masked_fill(~seen[OFFERED], -torch.inf)}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """V(h) of each turn, (B,)."""
        normed = _normed(batch[Columns.OBS][FEATURES])
        return functional.linear(normed, self.value_weight, self.value_bias).squeeze(-1)


def _normed(features: Tensor) -> Tensor:
    return functional.layer_norm(features, features.shape[-1:], eps=EPSILON)
