"""Demonstrations as the experience that a learner reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.experience import Experience
from pipeline.tasks.task import Demonstration

if TYPE_CHECKING:
    from actors.models.text import TextCodec


def demonstration_ids(demonstrations: Sequence[Demonstration], codec: TextCodec) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of each demonstration; the response ends with the end-of-text token.

    The two are encoded separately, so a prompt has the same ids in supervised fine-tuning as in rollouts.
    """
    prompts = codec.encode_prompts([demonstration.prompt for demonstration in demonstrations])
    responses = codec.encode_replies([demonstration.response for demonstration in demonstrations])
    return [
        (prompt, [*response, codec.tokenizer.eos_token_id]) for prompt, response in zip(prompts, responses, strict=True)
    ]


def demonstration_table(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Experience:
    """Pairs of (prompt ids, response ids) as experience.

    The tokens of the response are the actions. All that a policy, critic or reward would add is zero.
    """
    starts = np.array([len(p) for p, _ in pairs], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(p) + len(r) for p, r in pairs])])
    tokens = np.array([token for p, r in pairs for token in (*p, *r)], np.int32)
    action = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets)) >= np.repeat(starts, np.diff(offsets))
    ids, nothing = np.arange(len(pairs)), np.zeros(len(pairs) + 1, np.int32)
    zeros = ragged.unflat(np.zeros(offsets[-1], np.float32), offsets, pa.float32())
    empty = ragged.unflat(np.zeros(0, np.float32), nothing, pa.float32())
    return Experience.of(
        {
            "sample_id": ids,
            "group_id": ids,
            "tokens": ragged.unflat(tokens, offsets, pa.int32()),
            "action_mask": ragged.unflat(action, offsets, pa.bool_()),
            "versions": ragged.unflat(np.full(offsets[-1], -1, np.int32), offsets, pa.int32()),
            "turn_starts": ragged.unflat(starts, np.arange(len(pairs) + 1), pa.int32()),
            "option": ragged.unflat(np.zeros(0, np.int16), nothing, pa.int16()),
            "option_logprobs": empty,
            "finish": ["stop"] * len(pairs),
            "metadata": ["{}"] * len(pairs),
            "reward": np.zeros(len(pairs), np.float32),
            "turn_rewards": empty,
            **dict.fromkeys(
                ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns"), zeros
            ),
        }
    )
