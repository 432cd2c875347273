"""What a learner trains, role by role: the model it makes of a folder, the tables it reads and writes, and the folder it makes of the model.

role     made of                            learns from    infers          is exported as
policy   a causal LM                        Experience     TokenLogprobs   a causal LM
critic   a causal LM, or a reward model     Experience     TokenValues     -
reward   a causal LM, or a classifier       Comparisons    TokenValues     a sequence classifier
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import LearnerConfig
from actors.device import torch_dtype
from actors.experience import Comparisons, Rollouts, TokenLogprobs, TokenValues
from actors.micro_batches import Batch
from actors.model import PolicyModel, ValueModel, is_classifier, load_causal_lm, load_tokenizer, save_model
from actors.packing import check_packing
from actors.reward_model import RewardModel, head_of, load_classifier, load_reward_model

Role = Literal["policy", "critic", "reward"]
Trainee = PolicyModel | ValueModel | RewardModel


def make_trainee(role: Role, path: str, config: LearnerConfig, *, temperature: float, seed: int) -> tuple[Trainee, int]:
    """The model that a role starts from in a folder or hub name, with what it is to train left trainable, and its context in tokens.

    Raises ValueError naming the path when it cannot be had from there, or cannot be packed where the configuration says so.
    """
    dtype, heads_only = torch_dtype(config.dtype), config.trainable == "heads"
    loaded: Any
    trainee: Trainee
    if role == "reward":
        trainee = load_reward_model(path, dtype, seed)
        loaded = trainee.classifier
    elif role == "critic" and is_classifier(path):
        loaded = load_classifier(path, dtype)
        trainee = ValueModel(loaded, head_of(loaded).weight)
    else:
        loaded = load_causal_lm(path, dtype, untie_head=heads_only and role == "policy")
        trainee = PolicyModel(loaded, temperature) if role == "policy" else ValueModel(loaded)
    if config.pack_tokens:
        check_packing(loaded, path)
    if heads_only:
        trainee.requires_grad_(False)
        trainee.head.requires_grad_(True)
    return trainee, int(loaded.config.max_position_embeddings)


def sequences_of(role: Role, tables: tuple[pa.Table, ...], device: torch.device) -> Batch:
    """What a role infers about: Rollouts, or Comparisons for a reward model; the tables are taken as one. Raises ValueError for others."""
    kind: Any = Comparisons if role == "reward" else Rollouts
    return Batch(kind.concat([kind(table) for table in tables]).table, device)


def inferred(role: Role, sample_ids: npt.NDArray[Any], column: pa.ListArray) -> pa.Table:
    """What a role infers, as its table."""
    if role == "policy":
        return TokenLogprobs.of({"sample_id": sample_ids, "logprobs": column}).table
    return TokenValues.of({"sample_id": sample_ids, "values": column}).table


def published(trainee: Trainee) -> nn.Module:
    """What others know the parameters of: the transformers model itself, without this floor's wrapper."""
    if isinstance(trainee, ValueModel):
        return trainee
    model: nn.Module = trainee.causal_lm if isinstance(trainee, PolicyModel) else trainee.classifier
    return model


def save_trainee(trainee: Trainee, path: str, folder: Path, standard: tuple[float, float] | None) -> None:
    """Write a policy or reward model, whole on this rank, and the tokenizer of `path`. standard: mean and std of rewards to be brought to 0 and 1."""
    if isinstance(trainee, PolicyModel):
        save_model(trainee.causal_lm, load_tokenizer(path), folder)
        return
    assert isinstance(trainee, RewardModel), "nobody reads a critic"
    changed: dict[str, Tensor] = {} if standard is None else trainee.standardised(*standard)
    trainee.save(folder, path, changed)
