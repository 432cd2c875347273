"""A trial of an algorithm on made-up rewards: can it learn from a step of the recipe's shape?

An algorithm declares its needs (`min_group_size`). The trial finds undeclared ones, such as a baseline that is the
sample itself, and errors in the advantages of a user's own algorithm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.algorithms.base import Trajectories
from pipeline.algorithms.estimators import whiten

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.algorithms.base import Algorithm

_PROMPTS = 3  # are as good as many
_TOKENS = 2


def check_learns(algorithm: Algorithm, *, prompts: int, group_size: int, max_new_tokens: int) -> None:
    """Raises ValueError when the algorithm cannot compute advantages, or when all of them are 0.

    The rewards of the trial are all different, so advantages of 0 mean that no step could change the policy.
    """
    import torch

    width = min(max_new_tokens, _TOKENS)
    groups = torch.arange(min(prompts, _PROMPTS)).repeat_interleave(group_size)
    scores = torch.arange(len(groups), dtype=torch.float32) + 1  # all different
    rewards = torch.zeros(len(groups), width)
    rewards[:, -1] = scores
    mask = torch.ones(len(groups), width, dtype=torch.bool)
    found = _advantages(
        algorithm,
        Trajectories(rewards=rewards, values=torch.zeros_like(rewards), scores=scores, groups=groups, mask=mask),
    )
    if not (whiten(found, mask) if algorithm.whiten_advantages else found).any():
        raise ValueError(
            f"batch.group_size: must let algorithm {algorithm.name!r} compare samples, got {group_size} with "
            f"batch.prompts {prompts}: "
            "every advantage would be 0 and no step would change the policy; raise batch.group_size or batch.prompts"
        )


def _advantages(algorithm: Algorithm, batch: Trajectories) -> Tensor:
    """The advantages of a step. Raises ValueError where they, or the returns, are not as they must be."""
    import torch

    from actors.reward.worker import user_code

    with user_code(f"algorithm.name: must compute the advantages of a step, got {algorithm.name!r}"):
        found = algorithm.advantages(batch)
        columns = {"advantages": found.advantages, "returns": found.returns}
    for name, column in columns.items():
        is_tensor = isinstance(column, torch.Tensor)
        if not is_tensor or column.shape != batch.mask.shape or not torch.isfinite(column).all():
            got = f"{tuple(column.shape)}, {column.dtype}" if is_tensor else f"a {type(column).__name__}"
            raise ValueError(
                f"algorithm.name: must compute {name} that are a finite number for each token, got {got} from "
                f"{algorithm.name!r} for a step of {tuple(batch.mask.shape)}; see pipeline/algorithms/README.md"
            )
    return found.advantages
