"""An estimate of memory and disk: the parameters of the models, times the copies that each process keeps.

Left out: activations, which depend on micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.config import Dtype, LearnerConfig, settled
from pipeline.config.run_config import RunConfig

PROCESS_GB = 0.45  # Python, torch, transformers and Ray's worker, measured on Linux without a GPU
_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What memory depends on. parameters: numbers, not bytes."""

    parameters: int
    layers: int
    kv_width: int
    context: int


def shape_of(config: RunConfig) -> Shape:
    """Of the model of a recipe, which must be here, or of the new one."""
    model = config.model
    if not model.path:
        blocks = model.layers * (12 * model.width**2 + 13 * model.width)
        parameters = blocks + (model.vocabulary + model.context + 2) * model.width
        return Shape(parameters=parameters, layers=model.layers, kv_width=model.width, context=model.context)
    import torch
    from transformers import AutoModelForCausalLM

    from actors.models.causal_lm import config_of, context_of

    found = config_of(model.path)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(found).parameters())
    text = found.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0)  # none where states take the place of keys and values
    kv_width = text.hidden_size // heads * (getattr(text, "num_key_value_heads", None) or heads) if heads else 0
    return Shape(
        parameters=parameters, layers=text.num_hidden_layers, kv_width=kv_width, context=context_of(model.path)
    )


def role_bytes(config: RunConfig, role: str, shape: Shape) -> float:
    """Bytes of one process of the role, beyond the process itself."""
    if role in ("policy", "critic"):
        return learner_bytes(config.policy if role == "policy" else config.critic, shape.parameters)
    if role == "rollout":
        width = _BYTES[settled(config.rollout.dtype)]
        tokens = shape.context if config.environment.name else config.most_tokens
        # now and then, to see the KL to it
        start = 0 if config.algorithm.needs_reference or not config.algorithm.kl_every else shape.parameters
        return width * (start + shape.parameters + 2 * config.rollout.slots * tokens * shape.layers * shape.kv_width)
    return _BYTES[settled(config.reference.dtype)] * shape.parameters if role == "reference" else 0.0


def commit_bytes(config: RunConfig, parameters: int) -> float:
    """Weights and two moments in float32 of each learner; of heads alone it is less."""
    return 12.0 * parameters * (2 if config.algorithm.needs_critic else 1)


def learner_bytes(learner: LearnerConfig, parameters: int) -> float:
    """Bytes of weights, gradients, moments and master weights on one rank (Rajbhandari et al. 2020).

    The ZeRO stage decides which of them are divided by the number of ranks.
    """
    width = _BYTES[settled(learner.dtype)]
    state = 12.0 if learner.dtype == "bfloat16" else 8.0 + (4.0 if learner.zero_stage else 0.0)
    share = [1 / learner.ranks if learner.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    return parameters * (width * share[2] + width * share[1] + state * share[0])
