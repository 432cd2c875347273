"""Supervised fine-tuning: imitate the task's demonstrations, on Ray Train, with the learner that reinforcement learning uses.

    L_t = -log pi(a_t|s_t) on the tokens of the response; prompt tokens carry no loss.

A demonstration is an experience whose actions are the demonstrated tokens, so nothing here trains: the stage only
lays out tables and says what is measured on held-out ones.
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
from pipeline.config import ModelConfig, RunConfig
from pipeline.observe.progress import Progress
from pipeline.stages.loop import HELDOUT, MAX_LOSS, TRAIN, Job, Measured, Prepared
from pipeline.stages.trainer import fit
from pipeline.tasks.task import SPLITS, demonstrations_of, encode_demonstration, load_task

if TYPE_CHECKING:
    from torch import Tensor

    from actors.learner import Learner
    from actors.objective import ActionTokens


@dataclass(frozen=True, slots=True)
class Imitation:
    """Negative log-likelihood: the policy objective of supervised fine-tuning."""

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        return -logprobs, {}


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of held-out responses: exp of the mean negative log-probability of a token."""

    def __call__(self, learner: Learner, heldout: pa.Table) -> Measured:
        loss = -learner.infer(heldout)[0].mean
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

    Raises RunError; called again, it goes on from the last checkpoint.
    """
    folder, chosen = run_dir / "finetuned", config.finetune
    job = Job(
        name="sft",
        title="fine-tune",
        section="finetune",
        role="policy",
        prepare=PrepareDemonstrations(task=config.task, model=config.model, seed=config.seed),
        learner=chosen.learner,
        objective=Imitation(),
        measure=Perplexity(),
        best=folder.absolute(),
        epochs=chosen.epochs,
        early_stop=chosen.early_stop,
        rows=chosen.batch_size,
        checkpoint_every=chosen.checkpoint_every,
        seed=config.seed,
    )
    fitted = fit(job, config, session, run_dir / "sft", progress)
    before, best = (measured.values["perplexity"] for measured in (fitted.standing.before, fitted.standing.best))
    return Finetuned(folder=folder, perplexity_before=before, perplexity=best)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareDemonstrations:
    """Writes a new model if the recipe names none, and the task's demonstrations in tokens: Experience to train on, held-out Rollouts."""

    task: str
    model: ModelConfig
    seed: int

    def __call__(self, folder: Path) -> Prepared:
        from actors.model import context_of, load_tokenizer, new_gpt2

        task, model = load_task(self.task), self.model
        start = model.path or str(folder / "model")
        if not model.path:
            Path(start).mkdir(parents=True, exist_ok=True)
            task.build_tokenizer(Path(start), model.vocabulary)
        tokenizer = load_tokenizer(start)
        if not model.path:
            shape = {"layers": model.layers, "width": model.width, "heads": model.heads, "context": model.context}
            new_gpt2(tokenizer, **shape, seed=self.seed).save_pretrained(start)
        encoded = {split: [encode_demonstration(d, tokenizer) for d in demonstrations_of(task, split)] for split in SPLITS}
        context = context_of(start)
        fitting = {split: [(p, r) for p, r in pairs if len(p) + len(r) <= context] for split, pairs in encoded.items()}
        for split, pairs in fitting.items():
            if not pairs:
                raise ValueError(f"task: must have {split} demonstrations that fit the model's context of {context} tokens, got none of {len(encoded[split])}")
        demonstrated(fitting["train"]).write(folder / TRAIN)
        Rollouts(demonstrated(fitting["heldout"]).table.select(Rollouts.schema.names).cast(Rollouts.schema)).write(folder / HELDOUT)
        everything = sum(len(pairs) for pairs in encoded.values())
        excluded = everything - sum(len(pairs) for pairs in fitting.values())
        remark = f"{excluded} of {everything} demonstrations are longer than the model's context and left out" if excluded else ""
        return Prepared(train=len(fitting["train"]), heldout=len(fitting["heldout"]), model=start, excluded=excluded, remark=remark)


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
