"""The rows of a chunk: requests and their completions as a table of Rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors import ragged
from actors.engine.protocol import Completion, Request
from actors.experience import Rollouts


def rollouts_of(
    requests: Sequence[Request],
    completions: Sequence[Completion],
    finishes: Sequence[str],
    metadata: pa.ChunkedArray | Sequence[str],
    version: int,
    offered: Sequence[npt.NDArray[np.bool_]] = (),
    begun_versions: Sequence[npt.NDArray[np.int32]] = (),
) -> pa.Table:
    """The Rollouts table: one row a request, in order. N is the sum of all lengths.

    version: of the tokens that were sampled now. offered: (turns, K) of each request, where a manager chose options.
    begun_versions: (M,) of each request, where an earlier call has begun them.
    """
    if not requests:
        return Rollouts.concat([]).table
    parts = [part for r, c in zip(requests, completions, strict=True) for part in (r.prompt, c.tokens)]
    starts = np.array([len(r.prompt) for r in requests], np.int32)
    lengths = starts + np.array([len(c.tokens) for c in completions], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    behind = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) >= np.repeat(starts, lengths)  # (N,)
    action, logprobs = np.zeros(offsets[-1], np.bool_), np.zeros(offsets[-1], np.float32)
    action[behind] = np.concatenate([c.sampled for c in completions])
    logprobs[behind] = np.concatenate([c.logprobs for c in completions])
    versions = np.where(action, version, -1).astype(np.int32)
    for first, start, known in zip(offsets, starts, begun_versions, strict=False):
        versions[first + start : first + start + len(known)] = known
    turns = np.concatenate(
        [start + np.array(c.turn_starts, np.int32) for start, c in zip(starts, completions, strict=True)]
    )
    turn_offsets = np.concatenate([[0], np.cumsum([len(c.turn_starts) for c in completions])])
    options = {}
    if offered:
        options = {
            "option_features": [c.features.ravel() for c in completions],
            "options_offered": [of_turns.ravel() for of_turns in offered],
            "last_features": [
                np.zeros(0, np.float32) if c.last_features is None else c.last_features for c in completions
            ],
        }
    return Rollouts.of(
        {
            "sample_id": np.array([r.sample_id for r in requests], np.int64),
            "group_id": np.array([r.group_id for r in requests], np.int64),
            "tokens": ragged.unflat(np.concatenate(parts), offsets, pa.int32()),
            "action_mask": ragged.unflat(action, offsets, pa.bool_()),
            "logprobs": ragged.unflat(logprobs, offsets, pa.float32()),
            "versions": ragged.unflat(versions, offsets, pa.int32()),
            "turn_starts": ragged.unflat(turns.astype(np.int32), turn_offsets, pa.int32()),
            "option": [c.options for c in completions],
            "option_logprobs": [c.option_logprobs for c in completions],
            **options,
            "finish": list(finishes),
            "metadata": metadata,
        }
    ).table
