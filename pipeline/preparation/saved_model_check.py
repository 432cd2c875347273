"""Checks that the saved model is the one that was trained, on a few held-out rows: the probes.

The learner computes rewards or log-probs for the probes, and the saved model must give the same numbers.

    driver       choose_probes: rows of the held-out table that were not cut, with their texts
    all ranks    the numbers of the learner are noted at an export (training/probes.py)
    rank 0       at the end, the saved model runs the probes' texts, read by the saved tokenizer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from actors import ragged
from actors.models.text import TextCodec
from cluster.faults import RunError
from pipeline.encoding.blocks import with_option
from pipeline.training.job import TrainingJob, TrainingState
from pipeline.training.probes import Probe

if TYPE_CHECKING:
    from actors.reward.worker import ClassifierReward

ROWS = 4
PHASE = "check of the saved model"


def choose_probes(
    path: Path, texts: Sequence[tuple[str, tuple[str, ...]]], ids: Callable[[str, tuple[str, ...]], list[int]]
) -> tuple[Probe, ...]:
    """Choose at most ROWS rows of a table, of different lengths among the shorter half, that were not cut.

    texts: (prompt, replies) of every row. ids: gives the tokens of a row that was not cut.
    """
    tokens = pq.read_table(path, columns=["tokens"], memory_map=True, partitioning=None)["tokens"]
    shorter = np.argsort(ragged.lengths(tokens), kind="stable")[: len(texts) // 2 + 1]
    rows = (
        sorted({int(shorter[place]) for place in np.linspace(0, len(shorter) - 1, ROWS).round().astype(int)})
        if len(texts)
        else []
    )
    return tuple(
        Probe(row=row, prompt=texts[row][0], replies=texts[row][1])
        for row in rows
        if tokens[row].as_py() == ids(*texts[row])
    )


def response_ids(codec: TextCodec) -> Callable[[str, tuple[str, ...]], list[int]]:
    """A function that gives the tokens of a demonstration from its (prompt, replies)."""
    return lambda prompt, replies: [
        *codec.encode_prompts([prompt])[0],
        *codec.encode_replies(replies)[0],
        codec.tokenizer.eos_token_id,
    ]


def comparison_ids(codec: TextCodec) -> Callable[[str, tuple[str, ...]], list[int]]:
    """A function that gives the tokens of a comparison from its (prompt, replies)."""
    eos = codec.tokenizer.eos_token_id
    return lambda prompt, replies: [
        token for text in codec.encode_judged([prompt] * len(replies), replies) for token in (*text, eos)
    ]


def check_rewards(job: TrainingJob, state: TrainingState, reward: ClassifierReward) -> None:
    """Raises RunError unless the saved classifier gives the learner's rewards.

    Their scale and mean may differ, because the export sets both.
    """
    probes, known = _known(job, state)
    prompts = [probe.prompt for probe in probes for _ in probe.replies]
    replies = [reply for probe in probes for reply in probe.replies]
    saved = np.asarray(reward(prompts, replies, [{}] * len(prompts)) if prompts else [])
    scaled = known / state.scale
    _compare(job, saved - saved[:1], scaled - scaled[:1], replies)


@dataclass(frozen=True, slots=True)
class SavedPolicyCheck:
    """The `finish` of fine-tuning: raises RunError unless the saved model gives the learner's log-probs."""

    def __call__(self, job: TrainingJob, state: TrainingState, say: Callable[[str], None]) -> dict[str, Any]:
        """Run the saved model in float32 on the CPU, because the GPU may have no room beside the learner's model."""
        import torch

        from actors.models.causal_lm import load_causal_lm
        from actors.models.option_tokens import learned_options
        from actors.models.suppressed import suppress, suppressed_tokens
        from actors.models.tokenizer import load_tokenizer

        say(PHASE)
        probes, known = _known(job, state)
        if probes:
            model: Any = load_causal_lm(str(job.best), torch.float32)
            codec, saved = TextCodec(load_tokenizer(str(job.best))), []
            learned = learned_options(str(job.best), codec.tokenizer)
            for probe in probes:
                ids = torch.tensor([response_ids(codec)(probe.prompt, probe.replies)])
                start = len(with_option(codec.encode_prompts([probe.prompt])[0], [], learned)[0])
                with torch.inference_mode():
                    logits = model(input_ids=ids).logits[0, start - 1 : -1].float()  # (A, V)
                    logprobs = torch.log_softmax(suppress(logits, suppressed_tokens(model)), -1)
                saved.append(float(logprobs.gather(-1, ids[0, start:, None]).mean()))
            _compare(job, np.asarray(saved), known, [probe.replies[0] for probe in probes])
        return {}


def _known(job: TrainingJob, state: TrainingState) -> tuple[list[Probe], Any]:
    """The probes that the learner has numbers for, and these numbers, one after the other."""
    probes = [probe for probe in job.probes.rows if str(probe.row) in state.probe_values]
    return probes, np.asarray([value for probe in probes for value in state.probe_values[str(probe.row)]])


def _compare(job: TrainingJob, saved: Any, known: Any, replies: Sequence[str]) -> None:
    import torch

    from actors.device import torch_dtype

    rounding = torch.finfo(torch_dtype(job.learner.dtype)).eps ** 0.5  # both models round, each in its own order
    wrong = np.flatnonzero(~(np.abs(saved - known) <= rounding * np.maximum(1.0, np.abs(known))))  # also a NaN
    if len(wrong):
        worst = int(wrong[0])
        cause = (
            f"the model in {job.best} is not the one that was trained: {replies[worst]!r:.60} has a "
            f"{job.probes.what} of {saved[worst]:.6g} by the saved model, must have {known[worst]:.6g}"
        )
        remedy = "Saving changed its weights or its tokenizer; choose a model of another family."
        raise RunError(job.name, PHASE, cause, remedy)
