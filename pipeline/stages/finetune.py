"""Supervised fine-tuning: imitate the task's demonstrations, on the same learner gang that reinforcement learning uses.

    L_t = -log pi(a_t|s_t) on the tokens of the response; prompt tokens carry no loss.

A demonstration is an experience whose actions are the demonstrated tokens, so nothing here trains: the stage only
lays out tables and decides when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.experience import Experience, Rollouts
from actors.learner import Learner, UpdatePlan
from cluster.faults import RunError
from cluster.gang import Gang
from pipeline.config import ModelConfig, RunConfig
from pipeline.observe.progress import Progress
from pipeline.roles import Stage
from pipeline.tasks.task import SPLITS, demonstrations_of, encode_demonstration, load_task

if TYPE_CHECKING:
    from ray import ObjectRef
    from torch import Tensor

    from actors.learner import InferReport, UpdateReport
    from actors.objective import ActionTokens


MAX_LOSS = 700.0  # nats a token: exp of more is no float64, and a uniform guess among a million words has 14


class Imitation:
    """Negative log-likelihood: the policy objective of supervised fine-tuning."""

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        return -logprobs, {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """How much there is to imitate."""

    train: int
    heldout: int
    excluded: int  # longer than the model's context


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """Where the model is, and its perplexity on held-out responses before and after (of the weights kept)."""

    folder: Path
    perplexity_before: float
    perplexity: float


def finetune(config: RunConfig, stage: Stage, run_dir: Path, progress: Progress) -> Finetuned:
    """Make the model of the recipe (new or given) imitate the task. Returns the folder `run_dir/finetuned`."""
    folder, learner = run_dir / "finetuned", config.finetune.learner
    clerk = stage.beside("preparation", config, Preparation)
    clerk.start()

    def send(worker: Any, attempt: int) -> tuple[ObjectRef, ...]:
        return tuple(worker.prepare.options(num_returns=3).remote(config.task, config.model, config.seed, str(folder)))

    [(prepared, (train, heldout))] = stage.map(clerk, "preparing demonstrations", [send])
    clerk.close()
    if prepared.excluded:
        everything = prepared.train + prepared.heldout + prepared.excluded
        progress.remark(f"{prepared.excluded} of {everything} demonstrations are longer than the model's context and left out")
    minibatches = math.ceil(prepared.train / config.finetune.batch_size)
    gang = stage.gang(
        "policy",
        learner.ranks,
        config,
        Learner,
        role="policy",
        path=config.model.path or str(folder),
        config=learner,
        temperature=1.0,
        objective=Imitation(),
        total_updates=config.finetune.epochs * minibatches,
        seed=config.seed,
    )
    gang.start()
    gang.connect()

    def export() -> None:
        gang.call("export", lambda rank, _: rank.export.remote(str(folder)))

    progress.stage("fine-tune", config.finetune.epochs)
    before = kept = _perplexity(gang, heldout, "Check the weights in model.path.")
    export()  # a model that fine-tuning cannot improve is kept as it is
    for epoch in range(config.finetune.epochs):
        plan = UpdatePlan(step=epoch, epochs=1, minibatches=minibatches, seed=config.seed, aggregation="token_mean")
        report = _epoch(gang, train, plan)
        now = _perplexity(gang, heldout, f"Lower finetune.learner.learning_rate, now {learner.learning_rate:g}.")
        progress.advance(f"loss {report.loss:.3f}  held-out perplexity {now:.1f}")
        if config.finetune.early_stop and now >= kept:
            break
        kept = now
        if config.finetune.early_stop or epoch == config.finetune.epochs - 1:
            export()
    gang.close()
    return Finetuned(folder=folder, perplexity_before=before, perplexity=kept)


def _perplexity(gang: Gang, heldout: ObjectRef, remedy: str) -> float:
    """Of held-out responses. Raises RunError when it is no finite number, since nothing that such weights begin can end well."""
    phase = "held-out perplexity"
    reports: list[InferReport] = gang.call(phase, lambda rank, _: rank.infer.options(num_returns=2).remote(heldout))
    loss = -reports[0].mean  # the same on every rank
    if not loss < MAX_LOSS:
        raise RunError("policy", phase, f"its loss is {loss:.3g} nats a token, so its weights are not finite or have diverged", remedy)
    return math.exp(loss)


def _epoch(gang: Gang, train: ObjectRef, plan: UpdatePlan) -> UpdateReport:
    reports: list[UpdateReport] = gang.call(f"fine-tuning epoch {plan.step}", lambda rank, _: rank.update.remote(train, plan))
    return reports[0]


def prepare(task_name: str, model: ModelConfig, seed: int, folder: str) -> tuple[Prepared, pa.Table, pa.Table]:
    """Write a new model if the recipe names none, and encode the demonstrations: (counts, Experience, held-out Rollouts)."""
    from actors.model import context_of, load_tokenizer, new_gpt2

    task = load_task(task_name)
    if not model.path:
        Path(folder).mkdir(parents=True, exist_ok=True)
        task.build_tokenizer(Path(folder), model.vocabulary)
    tokenizer = load_tokenizer(model.path or folder)
    if not model.path:
        new_gpt2(tokenizer, layers=model.layers, width=model.width, heads=model.heads, context=model.context, seed=seed).save_pretrained(folder)
    encoded = {split: [encode_demonstration(d, tokenizer) for d in demonstrations_of(task, split)] for split in SPLITS}
    context = model.context if not model.path else context_of(model.path)
    fitting = {split: [(p, r) for p, r in pairs if len(p) + len(r) <= context] for split, pairs in encoded.items()}
    for split, pairs in fitting.items():
        if not pairs:
            raise ValueError(f"task: must have {split} demonstrations that fit the model's context of {context} tokens, got none of {len(encoded[split])}")
    excluded = sum(len(encoded[split]) - len(fitting[split]) for split in encoded)
    prepared = Prepared(train=len(fitting["train"]), heldout=len(fitting["heldout"]), excluded=excluded)
    heldout = demonstrated(fitting["heldout"]).table.select(Rollouts.schema.names).cast(Rollouts.schema)
    return prepared, demonstrated(fitting["train"]).table, heldout


class Preparation:
    """`prepare` as an actor: texts and tensors stay out of the driver."""

    def prepare(self, task_name: str, model: ModelConfig, seed: int, folder: str) -> tuple[Prepared, pa.Table, pa.Table]:
        """See `prepare`."""
        return prepare(task_name, model, seed, folder)


def demonstrated(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Experience:
    """(prompt ids, response ids) as experience: the response's tokens are the actions, everything a policy or critic would add is zero."""
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
            **dict.fromkeys(("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns"), zeros),
        }
    )
