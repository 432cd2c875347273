"""An estimate of memory and disk: the parameters of the models, times the copies that each process keeps.

Left out: activations, which depend on micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from actors.config import Dtype, LearnerConfig, settled
from actors.hub import is_cached, is_path
from pipeline.config.run_config import RunConfig

PROCESS_GB = 0.45  # Python, torch, transformers and Ray's worker, measured on Linux without a GPU
_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What memory depends on. parameters: numbers, not bytes. partner: of the model that talks with the policy."""

    parameters: int
    layers: int
    kv_width: int
    context: int
    partner: Shape | None = None


def shape_of(config: RunConfig) -> Shape:
    """Of the model of a recipe, which must be here, or of the new one. A partner that is not here is left out."""
    model, partner = config.model, config.environment.partner
    beside = _shape_in(partner) if partner and (is_path(partner) or is_cached(partner)) else None
    if model.path:
        return replace(_shape_in(model.path), partner=beside)
    blocks = model.layers * (12 * model.width**2 + 13 * model.width)
    return Shape(
        parameters=blocks + (model.vocabulary + model.context + 2) * model.width,
        layers=model.layers,
        kv_width=model.width,
        context=model.context,
        partner=beside,
    )


def _shape_in(path: str) -> Shape:
    """Of a model in a folder or in the hub's cache."""
    import torch
    from transformers import AutoModelForCausalLM

    from actors.models.causal_lm import config_of, context_of

    found = config_of(path)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(found).parameters())
    text = found.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 0)  # none where states take the place of keys and values
    kv_width = text.hidden_size // heads * (getattr(text, "num_key_value_heads", None) or heads) if heads else 0
    return Shape(parameters=parameters, layers=text.num_hidden_layers, kv_width=kv_width, context=context_of(path))


def role_bytes(config: RunConfig, role: str, shape: Shape) -> float:
    """Bytes of one process of the role, beyond the process itself."""
    if role in ("policy", "critic"):
        return learner_bytes(config.policy if role == "policy" else config.critic, shape.parameters)
    if role == "rollout":
        width = _BYTES[settled(config.rollout.dtype)]
        tokens = shape.context if config.environment.name else config.most_tokens
        # now and then, to see the KL to it
        start = 0 if config.algorithm.needs_reference or not config.algorithm.kl_every else shape.parameters
        held = start + _engine_numbers(shape, config.rollout.slots, tokens)
        if partner := shape.partner:
            held += _engine_numbers(partner, config.rollout.slots, partner.context)
        return width * held
    return _BYTES[settled(config.reference.dtype)] * shape.parameters if role == "reference" else 0.0


def _engine_numbers(shape: Shape, slots: int, tokens: int) -> int:
    """Parameters, and the keys and values of sequences of so many tokens."""
    return shape.parameters + 2 * slots * tokens * shape.layers * shape.kv_width


def commit_bytes(config: RunConfig, parameters: int) -> float:
    """Weights and two moments in float32 of each learner, less of heads alone; and the older weights in flight."""
    older = config.max_staleness * _BYTES[settled(config.rollout.dtype)] if config.repeats else 0
    return parameters * (12.0 * (2 if config.algorithm.needs_critic else 1) + older)


def learner_bytes(learner: LearnerConfig, parameters: int) -> float:
    """Bytes of weights, gradients, moments and master weights on one rank (Rajbhandari et al. 2020).

    The ZeRO stage decides which of them are divided by the number of ranks.
    """
    width = _BYTES[settled(learner.dtype)]
    state = 12.0 if learner.dtype == "bfloat16" else 8.0 + (4.0 if learner.zero_stage else 0.0)
    share = [1 / learner.ranks if learner.zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    return parameters * (width * share[2] + width * share[1] + state * share[0])
