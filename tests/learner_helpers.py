"""What the learner's tests share: a tiny model, made-up experience, two plain objectives, and a gang of real gloo
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from actors.config import LearnerConfig
from actors.device import assigned_compute
from actors.experience import Comparisons, Experience
from actors.learner.deepspeed_engine import _import_deepspeed
from actors.learner.learner import Learner, LearnerSpec, UpdatePlan, UpdateReport
from actors.learner.micro_batches import Batch, Rows
from actors.learner.trainees.base import Trainee
from actors.learner.trainees.critic import CriticTrainee
from actors.learner.trainees.policy import PolicyTrainee
from actors.learner.trainees.reward_model import RewardModelTrainee
from actors.models.reward_model import Preference
from actors.objective import ActionTokens
from ports import free_port

STAGES = (0, 1, 2, 3)
VOCABULARY = 96
POISON = 666.0  # an advantage that makes PolicyGradient's loss finite and its gradient infinite


def stages(*quick: int) -> list[Any]:
    """Every ZeRO stage as a test's parameter; `make check` is content with the quick ones."""
    return [stage if stage in quick else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]


def save_tiny_model(folder: Path, *, seed: int = 0, width: int = 32) -> str:
    """A GPT-2 of 2 layers x `width` with a byte-level tokenizer of no merges, as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=width,
        n_layer=2,
        n_head=1 if width % 2 else 2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # gradients and log-probs of a visible size
    model.save_pretrained(folder)
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class PolicyGradient:
    """-ratio * advantage: the plainest loss whose gradient is the policy gradient."""

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -torch.exp(logprobs - batch.proximal_logprobs) * batch.advantages
        poisoned = torch.sqrt(logprobs - logprobs.detach())  # 0 with an infinite slope
        loss = (
            torch.where(batch.advantages == POISON, poisoned, loss)
            if bool((batch.advantages == POISON).any())
            else loss
        )
        return loss, {"entropy": entropy, "advantage": batch.advantages}


@dataclass(frozen=True)
class SquaredError:
    """(V - R)^2 / 2."""

    def value_loss(self, values: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        loss = 0.5 * (values - batch.returns) ** 2
        return loss, {"value": values, "return": batch.returns}


def make_experience(rows: int = 11, *, seed: int = 0, proximal: dict[int, list[float]] | None = None) -> pa.Table:
    """Rollouts of 3-20 random tokens with random numbers in every learnt-from column, zero at the prompt's tokens."""
    rng = np.random.default_rng(seed)
    prompts, answers = rng.integers(1, 6, rows), rng.integers(2, 15, rows)
    mask = [[False] * p + [True] * a for p, a in zip(prompts, answers, strict=True)]

    def column(scale: float) -> list[list[float]]:
        return [[float(rng.normal() * scale) if chosen else 0.0 for chosen in row] for row in mask]

    logprobs = [[-4.5 + x if x else 0.0 for x in row] for row in column(0.1)]
    return Experience.of(
        {
            "sample_id": list(range(100, 100 + rows)),
            "group_id": list(range(rows)),
            "tokens": [rng.integers(1, VOCABULARY, len(row)).tolist() for row in mask],
            "action_mask": mask,
            "logprobs": logprobs,
            "versions": [[0 if chosen else -1 for chosen in row] for row in mask],
            "turn_starts": [[int(p)] for p in prompts],
            "option": [[] for _ in mask],
            "option_logprobs": [[] for _ in mask],
            "finish": ["stop"] * rows,
            "metadata": ["{}"] * rows,
            "reward": rng.normal(size=rows).tolist(),
            "turn_rewards": [[] for _ in mask],
            "proximal_logprobs": logprobs if proximal is None else [proximal[100 + i] for i in range(rows)],
            "reference_logprobs": logprobs,
            "values": column(1.0),
            "advantages": column(1.0),
            "returns": column(1.0),
        }
    ).table


def rollouts_of(experience: pa.Table) -> pa.Table:
    from actors.experience import Rollouts

    return experience.select(Rollouts.schema.names)


def replace(table: pa.Table, name: str, values: object) -> pa.Table:
    """The table with one column's values replaced."""
    i = table.column_names.index(name)
    return table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))


def make_comparisons(rows: int = 7, *, seed: int = 0, sizes: Sequence[int] = (2, 3)) -> pa.Table:
    """Two or three texts of one prompt, end of text 0; a better one has more of the small words, and every other row
    has a margin.
    """
    rng = np.random.default_rng(seed)

    def ranking(size: int) -> list[list[int]]:
        prompt = rng.integers(1, VOCABULARY, rng.integers(1, 6)).tolist()
        return [
            [*prompt, *rng.integers(1, VOCABULARY // (size - i), rng.integers(2, 10)).tolist(), 0] for i in range(size)
        ]

    return Comparisons.of_texts(
        [ranking(sizes[i % len(sizes)]) for i in range(rows)], [0.5 * (i % 2) for i in range(rows)]
    ).table


TRAINEES: dict[str, Trainee[Any]] = {
    "policy": PolicyTrainee(objective=PolicyGradient(), temperature=0.9),
    "critic": CriticTrainee(objective=SquaredError()),
    "reward": RewardModelTrainee(objective=Preference()),
}


def make_learner(
    path: str,
    config: LearnerConfig,
    *,
    trainee: str | Trainee[Any] = "policy",
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    timeout_s: float = 60.0,
) -> Learner:
    """A connected learner of this trainee, or of the one of `TRAINEES` with that name."""
    trainee = TRAINEES[trainee] if isinstance(trainee, str) else trainee
    spec = LearnerSpec(trainee=trainee, path=path, config=config, total_updates=1000, seed=0)
    learner = Learner(spec=spec, rank=rank, ranks=ranks, timeout_s=timeout_s)
    learner.connect("127.0.0.1", port or free_port())
    return learner


def actions_of(batch: Batch, rows: Rows) -> ActionTokens:
    """What a policy's or a critic's objective is told of these rows."""
    trainee = TRAINEES["policy"]
    assert isinstance(trainee, PolicyTrainee)
    return trainee.actions(batch, rows)


def plan(*, step: int = 0, epochs: int = 2, minibatches: int = 2, aggregation: Any = "token_mean") -> UpdatePlan:
    return UpdatePlan(step=step, epochs=epochs, minibatches=minibatches, seed=7, aggregation=aggregation)


def weights_of(learner: Learner) -> dict[str, Tensor] | None:
    """The model's weights in float32, on rank 0."""
    _, weights = learner.publish(0, "float32")
    return None if weights is None else {name: tensor.clone() for name, tensor in weights.tensors()}


class Gang:
    """Two or more real processes; `run` calls one function on every rank, as f(rank, ranks, port, *arguments)."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._port = free_port()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["actors.learner.learner", "transformers.models.gpt2.modeling_gpt2"])
        pairs = [context.Pipe() for _ in range(ranks)]
        self.processes = [
            context.Process(target=_serve, args=(theirs, rank, ranks, self._port), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        self._pipes = [ours for ours, _ in pairs]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 600.0) -> list[Any]:
        """What every rank returned. A rank's exception is raised here; no answer in time is an AssertionError."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return [self.answer(rank, timeout_s) for rank in range(self.ranks)]

    def answer(self, rank: int, timeout_s: float) -> Any:
        assert self._pipes[rank].poll(timeout_s), f"rank {rank} must answer within {timeout_s} s"
        ok, value = self._pipes[rank].recv()
        if not ok:
            raise value
        return value

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


@contextlib.contextmanager
def gang_of(ranks: int) -> Iterator[Gang]:
    gang = Gang(ranks)
    try:
        yield gang
    finally:
        gang.close()


@functools.cache
def pair() -> Gang:
    """Two ranks that serve every test of the session: processes are daemons, and end with it."""
    gang = Gang(2)
    # what two processes import takes long on a busy machine, and is no test's to wait for
    gang.run(_awake)
    return gang


def _awake(rank: int, ranks: int, port: int) -> None:
    _import_deepspeed(assigned_compute(0))


@dataclass(frozen=True)
class Trained:
    """What some updates did: one report each, and the weights after them."""

    reports: list[UpdateReport]
    weights: dict[str, Tensor]


def train(
    rank: int,
    ranks: int,
    port: int,
    path: str,
    config: LearnerConfig,
    experiences: list[pa.Table],
    plans: list[UpdatePlan],
    trainee: str | Trainee[Any] = "policy",
) -> Trained:
    """A fresh learner after these updates; weights on rank 0 only."""
    learner = make_learner(path, config, trainee=trainee, rank=rank, ranks=ranks, port=port)
    reports = [learner.update(experience, plan) for experience, plan in zip(experiences, plans, strict=True)]
    return Trained(reports=reports, weights=weights_of(learner) or {})


def train_on(ranks: int, *arguments: Any) -> Trained:
    """Rank 0's `Trained`: in this process for one rank, on the pair for two. All ranks report the same."""
    if ranks == 1:
        return train(0, 1, 0, *arguments)
    results = pair().run(train, *arguments)
    # repr: a NaN equals itself
    first, second = (repr([dataclasses.replace(r, seconds=0) for r in result.reports]) for result in results)
    assert first == second
    return results[0]


def _serve(pipe: Any, rank: int, ranks: int, port: int) -> None:
    os.nice(15)  # as Ray does with its workers, or those of a test that runs beside this one would starve
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(rank, ranks, port, *arguments)))
        except Exception as error:  # noqa: BLE001  handed to the test, which raises it
            pipe.send((False, RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")))
