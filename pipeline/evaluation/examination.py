"""The examination of two models: `Questions` go to the examiners, and `Measurements` come back.

An item that kills or hangs an examiner is found by halving its chunk, and is left out:

    a prompt, or a reply to it                  the prompt is left out for both models
    a demonstration                             it is left out for both models
    a reply, while a judge scores it            it gets no reward from this judge

The number of examiners has no influence on the result: the questions and the models alone decide what is measured and
what is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.config import RewardConfig, RolloutConfig
from actors.experience import CONVERSATION, Prompts, Rollouts, Scores, TokenLogprobs
from actors.models.text import TextCodec
from cluster.pool import Pool
from cluster.runtime import Runtime
from pipeline.evaluation.results import Answers, Likelihood, Measurements
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.evaluation.statistics import Floats
from pipeline.observe.progress import Progress

if TYPE_CHECKING:
    from ray import ObjectRef

DEMONSTRATIONS = 256  # demonstrations per chunk
_SLOTFULS = 8  # samples of a chunk per slot of the engine: enough that few slots idle while the last rows end
_SHARE = 0.9  # share of a call's deadline that a worker may spend on scoring

Typed = TypeVar("Typed", Rollouts, Scores, TokenLogprobs)
Send = Callable[[Any, int, frozenset[int]], "tuple[ObjectRef, ...]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The prompts and demonstrations of an evaluation, in the baseline's tokens.

    demonstrations: a Rollouts table whose log-probs mean nothing; it is empty if the task has no demonstrations.
    """

    tokenizer: Any
    prompts: Prompts
    demonstrations: pa.Table
    excluded: int  # number of demonstrations longer than the context of one of the models, or without a prompt
    lacking: str  # why there are no demonstrations; "" where there are some


@dataclass(frozen=True, slots=True)
class _Replies:
    """The replies of one model: one Rollouts table per chunk of prompts, with `samples` replies to each prompt."""

    tables: list[ObjectRef]
    samples: int


class Examination:
    """One evaluation in progress; tables stay in the object store until their numbers are needed."""

    def __init__(
        self, config: EvaluationSettings, runtime: Runtime, pool: Pool, progress: Progress, questions: Questions
    ) -> None:
        self.config, self.runtime, self.pool, self.progress, self.questions = config, runtime, pool, progress, questions
        self.unanswered: dict[int, str] = {}  # group id of a prompt that is left out -> reason
        self.unread: dict[int, str] = {}  # sample id of a demonstration that is left out -> reason

    @property
    def lacking(self) -> tuple[str, ...]:
        """A line for the prompts that are left out, and one for the demonstrations, if there are any."""
        prompts, demonstrations = len(self.questions.prompts), self.questions.demonstrations.num_rows
        return tuple(
            f"{len(found)} of {asked} held-out {what} (the first {next(iter(found.values()))})"
            for what, asked, found in (
                ("prompts", prompts, self.unanswered),
                ("demonstrations", demonstrations, self.unread),
            )
            if found
        )

    def measure(
        self,
        policy: str,
        baseline: str,
        judges: Mapping[str, RewardConfig],
        measures: Mapping[str, RewardConfig] = MappingProxyType({}),
    ) -> Measurements:
        """Measure both models, in the order in which a single examiner loads the fewest models.

        measures: name -> configuration of what is asked about each reply as a judge is, and judges nothing.

        Raises ValueError when no prompt is left that both models could answer.
        """
        evaluation, codec = self.config.evaluation, TextCodec(self.questions.tokenizer)
        ours = self._reply(policy, evaluation.samples, "policy")
        theirs = self._reply(baseline, max(evaluation.best_of, evaluation.samples), "baseline")
        nearby = self._logprobs_under(baseline, ours)
        prompts = self.questions.prompts.without(self.unanswered, "group_id").table["tokens"].to_pylist()
        if not prompts:
            raise ValueError(
                f"evaluation: must have at least one prompt that both models can answer, got none of "
                f"{self.lacking[0]}; see the examiners' logs"
            )
        likelihood = self._likelihood(policy, baseline)
        self.progress.advance(f"perplexity on {self.questions.demonstrations.num_rows} demonstrations")
        scores = {name: self._scores(name, judge, baseline, ours, theirs) for name, judge in judges.items()}
        self.progress.advance(f"scored by {' and '.join(judges)}")
        shares = {name: self._scores(name, measure, baseline, ours, theirs) for name, measure in measures.items()}
        self.progress.phase("counting")
        rollouts = self._rollouts(ours)
        return Measurements(
            prompts=[prompt.strip() for prompt in codec.decode_prompts(prompts, special=False)],
            policy=_answers(rollouts, _side(scores, 0), _side(shares, 0), codec),
            baseline=_answers(self._rollouts(theirs), _side(scores, 1), _side(shares, 1), codec),
            kl=_kl(rollouts, self._fetch(TokenLogprobs, nearby, self._left_out(ours.samples))).reshape(
                len(prompts), -1
            ),
            likelihood=likelihood,
        )

    def _reply(self, model: str, samples: int, who: str) -> _Replies:
        phase = f"replies of the {who}"
        calls = [(chunk["group_id"].to_pylist(), _sample(model, chunk, samples)) for chunk in self._chunks(samples)]
        tables, found = self._divide(phase, calls)
        self.unanswered |= {group: f"{why}: {phase}" for group, why in found.items()}
        self.progress.advance(f"{len(self.questions.prompts)} prompts x {samples} replies of the {who}")
        return _Replies(tables, samples)

    def _logprobs_under(self, model: str, replies: _Replies) -> list[ObjectRef]:
        """The TokenLogprobs table of each chunk of replies, under the given model."""
        phase, temperature = "KL to the baseline", self.config.sampling.temperature
        left_out = self._left_out(replies.samples)
        calls = [
            (samples, _logprobs(model, table, temperature, left_out))
            for samples, table in zip(self._sample_ids(replies.samples), replies.tables, strict=True)
        ]
        tables, found = self._divide(phase, calls)
        self.unanswered |= {sample // replies.samples: f"{why}: {phase}" for sample, why in found.items()}
        return tables

    def _chunks(self, samples: int) -> list[pa.Table]:
        """The prompts in chunks, without the prompts that are left out so far."""
        per_chunk, prompts = prompts_per_chunk(self.config.rollout, samples), self.questions.prompts
        chunks = [
            prompts.slice(start, min(per_chunk, len(prompts) - start)) for start in range(0, len(prompts), per_chunk)
        ]
        return [chunk.without(self.unanswered, "group_id").table for chunk in chunks]

    def _sample_ids(self, samples: int) -> list[list[int]]:
        """The sample ids of each chunk's replies, without replies to prompts that are left out."""
        return [
            [group * samples + k for group in chunk["group_id"].to_pylist() for k in range(samples)]
            for chunk in self._chunks(samples)
        ]

    def _left_out(self, samples: int) -> frozenset[int]:
        """Sample ids of the replies to prompts that are left out."""
        return frozenset(group * samples + k for group in self.unanswered for k in range(samples))

    def _scores(
        self, name: str, judge: RewardConfig, tokenizer: str, ours: _Replies, theirs: _Replies
    ) -> tuple[Floats, Floats]:
        """The rewards of the policy's and of the baseline's replies by one judge, (P, S) each.

        A reply has no reward, which is NaN, if the judge raises on it, or if it kills or hangs the judge.
        """
        within_s = _SHARE * self.config.cluster.call_timeout_s
        calls = [
            (samples, _score(judge, tokenizer, table, within_s, self._left_out(side.samples)))
            for side in (ours, theirs)
            for samples, table in zip(self._sample_ids(side.samples), side.tables, strict=True)
        ]
        tables, _ = self._divide(f"scores by the {name}", calls)
        first = len(ours.tables)
        return self._rewards(tables[:first], ours.samples), self._rewards(tables[first:], theirs.samples)

    def _rewards(self, tables: Sequence[ObjectRef], samples: int) -> Floats:
        scores = self._fetch(Scores, tables, self._left_out(samples))
        return np.asarray(scores.table["reward"].to_numpy().astype(np.float64).reshape(-1, samples))

    def _likelihood(self, policy: str, baseline: str) -> Likelihood | None:
        """The log-probs of the demonstrations under both models, at temperature 1, as in fine-tuning.

        Returns None if no demonstration is left that both models could read.
        """
        demonstrations, read = Rollouts(self.questions.demonstrations), []
        chunks = [
            demonstrations.slice(start, DEMONSTRATIONS) for start in range(0, len(demonstrations), DEMONSTRATIONS)
        ]
        for model in (baseline, policy):
            kept = [chunk.without(self.unread).table for chunk in chunks]
            calls = [(chunk["sample_id"].to_pylist(), _logprobs(model, chunk, 1.0)) for chunk in kept]
            tables, found = self._divide("perplexity", calls)
            self.unread |= {sample: f"{why}: perplexity" for sample, why in found.items()}
            read.append(tables)
        kept_by_both = demonstrations.without(self.unread)
        if not len(kept_by_both):
            return None
        sums = [_row_sums(self._fetch(TokenLogprobs, tables, self.unread).table["logprobs"]) for tables in read]
        return Likelihood(
            baseline=sums[0],
            policy=sums[1],
            tokens=_row_sums(kept_by_both.table["action_mask"]),
            excluded=self.questions.excluded,
        )

    def _divide(
        self, phase: str, calls: Sequence[tuple[Sequence[int], Send]]
    ) -> tuple[list[ObjectRef], dict[int, str]]:
        """Do divisible calls; returns one table per call, and the items that were left out: item -> reason."""
        self.progress.phase(phase)
        done = self.runtime.map_divisible(self.pool, phase, calls, self.progress.remark)
        return [data[0] for _, data, _ in done], {item: why for _, _, found in done for item, why in found.items()}

    def _rollouts(self, replies: _Replies) -> Rollouts:
        return self._fetch(Rollouts, replies.tables, self._left_out(replies.samples))

    def _fetch(self, kind: type[Typed], tables: Sequence[ObjectRef], without: Collection[int]) -> Typed:
        parts = [kind(table) for table in self.runtime.fetch(tables, "evaluation")]
        return kind.concat(parts).without(without)


def _side(scores: Mapping[str, tuple[Floats, Floats]], which: int) -> dict[str, Floats]:
    """The scores of the policy (0) or of the baseline (1)."""
    return {name: both[which] for name, both in scores.items()}


def _answers(
    rollouts: Rollouts, rewards: Mapping[str, Floats], measures: Mapping[str, Floats], codec: TextCodec
) -> Answers:
    shape = next(iter(rewards.values())).shape  # (P, S)
    texts = transcripts(rollouts.table, codec)
    ended = np.array([finish == "stop" for finish in rollouts.table["finish"].to_pylist()])
    return Answers(
        texts=texts,
        tokens=_row_sums(rollouts.table["action_mask"]).astype(np.int64).reshape(shape),
        ended=ended.reshape(shape),
        rewards=rewards,
        measures=measures,
    )


def transcripts(rollouts: pa.Table, codec: TextCodec) -> list[str]:
    """The reply of each row, or its conversation: a line for each reply, `> ` before what the environment said.

    Before a reply stands its option, if a manager chose one; after a line the entry `note` of the environment's info.
    """
    tokens, offsets = ragged.flat(rollouts["tokens"])
    acted = ragged.flat(rollouts["action_mask"])[0]
    starts, turns = ragged.flat(rollouts["turn_starts"])
    replies = []
    for (start, end), (first, last) in zip(pairwise(offsets), pairwise(turns), strict=True):
        for begin, after in pairwise([*(start + starts[first:last]), end]):
            replies.append(tokens[begin:after][acted[begin:after]])
    said = [text.strip() for text in codec.decode_replies(replies)]
    found = []
    for text, (first, last) in zip(rollouts["metadata"].to_pylist(), pairwise(turns), strict=True):
        talk = json.loads(text).get(CONVERSATION, {})
        record = talk.get("turns", ())
        replies_of = said[first:last]
        options = [f"[{turn['option']}] " if "option" in turn else "" for turn in record]
        notes = [f" ({turn['info']['note']})" if "note" in turn["info"] else "" for turn in record]
        spoken = [option + reply for option, reply in zip_longest(options, replies_of, fillvalue="")]
        heard = [f"> {turn['line']}{note}" for turn, note in zip(record, notes, strict=True)]
        opening = [f"> {talk['opening']}"] if talk.get("opening") else []
        lines = [line for pair in zip_longest(spoken, heard) for line in pair if line]
        found.append("\n".join([*opening, *lines]))
    return found


def _kl(rollouts: Rollouts, baseline: TokenLogprobs) -> Floats:
    """For each reply, its log-prob when it was sampled minus its log-prob under the baseline, in nats."""
    return np.asarray(_row_sums(rollouts.table["logprobs"]) - _row_sums(baseline.table["logprobs"]))


def _row_sums(column: Any) -> Floats:
    """The sum over the tokens of each row; a row has at least one token, and tokens without an action hold 0."""
    values, offsets = ragged.flat(column)
    return np.asarray(np.add.reduceat(values.astype(np.float64), offsets[:-1]))


def prompts_per_chunk(rollout: RolloutConfig, samples: int) -> int:
    """The number of prompts in a chunk, if each prompt gets `samples` replies."""
    return max(_SLOTFULS * rollout.slots // samples, 1)


def _sample(model: str, prompts: pa.Table, samples: int) -> Send:
    return lambda worker, attempt, without: tuple(
        worker.reply.options(num_returns=2).remote(model, prompts, samples, without)
    )


def _logprobs(model: str, rollouts: Any, temperature: float, left_out: frozenset[int] = frozenset()) -> Send:
    return lambda worker, attempt, without: tuple(
        worker.logprobs.options(num_returns=2).remote(model, rollouts, temperature, without | left_out)
    )


def _score(judge: RewardConfig, tokenizer: str, rollouts: ObjectRef, within_s: float, left_out: frozenset[int]) -> Send:
    return lambda worker, attempt, without: tuple(
        worker.score.options(num_returns=2).remote(judge, tokenizer, rollouts, without | left_out, within_s)
    )
