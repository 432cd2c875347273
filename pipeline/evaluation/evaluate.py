"""Evaluation of a policy against a baseline: rewards on held-out prompts, KL, and perplexity on demonstrations.

Both models answer the same held-out prompts, and each judge scores the replies.

    prompts --reply--> policy's, baseline's --score, by each judge--> rewards
                            `--logprobs of the baseline--> KL        demonstrations --logprobs of both--> perplexity

An evaluation works on folders, needs no learner and knows nothing of runs, so `raylign evaluate` and the last stage of
a run do the same. Its sample ids are beyond all that a run could issue, so it shares no random numbers with a run. The
prompts alone decide how chunks are cut, so the number of examiners does not change the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.config import RewardConfig, RolloutConfig
from actors.experience import Rollouts
from actors.models.text import TextCodec
from actors.reward.worker import check_classifier, load_function, user_code
from cluster.placement import RoleDemand, place
from cluster.runtime import Runtime
from cluster.session import Session
from pipeline.config.sections import EvaluationConfig
from pipeline.data.problems import NoRowsError
from pipeline.encoding.prompt_stream import permutation
from pipeline.encoding.prompts import heldout_prompts
from pipeline.encoding.tables import demonstration_ids, demonstration_table
from pipeline.environments.served import EnvironmentSource
from pipeline.evaluation.examination import (
    DEMONSTRATIONS,
    Examination,
    Questions,
    prompts_per_chunk,
)
from pipeline.evaluation.examiner import Examiner
from pipeline.evaluation.results import Evaluation, assess
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.observe.progress import Progress
from pipeline.tasks.task import Demonstration, Task, demonstrations_of, measures_of

MODEL, RULE = "reward model", "rule"  # names of the possible judges of a reply
WHOLE, ENVIRONMENT = "environment and reward", "environment"  # and of a conversation
_BEYOND = 1 << 40  # a group id that no run ever reaches


def heldout_groups(prompts: int, available: int) -> range:
    """Group ids of `prompts` different held-out prompts, or of all `available` ones if there are fewer.

    The ids begin with a whole pass over the held-out prompts, far beyond the ids of any run.
    """
    first = -(-_BEYOND // available) * available
    return range(first, first + min(prompts, available))


def judges_of(reward: RewardConfig, rule: str) -> dict[str, RewardConfig]:
    """Name -> configuration of each judge: the reward model, if there is one, then the rule, if there is one.

    The judge that the policy was trained on comes first. rule: import path of the task's reward function, "" if it has
    none; `reward.function` takes precedence over it.
    """
    function = reward.function or rule
    judges = {MODEL: reward.model_copy(update={"function": ""})} if reward.model else {}
    return judges | ({RULE: reward.model_copy(update={"function": function, "model": ""})} if function else {})


def judges_of_conversations(reward: RewardConfig) -> dict[str, RewardConfig]:
    """Name -> configuration of each judge of a conversation.

    The environment's rewards alone are one. If a function or model judges besides, the sum of both comes first, since
    the policy was trained on it.
    """
    alone = reward.model_copy(update={"function": "", "model": ""})
    return ({WHOLE: reward} if alone != reward else {}) | {ENVIRONMENT: alone}


def measures_by(reward: RewardConfig, task: Task) -> dict[str, RewardConfig]:
    """Name -> configuration of each of the task's measures of a single reply. It is asked as a judge is."""
    measures = measures_of(task).items()
    return {name: reward.model_copy(update={"function": path, "model": ""}) for name, path in measures}


def check_judges(judges: Mapping[str, RewardConfig]) -> None:
    """Raises ValueError when there is no judge, or when a judge has a fault that shows before anything starts."""
    if not judges:
        raise ValueError(
            "reward: must name a function or a model where the task brings no reward function, got neither; set "
            "reward.function or reward.model"
        )
    for judge in judges.values():
        if judge.model:
            check_classifier(judge.model, judge.label)
        elif judge.function:
            load_function(judge.function)


def examiners(evaluation: EvaluationConfig) -> list[RoleDemand]:
    """The workers and GPUs that an evaluation needs."""
    return [RoleDemand(role="examiner", workers=evaluation.workers, gpus=evaluation.gpus, fewest=1)]


def idle_examiners(evaluation: EvaluationConfig, rollout: RolloutConfig) -> list[str]:
    """A line for the user if an evaluation has more examiners than chunks to give them; else no line.

    The chunks are counted in the part of the evaluation that has most of them.
    """
    samples = max(evaluation.best_of, evaluation.samples)
    chunks = max(
        math.ceil(evaluation.prompts / prompts_per_chunk(rollout, samples)),
        math.ceil(evaluation.demonstrations / DEMONSTRATIONS),
    )
    if evaluation.workers <= chunks:
        return []
    return [
        f"evaluation.workers = {evaluation.workers}, but an evaluation has {chunks} chunk(s) at most: "
        f"{evaluation.workers - chunks} of them will idle; lower it"
    ]


def evaluate(
    config: EvaluationSettings,
    session: Session,
    run_dir: Path,
    progress: Progress,
    *,
    policy: str,
    baseline: str,
    judges: Mapping[str, RewardConfig],
) -> Evaluation:
    """Evaluate a policy against a baseline.

    policy, baseline: folders or hub names of two causal LMs with the same tokenizer. run_dir: the result names folders
    relative to it. judges: name -> configuration, first the judge that the policy was trained on. Single replies are
    measured by the measures of the task besides.

    The same models, recipe and judges give the same numbers, to the bit. Raises ValueError when prompts do not fit the
    models, or when no prompt could be answered or no reply scored; RunError when an examiner fails.
    """
    progress.stage("evaluate", 4)
    progress.phase("reading the held-out prompts")
    questions = ask(config, baseline, policy)
    progress.phase("starting examiners")
    placed = session.place(place(config.cluster, examiners(config.evaluation)))
    runtime = Runtime.of(session, placed, config.cluster)
    gpus = {"gpus": config.evaluation.gpus}
    rollout = config.rollout.model_copy(update=gpus)
    pool = runtime.pool(
        "examiner",
        config.evaluation.workers,
        Examiner,
        reads=[policy, baseline, config.talk.partner, *(judge.model for judge in judges.values())],
        rollout=rollout,
        reference=config.reference.model_copy(update=gpus),
        sampling=config.sampling,
        seed=config.seed,
        talk=config.talk,
        manager=config.manager,
        environment=EnvironmentSource.of(config.talk, config.task, rollout, config.sampling),
    )
    try:
        pool.start()
        pool.wait_ready()
        progress.rewind(0)
        judging = {name: judge.model_copy(update=gpus) for name, judge in judges.items()}
        measures = {} if config.talk.name else measures_by(next(iter(judging.values())), config.task)
        examination = Examination(config, runtime, pool, progress, questions)
        measured = examination.measure(policy, baseline, judging, measures)
    finally:
        pool.close()
        placed.remove()
    names = {"policy": _named(policy, run_dir), "baseline": _named(baseline, run_dir)}
    found = assess(measured, **names, best_of_n=config.evaluation.best_of, seed=config.seed)
    perplexity = (f"perplexity ({questions.lacking})",) if questions.lacking else ()
    return replace(found, lacking=(*found.lacking, *perplexity, *examination.lacking))


def ask(config: EvaluationSettings, model: str, *others: str) -> Questions:
    """The held-out prompts and demonstrations, in the tokens of `model`, that fit the contexts of all models.

    Raises ValueError as `pipeline.encoding.prompts.heldout_prompts` does.
    """
    models = (model, *others)
    tokenizer, stream = heldout_prompts(config.task, config.batch, config.sampling, models)
    fitting, excluded, lacking = _demonstrations(config.task, config.evaluation, tokenizer, models)
    return Questions(
        tokenizer=tokenizer,
        prompts=stream.draw(heldout_groups(config.evaluation.prompts, len(stream))),
        demonstrations=_as_rollouts(fitting),
        excluded=excluded,
        lacking=lacking,
    )


def check_questions(task: Task, evaluation: EvaluationConfig, model: str, tokenizer: Any) -> None:
    """Raises ValueError when the demonstrations that an evaluation will measure perplexity on are wrong.

    The prompts of the evaluation are checked together with those of the run.
    """
    _demonstrations(task, evaluation, tokenizer, (model,))


def _demonstrations(
    task: Task, evaluation: EvaluationConfig, tokenizer: Any, models: Sequence[str]
) -> tuple[list[tuple[list[int], list[int]]], int, str]:
    """The held-out demonstrations that fit the models, the number of those that do not, and why there are none.

    A demonstration is (prompt ids, response ids). The reason is "" if there are demonstrations. A task need not have
    any; then perplexity is not measured. Raises ValueError when the task's demonstrations are wrong.
    """
    from actors.models.causal_lm import context_of

    rule, context = (
        f"task: demonstrations('heldout') of {task.name!r} must give a list of Demonstration",
        min(map(context_of, models)),
    )
    given: list[Demonstration] = []
    with suppress(NoRowsError), user_code(rule, but=NoRowsError):
        given = demonstrations_of(task, "heldout") if task.demonstrations("heldout") else []
    chosen = _some(given, evaluation.demonstrations)
    with user_code(rule):
        encoded = demonstration_ids(chosen, TextCodec(tokenizer))
    fitting = [(prompt, response) for prompt, response in encoded if prompt and len(prompt) + len(response) <= context]
    lacking = (
        "there are no held-out demonstrations" if not given else "evaluation.demonstrations is 0" if not chosen else ""
    )
    if chosen and not fitting:
        lacking = f"none of {len(chosen)} held-out demonstrations has a prompt and fits the model's context"
    return fitting, len(encoded) - len(fitting), lacking


def _some(demonstrations: list[Demonstration], most: int) -> list[Demonstration]:
    """At most `most` demonstrations, spread over the whole list, and the same ones every time."""
    return [demonstrations[i] for i in sorted(permutation(0, 0, len(demonstrations))[:most])]


def _as_rollouts(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> pa.Table:
    return (
        demonstration_table(pairs).table.select(Rollouts.schema.names).cast(Rollouts.schema)
        if pairs
        else Rollouts.concat([]).table
    )


def _named(model: str, run_dir: Path) -> str:
    """The name of a model in the result: a path relative to run_dir, if the model lies in it.

    So a run that is done in another folder gives the same result.
    """
    path = Path(model)
    return str(path.relative_to(run_dir)) if path.is_relative_to(run_dir) else model
