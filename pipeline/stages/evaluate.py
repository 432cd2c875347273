"""Evaluation: two models answer the same held-out prompts, and judges, the baseline and held-out demonstrations say how good the answers are.

    prompts --reply--> policy's, baseline's --score, by each judge--> rewards
                            `--logprobs of the baseline--> KL        demonstrations --logprobs of both--> perplexity

It works on folders, needs no learner, and knows of no run: `raylign evaluate` and the end of a run are the same. Sample ids lie beyond any that a run could
issue, so its random numbers are its own. Chunks are cut by the prompts alone, so the number of examiners changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.config import RewardConfig
from actors.experience import Prompts, Rollouts, Scores, TokenLogprobs
from actors.reward import check_classifier, load_function, user_code
from cluster.events import Pump
from cluster.placement import RoleDemand
from cluster.pool import Pool
from cluster.session import Session
from pipeline.config import RunConfig
from pipeline.estimates import Floats
from pipeline.evaluation import Answers, Evaluation, Likelihood, Measured, assess
from pipeline.observe.progress import Progress
from pipeline.prompts import heldout
from pipeline.roles import Stage, place
from pipeline.stages.examiner import Examiner
from pipeline.tasks.task import Demonstration, Task, demonstrations_of, encode_demonstration, permutation, task_of

if TYPE_CHECKING:
    from ray import ObjectRef

MODEL, RULE = "reward model", "rule"  # the judges there may be
_BEYOND = 1 << 40  # groups that no run ever reaches
_SLOTFULS = 8  # times the engine's slots are samples of a chunk: enough that few slots idle while the last rows end
_DEMONSTRATIONS = 256  # of a chunk

Send = Callable[[Any, int], "tuple[ObjectRef, ...]"]


def heldout_groups(prompts: int, available: int) -> range:
    """Group ids of `prompts` different held-out prompts out of `available`: the first of a whole pass over them, far beyond the run's own."""
    first = -(-_BEYOND // available) * available
    return range(first, first + min(prompts, available))


def judges_of(reward: RewardConfig, rule: str) -> dict[str, RewardConfig]:
    """Who judges, the one that was optimised first: the reward model where there is one, and the rule. rule: the task's own, "" where it has none."""
    function = reward.function or rule
    judges = {MODEL: reward.model_copy(update={"function": ""})} if reward.model else {}
    return judges | ({RULE: reward.model_copy(update={"function": function, "model": ""})} if function else {})


def check_judges(judges: Mapping[str, RewardConfig]) -> None:
    """Raises ValueError when there is none, or for what is wrong with one and can be seen before anything is started."""
    if not judges:
        raise ValueError("reward: must name a function or a model where the task brings no reward function, got neither; set reward.function or reward.model")
    for judge in judges.values():
        if judge.model:
            check_classifier(judge.model, judge.label)
        else:
            load_function(judge.function)


def examiners(config: RunConfig) -> list[RoleDemand]:
    """What an evaluation asks of the cluster."""
    return [RoleDemand(role="examiner", workers=config.evaluation.workers, gpus=config.evaluation.gpus)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked, in the baseline's tokens. demonstrations: Rollouts, of which the log-probs mean nothing; none where the task has none."""

    tokenizer: Any
    prompts: Prompts
    demonstrations: pa.Table
    excluded: int  # demonstrations longer than the model's context


def evaluate(
    config: RunConfig, session: Session, run_dir: Path, progress: Progress, *, policy: str, baseline: str, judges: Mapping[str, RewardConfig]
) -> Evaluation:
    """policy, baseline: folder or hub name of two causal LMs with the same tokenizer; named as seen from run_dir. judges: the one that was optimised first.

    The same models, recipe and judges give the same numbers, to the bit. Raises ValueError for prompts that do not fit the models, or when nothing could
    be scored; RunError when an examiner fails.
    """
    progress.stage("evaluate", 4)
    questions = ask(config, task_of(config), baseline)
    placed = session.place(place(config, examiners(config)))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
    gpus = {"gpus": config.evaluation.gpus}
    pool = stage.pool(
        "examiner",
        config.evaluation.workers,
        config,
        Examiner,
        rollout=config.rollout.model_copy(update=gpus),
        reference=config.reference.model_copy(update=gpus),
        sampling=config.sampling,
        seed=config.seed,
    )
    try:
        pool.start()
        pool.wait_ready()
        judging = {name: judge.model_copy(update=gpus) for name, judge in judges.items()}
        measured = _Examination(config, stage, pool, progress, questions).measure(policy, baseline, judging)
    finally:
        pool.close()
        placed.remove()
    names = {"policy": _named(policy, run_dir), "baseline": _named(baseline, run_dir)}
    return assess(measured, **names, best_of_n=config.evaluation.best_of, seed=config.seed)


def ask(config: RunConfig, task: Task, model: str) -> Questions:
    """The held-out prompts and demonstrations in the model's tokens. Raises ValueError as `pipeline.prompts.heldout` does."""
    from actors.model import context_of

    tokenizer, stream = heldout(config, task, model)
    given = _some(_demonstrations(task), config.evaluation.demonstrations)
    encoded = [encode_demonstration(demonstration, tokenizer) for demonstration in given]
    fitting = [(prompt, response) for prompt, response in encoded if len(prompt) + len(response) <= context_of(model)]
    return Questions(
        tokenizer=tokenizer,
        prompts=stream.draw(heldout_groups(config.evaluation.prompts, len(stream))),
        demonstrations=_as_rollouts(fitting),
        excluded=len(encoded) - len(fitting),
    )


def _demonstrations(task: Task) -> list[Demonstration]:
    """A task need not have any: without, there is no perplexity."""
    with user_code(f"task: demonstrations('heldout') of {task.name!r} must give a list of Demonstration"):
        has_some = bool(task.demonstrations("heldout"))
    return demonstrations_of(task, "heldout") if has_some else []


def _some(demonstrations: list[Demonstration], most: int) -> list[Demonstration]:
    """At most so many, from all over the list, and the same ones every time."""
    return [demonstrations[i] for i in sorted(permutation(0, 0, len(demonstrations))[:most])]


def _as_rollouts(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> pa.Table:
    from pipeline.stages.finetune import demonstrated

    return demonstrated(pairs).table.select(Rollouts.schema.names).cast(Rollouts.schema) if pairs else Rollouts.concat([]).table


class _Examination:
    """One evaluation under way. What models read and write stays in the object store until it is counted."""

    def __init__(self, config: RunConfig, stage: Stage, pool: Pool, progress: Progress, questions: Questions) -> None:
        self.config, self.stage, self.pool, self.progress, self.questions = config, stage, pool, progress, questions

    def measure(self, policy: str, baseline: str, judges: Mapping[str, RewardConfig]) -> Measured:
        """The order is the one in which a single examiner loads the fewest models."""
        evaluation, tokenizer = self.config.evaluation, self.questions.tokenizer
        ours = self._reply(policy, evaluation.samples, "policy")
        theirs = self._reply(baseline, max(evaluation.best_of, evaluation.samples), "baseline")
        nearby = self._map("KL to the baseline", [_logprobs(baseline, chunk, self.config.sampling.temperature) for chunk in ours])
        likelihood = self._likelihood(policy, baseline)
        self.progress.advance(f"perplexity on {self.questions.demonstrations.num_rows} demonstrations")
        scores = {name: self._map(f"scores by the {name}", [_score(judge, baseline, chunk) for chunk in (*ours, *theirs)]) for name, judge in judges.items()}
        self.progress.advance("scored")
        rollouts, prompts = self._rollouts(ours), self.questions.prompts.table["tokens"].to_pylist()
        return Measured(
            prompts=[prompt.strip() for prompt in tokenizer.batch_decode(prompts, skip_special_tokens=True)],
            policy=_answers(rollouts, {name: self._rewards(refs[: len(ours)]) for name, refs in scores.items()}, tokenizer),
            baseline=_answers(self._rollouts(theirs), {name: self._rewards(refs[len(ours) :]) for name, refs in scores.items()}, tokenizer),
            kl=_kl(rollouts, self._logprobs(nearby)).reshape(len(prompts), -1),
            likelihood=likelihood,
        )

    def _reply(self, model: str, samples: int, who: str) -> list[ObjectRef]:
        per_chunk = max(_SLOTFULS * self.config.rollout.slots // samples, 1)
        prompts = self.questions.prompts
        chunks = [prompts.slice(start, min(per_chunk, len(prompts) - start)).table for start in range(0, len(prompts), per_chunk)]
        refs = self._map(f"replies of the {who}", [_sample(model, chunk, samples) for chunk in chunks])
        self.progress.advance(f"{len(prompts)} prompts x {samples} replies of the {who}")
        return refs

    def _likelihood(self, policy: str, baseline: str) -> Likelihood | None:
        """Of the demonstrations, at temperature 1, as fine-tuning measures it."""
        table = self.questions.demonstrations
        if not table.num_rows:
            return None
        chunks = [table.slice(start, _DEMONSTRATIONS) for start in range(0, table.num_rows, _DEMONSTRATIONS)]
        found = []
        for model in (baseline, policy):
            refs = self._map("perplexity", [_logprobs(model, chunk, 1.0) for chunk in chunks])
            found.append(_row_sums(self._logprobs(refs).table["logprobs"]))
        return Likelihood(baseline=found[0], policy=found[1], tokens=_row_sums(table["action_mask"]), excluded=self.questions.excluded)

    def _map(self, phase: str, calls: Sequence[Send]) -> list[ObjectRef]:
        return [data[0] for _, data in self.stage.map(self.pool, phase, calls)]

    def _rollouts(self, refs: Sequence[ObjectRef]) -> Rollouts:
        return Rollouts.concat([Rollouts(table) for table in self.stage.fetch(refs, "evaluation")])

    def _logprobs(self, refs: Sequence[ObjectRef]) -> TokenLogprobs:
        return TokenLogprobs.concat([TokenLogprobs(table) for table in self.stage.fetch(refs, "evaluation")])

    def _rewards(self, refs: Sequence[ObjectRef]) -> Floats:
        """(P, S)"""
        scores = Scores.concat([Scores(table) for table in self.stage.fetch(refs, "evaluation")])
        return np.asarray(scores.table["reward"].to_numpy().astype(np.float64).reshape(len(self.questions.prompts), -1))


def _answers(rollouts: Rollouts, rewards: Mapping[str, Floats], tokenizer: Any) -> Answers:
    shape = next(iter(rewards.values())).shape  # (P, S)
    tokens, offsets = ragged.flat(rollouts.table["tokens"])
    acted = ragged.flat(rollouts.table["action_mask"])[0]
    texts = tokenizer.batch_decode([tokens[a:b][acted[a:b]] for a, b in pairwise(offsets)], skip_special_tokens=True)
    ended = np.array([finish == "stop" for finish in rollouts.table["finish"].to_pylist()])
    return Answers(
        texts=[text.strip() for text in texts],
        tokens=_row_sums(rollouts.table["action_mask"]).astype(np.int64).reshape(shape),
        ended=ended.reshape(shape),
        rewards=rewards,
    )


def _kl(rollouts: Rollouts, baseline: TokenLogprobs) -> Floats:
    """Nats of each reply, as it was sampled: its log-prob then, less that under the baseline."""
    return np.asarray(_row_sums(rollouts.table["logprobs"]) - _row_sums(baseline.table["logprobs"]))


def _row_sums(column: Any) -> Floats:
    """Sums over the tokens of each row, which has at least one; zero counts where there is no action."""
    values, offsets = ragged.flat(column)
    return np.asarray(np.add.reduceat(values.astype(np.float64), offsets[:-1]))


def _named(model: str, run_dir: Path) -> str:
    """A folder as seen from the run's, so that the same run elsewhere says the same."""
    path = Path(model)
    return str(path.relative_to(run_dir)) if path.is_relative_to(run_dir) else model


def _sample(model: str, prompts: pa.Table, samples: int) -> Send:
    return lambda worker, attempt: tuple(worker.reply.options(num_returns=2).remote(model, prompts, samples))


def _logprobs(model: str, rollouts: Any, temperature: float) -> Send:
    return lambda worker, attempt: tuple(worker.logprobs.options(num_returns=2).remote(model, rollouts, temperature))


def _score(judge: RewardConfig, tokenizer: str, rollouts: ObjectRef) -> Send:
    return lambda worker, attempt: tuple(worker.score.options(num_returns=2).remote(judge, tokenizer, rollouts))
