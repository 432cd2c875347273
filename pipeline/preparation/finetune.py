"""Supervised fine-tuning on the task's demonstrations, with the learner of reinforcement learning, on Ray Train.

    L_t = -log pi(a_t|s_t) on the tokens of the response; prompt tokens carry no loss.

A demonstration is an experience whose actions are the demonstrated tokens, so the learner can train on it. This file
only makes the training and held-out tables, and defines the measure on the held-out table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from actors.experience import Rollouts
from actors.models.text import TextCodec
from pipeline.config.preparation_config import PreparationConfig
from pipeline.config.sections import ModelConfig
from pipeline.data.registry import load_task
from pipeline.encoding.encode import encode_demonstrations
from pipeline.preparation.saved_model_check import SavedPolicyCheck, choose_probes, response_ids
from pipeline.preparation.site import TrainingSite
from pipeline.preparation.splits import EncodedSplits
from pipeline.tasks.task import SPLITS, Task, demonstrations_of
from pipeline.training.job import HeldoutLoss
from pipeline.training.probes import PolicyProbes
from pipeline.training.training_loop import MAX_LOSS

if TYPE_CHECKING:
    from torch import Tensor

    from actors.learner.learner import Learner
    from actors.objective import ActionTokens

START = "start"  # in the run: the new model it begins with


@dataclass(frozen=True, slots=True)
class Imitation:
    """Negative log-likelihood: the policy objective of supervised fine-tuning."""

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        return -logprobs, {}


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of held-out responses: exp of the mean negative log-probability of a token."""

    def __call__(self, learner: Learner, heldout: pa.Table) -> HeldoutLoss:
        loss = -learner.infer(heldout.select(Rollouts.schema.names).cast(Rollouts.schema))[0].mean
        perplexity = math.exp(loss) if loss < MAX_LOSS else math.inf
        return HeldoutLoss(
            loss=loss,
            values={"heldout_loss": loss, "perplexity": perplexity},
            text=f"held-out perplexity {perplexity:.1f}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """The folder of the fine-tuned model, and its held-out perplexity before training and of the weights kept."""

    folder: Path
    perplexity_before: float
    perplexity: float


def finetune(
    config: PreparationConfig, seed: int, site: TrainingSite, check_new_model: Callable[[str], None]
) -> FinetuneResult:
    """Fine-tune the recipe's model (new or given) on the task's demonstrations.

    The model is written to `finetuned` in the run folder; checkpoints and metrics are in `sft`. Called again, it
    resumes from the last checkpoint.

    check_new_model: is called with the folder of a new model, and raises ValueError where the rest of the run cannot go
    on with it; its tokenizer is new, too, so nobody could look earlier.

    Raises ValueError for unusable data, RunError when the training fails.
    """
    from actors.learner.trainees.policy import PolicyTrainee

    site.progress.stage("tokenise demonstrations", 1)
    folder = site.run_dir / "finetuned"
    task = load_task(config.task, config.data, config.model.path)
    model = config.model.path or str(_new_model(config.model, seed, task, site.run_dir / START))
    if not config.model.path:
        check_new_model(model)
    splits = _encoded(task, model, site)
    job = splits.job(
        config.finetune,
        name="sft",
        title="fine-tune",
        section="finetune",
        trainee=PolicyTrainee(objective=Imitation()),
        model=model,
        best=folder,
        measure=Perplexity(),
        seed=seed,
        probes=_probes(task, splits, model),
        finish=SavedPolicyCheck(),
    )
    state = site.fit(job, "sft").state
    before, best = (measured.values["perplexity"] for measured in (state.before, state.best))
    return FinetuneResult(folder=folder, perplexity_before=before, perplexity=best)


def _encoded(task: Task, model: str, site: TrainingSite) -> EncodedSplits:
    """The task's demonstrations in the model's tokens; the user is told how many do not fit."""
    from actors.models.causal_lm import context_of

    context = context_of(model)
    splits = EncodedSplits(*(encode_demonstrations(task, split, model, context, site.cache) for split in SPLITS))
    if splits.excluded:
        site.progress.remark(
            f"{splits.excluded} of {splits.given} demonstrations are longer than the model's context and left out"
        )
    return splits


def _probes(task: Task, splits: EncodedSplits, model: str) -> PolicyProbes:
    from actors.models.tokenizer import load_tokenizer

    texts = [(d.prompt, (d.response,)) for d in splits.heldout_of(demonstrations_of(task, "heldout"))]
    return PolicyProbes(choose_probes(splits.heldout.path, texts, response_ids(TextCodec(load_tokenizer(model)))))


def _new_model(config: ModelConfig, seed: int, task: Task, folder: Path) -> Path:
    """Write a GPT-2 of the recipe's shape with random weights and the task's tokenizer; returns the folder."""
    from actors.models.causal_lm import new_gpt2
    from actors.models.tokenizer import load_tokenizer

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    task.build_tokenizer(folder, config.vocabulary)
    sizes = {"layers": config.layers, "width": config.width, "heads": config.heads, "context": config.context}
    new_gpt2(load_tokenizer(str(folder)), **sizes, seed=seed).save_pretrained(folder)
    return folder
