"""Supervised fine-tuning: imitate the task's demonstrations, on Ray Train, with the learner that reinforcement learning uses.

    L_t = -log pi(a_t|s_t) on the tokens of the response; prompt tokens carry no loss.

A demonstration is an experience whose actions are the demonstrated tokens, so nothing here trains: the stage only
lays out tables and says what is measured on the held-out one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.experience import Experience, Rollouts
from cluster.session import Session
from pipeline.config import RunConfig
from pipeline.data.encode import encode_demonstrations
from pipeline.observe.progress import Progress
from pipeline.stages.loop import MAX_LOSS, Job, Measured
from pipeline.stages.trainer import fit
from pipeline.tasks.task import SPLITS, Task, load_task

if TYPE_CHECKING:
    from torch import Tensor

    from actors.learner import Learner
    from actors.objective import ActionTokens

CACHE = "cache"  # of a run: the new model it begins with, and its texts in tokens


@dataclass(frozen=True, slots=True)
class Imitation:
    """Negative log-likelihood: the policy objective of supervised fine-tuning."""

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        return -logprobs, {}


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of held-out responses: exp of the mean negative log-probability of a token."""

    def __call__(self, learner: Learner, heldout: pa.Table) -> Measured:
        loss = -learner.infer(heldout.select(Rollouts.schema.names).cast(Rollouts.schema))[0].mean
        perplexity = math.exp(loss) if loss < MAX_LOSS else math.inf
        return Measured(loss=loss, values={"heldout_loss": loss, "perplexity": perplexity}, text=f"held-out perplexity {perplexity:.1f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """Where the model is, and its perplexity on held-out responses before and after (of the weights kept)."""

    folder: Path
    perplexity_before: float
    perplexity: float


def finetune(config: RunConfig, session: Session, run_dir: Path, progress: Progress) -> Finetuned:
    """Make the model of the recipe (new or given) imitate the task. Returns the folder `run_dir/finetuned`; what led there is in `run_dir/sft`.

    Raises ValueError for data that will not do, RunError for what fails on the way; called again, it goes on from the last checkpoint.
    """
    from actors.model import context_of

    progress.stage("tokenise demonstrations", 1)
    folder = run_dir / "finetuned"
    task = load_task(config.task, config.data, config.model.path)
    model = config.model.path or str(_new_model(config, task, run_dir / CACHE))
    train, heldout = (encode_demonstrations(task, split, model, context_of(model), run_dir / CACHE) for split in SPLITS)
    if excluded := len(train.excluded) + len(heldout.excluded):
        everything = train.rows + heldout.rows + excluded
        progress.remark(f"{excluded} of {everything} demonstrations are longer than the model's context and left out")
    job = Job(
        name="sft",
        title="fine-tune",
        section="finetune",
        role="policy",
        model=model,
        train=train.path.absolute(),
        heldout=heldout.path.absolute(),
        rows=train.rows,
        best=folder.absolute(),
        learner=config.finetune.learner,
        objective=Imitation(),
        measure=Perplexity(),
        epochs=config.finetune.epochs,
        early_stop=config.finetune.early_stop,
        batch=config.finetune.batch_size,
        checkpoint_every=config.finetune.checkpoint_every,
        seed=config.seed,
    )
    fitted = fit(job, config, session, run_dir / "sft", progress)
    before, best = (measured.values["perplexity"] for measured in (fitted.standing.before, fitted.standing.best))
    return Finetuned(folder=folder, perplexity_before=before, perplexity=best)


def _new_model(config: RunConfig, task: Task, cache: Path) -> Path:
    """A GPT-2 of the recipe's shape with random weights, and a tokenizer of the task's text: the folder."""
    from actors.model import load_tokenizer, new_gpt2

    folder, model = (cache / "model").absolute(), config.model
    folder.mkdir(parents=True, exist_ok=True)
    task.build_tokenizer(folder, model.vocabulary)
    sizes = {"layers": model.layers, "width": model.width, "heads": model.heads, "context": model.context}
    new_gpt2(load_tokenizer(str(folder)), **sizes, seed=config.seed).save_pretrained(folder)
    return folder


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
