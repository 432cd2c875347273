"""The choice of the next token: temperature, top-k, top-p, then inverse-CDF with one uniform number a token.

Shapes: B rows, V vocabulary, N blocks of `BLOCK` tokens.

Each token takes one uniform number from a counter-based generator keyed by (seed, sample_id). So the randomness of a
sample does not depend on slot, worker and neighbours. Inverse-CDF needs a running sum over the vocabulary: sums of
blocks first, then the running sum inside the block that was hit. This reads the row twice and limits float32 rounding
to 256 terms.

Left out: masking of ids that the tokenizer does not know (a vocabulary padded beyond it). The learner recomputes
log-probs with the full softmax, so they stay possible; such an id decodes to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from actors.config import SamplingConfig

BLOCK = 256


def uniforms(seed: int, sample_id: int, count: int) -> npt.NDArray[np.float64]:
    """The random numbers of a sample in [0, 1), (count,); a longer request begins with the same numbers.

    The generator is Philox (Salmon et al. 2011).
    """
    key = np.array([seed % 2**64, sample_id % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def sample(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token a row; returns tokens (B,) int64 and their log-probs (B,) float32 under that distribution.

    logits: (B, V) float32. uniform: (B,) float64 in [0, 1). Temperature 0 takes the likeliest token and reports its
    log-prob under the softmax without a temperature. A row whose logits are not finite has a log-prob that is not
    finite.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return _inverse_cdf(logits, uniform)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all except the k largest logits of each row to minus infinity; ties with the k-th stay."""
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set logits outside the smallest set of likeliest tokens with probability p to minus infinity; ties stay.

    Holtzman et al. 2020. Only as much of each row is sorted as it takes to reach p.
    """
    log_z = torch.logsumexp(logits.double(), -1, keepdim=True)
    vocabulary, width = logits.shape[-1], min(BLOCK, logits.shape[-1])
    while True:
        top = logits.topk(width, dim=-1).values  # (B, width), descending
        reached = (top.double() - log_z).exp().cumsum(-1)
        if width == vocabulary or bool((reached[:, -1] >= p).all()):
            break
        width = min(8 * width, vocabulary)
    # the token with which the sum reaches p belongs to the set
    last = (reached < p).sum(-1, keepdim=True).clamp(max=width - 1)
    return logits.masked_fill(logits < top.gather(-1, last), -torch.inf)


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the running sum of probabilities first exceeds the uniform number.

    So a token of probability zero is never chosen. The target is kept below the sum it is compared with in two places
    where rounding could reach it: for the whole row (uniform * total may round up to total), and in the block (whose
    float32 sum and running sum may differ in the last bit).
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    zero = logits.new_zeros((), dtype=torch.float64)
    peak = logits.amax(-1, keepdim=True)
    weights = logits.new_empty(rows, blocks * BLOCK)
    weights[:, vocabulary:] = 0
    torch.sub(logits, peak, out=weights[:, :vocabulary]).exp_()
    weights = weights.view(rows, blocks, BLOCK)
    # (B, N + 1), up to the start of each block, and the total
    sums = nn.functional.pad(weights.sum(-1).double().cumsum(-1), (1, 0))
    total = sums[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, zero))
    block = (sums[:, 1:] <= target).sum(-1, keepdim=True)  # (B, 1)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)  # (B, BLOCK)
    target = torch.minimum(target - sums.gather(-1, block), torch.nextafter(inside[:, -1:], zero))
    tokens = block * BLOCK + (inside <= target).sum(-1, keepdim=True)
    logprobs = logits.gather(-1, tokens) - peak - total.log()
    return tokens.squeeze(-1), logprobs.squeeze(-1).float()
