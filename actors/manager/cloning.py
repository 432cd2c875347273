"""A manager that begins by choosing as the demonstrations do, instead of at random.

    demonstrations "... <|option:ask|>" --model--> features h before the option --logistic regression--> W, b

At random, an early option ends most conversations badly, and the manager learns to end them at once. Imitation is to
the manager what fine-tuning is to the policy.

Shapes: N demonstrations, D features, K options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from actors.manager.option_head import EPSILON, Floats
from actors.models.causal_lm import load_causal_lm

MOST = 4096  # demonstrations; more would not change the head by much
RIDGE = 1e-3  # weight of the squared norm of W, so that the optimum is unique and finite
_ROWS = 32  # of one forward pass
_STEPS = 200


def clone_head(path: str, contexts: Sequence[Sequence[int]], options: Sequence[int], count: int) -> dict[str, Floats]:
    """The head that most likely chose these options; the same bits on every machine of one kind.

    path: folder of the model. contexts: tokens before each option, none empty. options: their numbers, from 0. count:
    K. Raises ValueError when there is no demonstration of some option.
    """
    lacking = sorted({*range(count)} - {*options})
    if lacking:
        raise ValueError(f"options: must each be demonstrated, got none of number {lacking[0]}")
    with _one_thread():
        features = _features(path, contexts)
        normed = functional.layer_norm(features.double(), features.shape[-1:], eps=EPSILON)
        weight, bias = _regression(normed, torch.tensor(list(options)), count)
    return {"policy_weight": weight.float().numpy(), "policy_bias": bias.float().numpy()}


@torch.no_grad()
def _features(path: str, contexts: Sequence[Sequence[int]]) -> Tensor:
    """The final hidden state of the last token of each context, (N, D), in float32.

    Rows are sorted by length and padded on the right, where a causal model does not see it.
    """
    trunk = load_causal_lm(path, torch.float32).base_model.eval()
    order = sorted(range(len(contexts)), key=lambda row: len(contexts[row]))
    found: list[Tensor] = [torch.empty(0)] * len(contexts)
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        lengths = [len(contexts[row]) for row in rows]
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        for place, row in enumerate(rows):
            ids[place, : lengths[place]] = contexts[row]
        states = trunk(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
        for place, row in enumerate(rows):
            found[row] = states[place, lengths[place] - 1]
    return torch.stack(found)


def _regression(normed: Tensor, options: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with a ridge: (N, D) float64, (N,) -> W (K, D), b (K,)."""
    weight = torch.zeros(count, normed.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(functional.linear(normed, weight, bias), options)
        value = value + RIDGE * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads is part of a sum's order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def demonstrated(ids: Sequence[Sequence[int]], tokens: Sequence[int]) -> npt.NDArray[np.int64]:
    """The number of the option whose control token ends each sequence; -1 where none does. tokens: of the options."""
    numbers = {token: number for number, token in enumerate(tokens)}
    return np.array([numbers.get(row[-1], -1) if len(row) else -1 for row in ids], np.int64)
