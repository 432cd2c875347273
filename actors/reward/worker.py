"""The reward worker: gives each rollout a score and a status.

consumes: chunks of Rollouts    yields: Scores, a report    state: the tokenizer and the reward function

A reward comes from a Python function named by import path, or from a Hugging Face sequence classifier; both are one
`RewardFunction`. In a conversation the environment has rewarded each turn; the function or classifier, if there is one,
judges all of it, and its score is added at the last turn.

A user's code may fail, so every failure becomes a status of the sample that caused it. It never becomes a zero that
would be trained on, and never affects other samples. Only a function that returns another number of values than there
are responses ends the run, because it would be wrong for any sample.

Left out: caching, and a retry of a function that failed by chance. The pool re-issues a chunk whose worker was lost.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from actors import ragged
from actors.experience import CONVERSATION, Rollouts, Scores
from actors.models.text import TextCodec
from actors.reward.scoring import Score, Scoring, what_went_wrong

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from actors.config import RewardConfig

CLASSIFIER = "reward.model: must be a folder or hub name of a sequence classifier"
_NOT_GENERATED: Score = (math.nan, "error", "rollout: generation failed")
_LEFT_OUT: Score = (math.nan, "error", "left out")
_UNSAID: Mapping[str, Any] = {"turns": (), "failure": ""}  # what the environment says where there is none
ENVIRONMENT = "environment: "  # begins the reason of a sample that failed in its conversation


class RewardFunction(Protocol):
    """A user's reward: one finite number for each response; higher is better. Example, in `my_rewards.py`:

        def politeness(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
            return [float("please" in response.lower()) for response in responses]

    which a recipe names as `function = "my_rewards:politeness"`.

    prompts:   text before the reply, with its special tokens (such as role markers), but without those that a tokenizer
               puts before every text (`<s>`). Of a conversation: all of it up to the last reply.
    responses: text of the reply, without special tokens. Of a conversation: the last one.
    metadata:  the task's metadata of each prompt; of a conversation also what the environment said, see `Rollouts`.

    It must judge each sample by itself: it is called on batches, and again on single samples when a batch fails.
    """

    def __call__(
        self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]], /
    ) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """The driver's view of a scored chunk: scalars, failed samples, flat groups. The scores stay in the table."""

    chunk: int
    attempt: int
    samples: int
    ok: int
    failed: int
    mean: float  # over the samples that are ok; NaN without any
    seconds: float
    failures: dict[int, str]  # sample_id -> "timeout: ..." or "error: ..."
    flat_groups: tuple[int, ...] = ()  # groups whose samples all have the same score
    batches_split: int = 0  # batches that failed and were called again sample by sample
    why_split: str = ""  # the reason of the first


class RewardWorker:
    """Scores chunks of rollouts."""

    def __init__(self, *, config: RewardConfig, tokenizer_path: str, conversations: bool = False) -> None:
        """conversations: the rollouts are conversations, which need no other reward than their environment's."""
        from actors.models.tokenizer import load_tokenizer

        self.config = config
        self.tokenizer = load_tokenizer(tokenizer_path)
        self._codec = TextCodec(self.tokenizer)
        self._conversations = conversations
        self.function = load_reward(config) if is_named(config) or not conversations else _nothing

    def score(
        self, rollouts: pa.Table, chunk: int, attempt: int, without: Collection[int] = (), within_s: float = math.inf
    ) -> tuple[RewardReport, pa.Table]:
        """Score a `Rollouts` table; returns a report and the `Scores` table, in the same order.

        The reward of a row whose status is not `ok` is NaN, so nothing can take it for a number. A rollout that failed
        (finish `error`) is an `error` here, without a call of the function. without: ids of samples that are left out;
        they do not count as failures. within_s: time after which the call returns; samples that are not scored by then
        are a `timeout`. Raises ContractError when the function returns another number of values than there are
        responses.
        """
        call = Scoring(self.function, self.config, time.monotonic(), within_s)
        table = Rollouts(rollouts).table
        prompts, responses = self.texts(table)
        metadata = [json.loads(text) for text in table["metadata"].to_pylist()]
        samples, finishes = table["sample_id"].to_pylist(), table["finish"].to_pylist()
        said = [one[CONVERSATION] for one in metadata] if self._conversations else [_UNSAID] * len(samples)
        scores = [
            _LEFT_OUT if sample in without else _not_generated(one) for sample, one in zip(samples, said, strict=True)
        ]
        rows = [row for row, finish in enumerate(finishes) if finish != "error" and samples[row] not in without]
        for start in range(0, len(rows), self.config.batch_size):
            batch = rows[start : start + self.config.batch_size]
            answers = call.batch([(prompts[row], responses[row], metadata[row]) for row in batch])
            for row, answer in zip(batch, answers, strict=True):
                scores[row] = answer
        turns = [[float(turn["reward"]) for turn in one["turns"]] for one in said]
        scores, turns = _with_turns(scores, turns) if self._conversations else (scores, turns)
        flat = flat_groups(table["group_id"].to_pylist(), [reward for reward, _, _ in scores])
        report, scored = _results(samples, scores, turns, chunk=chunk, attempt=attempt, started=call.started)
        return replace(report, flat_groups=flat, batches_split=call.batches_split, why_split=call.why_split), scored

    def texts(self, table: pa.Table) -> tuple[list[str], list[str]]:
        """Prompts and responses as text; of a conversation, the response is the last turn."""
        tokens, offsets = ragged.flat(table["tokens"])
        actions, _ = ragged.flat(table["action_mask"])
        begins, turns = ragged.flat(table["turn_starts"])
        prompts, responses = [], []
        for (start, end), (first, last) in zip(pairwise(offsets), pairwise(turns), strict=True):
            row, chosen = tokens[start:end], actions[start:end]
            begin = int(begins[last - 1]) if last > first else len(row)
            prompts.append(row[:begin])
            responses.append(row[begin:][chosen[begin:]])
        return self._codec.decode_prompts(prompts), self._codec.decode_replies(responses)


class ClassifierReward:
    """A `RewardFunction` made of a Hugging Face sequence classifier and its own tokenizer.

    The text is prompt + response. A text that is too long loses its beginning, because the end is judged.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", label: int = -1) -> None:
        """Load the classifier. label: number of the output that is the reward; -1: the only one.

        Raises ValueError naming the path when it holds no such classifier, or no tokenizer that can pad.
        """
        import torch
        from transformers import AutoModelForSequenceClassification

        from actors.models.context import longest_text
        from actors.models.loading import load_exactly

        self.tokenizer = check_classifier(path, label)
        self._codec = TextCodec(self.tokenizer)
        self._label = max(label, 0)
        model, _ = load_exactly(AutoModelForSequenceClassification, path, CLASSIFIER, dtype=torch.float32)
        self._longest = longest_text(model.config, model)
        # the classifier reads the last token that is not padding
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval()

    def __call__(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]], /) -> list[float]:
        """The classifier's logit of each text."""
        import torch

        texts = self._codec.encode_judged(prompts, responses)
        kept = texts if self._longest is None else [self._codec.shortened(ids, self._longest) for ids in texts]
        batch = self.tokenizer.pad({"input_ids": kept}, padding=True, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            logits = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits  # (B, labels)
        return [float(logit) for logit in logits[:, self._label]]


def is_named(config: RewardConfig) -> bool:
    """Whether a configuration names a function or a model."""
    return bool(config.function or config.model)


def _nothing(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """The reward function of conversations that only their environment rewards."""
    return [0.0] * len(responses)


def _not_generated(said: Mapping[str, Any]) -> Score:
    if not said["failure"]:
        return _NOT_GENERATED
    status, _, why = said["failure"].partition(": ")
    if status in ("error", "timeout") and why:
        return math.nan, status, f"{ENVIRONMENT}{why}"
    return math.nan, "error", f"{ENVIRONMENT}{said['failure']}"


def _with_turns(scores: Sequence[Score], turns: Sequence[list[float]]) -> tuple[list[Score], list[list[float]]]:
    """Scores with the turns' rewards added, and the turns' rewards with the scores added to each last one."""
    totals, credited = list(scores), []
    for row, ((score, status, _), own) in enumerate(zip(scores, turns, strict=True)):
        total = math.fsum((score, *own))
        credited.append([*own[:-1], own[-1] + score] if own and math.isfinite(total) else [])
        if status == "ok":
            totals[row] = (total, "ok", "")
            if not math.isfinite(np.float32(total)):
                totals[row] = (math.nan, "error", f"{ENVIRONMENT}its rewards come to {total:g}, beyond float32")
    return totals, credited


def flat_groups(groups: Sequence[int], rewards: Sequence[float]) -> tuple[int, ...]:
    """Groups whose rewards are all exactly equal, in order; the NaN of a failure is equal to nothing."""
    of_group: dict[int, list[float]] = {}
    for group, reward in zip(groups, rewards, strict=True):
        of_group.setdefault(group, []).append(reward)
    return tuple(sorted(group for group, own in of_group.items() if all(reward == own[0] for reward in own)))


def load_reward(config: RewardConfig) -> RewardFunction:
    """The function or classifier that a configuration names. Raises ValueError if it names neither or both."""
    if bool(config.function) == bool(config.model):
        given = "both" if config.function else "neither"
        raise ValueError(
            f"reward: must name a function or a model, got {given}; set one of reward.function and reward.model"
        )
    if config.model:
        from actors.device import assigned_compute

        return ClassifierReward(config.model, device=assigned_compute(config.gpus).device, label=config.label)
    return load_function(config.function)


def load_function(path: str, field: str = "reward.function") -> Callable[..., Any]:
    """Import the callable `package.module:name`. Needs neither Ray nor torch, so a recipe is checked early.

    Raises ValueError naming the field when the import raises anything, or the name is not callable.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{field}: must be package.module:name, got {path!r}; name a callable by its import path")
    try:
        with user_code(f"{field}: must be importable, got {path!r}", but=ImportError):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{field}: must be importable, got {path!r}: {error}; put the module beside the recipe, in the current "
            "folder or on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        problem = "no such name in the module" if found is None else f"of type {type(found).__name__}"
        raise ValueError(f"{field}: must be callable, got {path!r}: {problem}; define it in {module.__file__}")
    return found  # type: ignore[no-any-return]


@contextmanager
def user_code(rule: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Inside, any exception or exit of the user's code becomes a one-line ValueError that begins with `rule`.

    Exceptions of the type `but` pass unchanged.
    """
    try:
        yield
    except but:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{rule}, but it raised {what_went_wrong(error)}") from error


def check_classifier(path: str, label: int = -1) -> Any:
    """Check a classifier without loading its weights; returns its tokenizer. Raises ValueError."""
    from transformers import AutoModelForSequenceClassification

    from actors.models.causal_lm import check_model, check_vocabulary, config_of
    from actors.models.loading import check_names

    check_model(path, CLASSIFIER)
    config = config_of(path, CLASSIFIER)
    if label < 0 and config.num_labels != 1:
        names = ", ".join(f"{number} {name}" for number, name in sorted(config.id2label.items()))
        raise ValueError(
            f"reward.model: must have one output, got {config.num_labels} labels in {path!r} ({names}); choose one by "
            "reward.label"
        )
    if label >= config.num_labels:
        raise ValueError(
            f"reward.label: must be below the number of outputs of {path!r}, {config.num_labels}, got {label}"
        )
    tokenizer = _classifier_tokenizer(path)
    check_vocabulary(path, tokenizer, "reward.model")
    check_names(AutoModelForSequenceClassification, path, CLASSIFIER)
    return tokenizer


def _classifier_tokenizer(path: str) -> Any:
    """The tokenizer of a classifier, which pads with its end of text if it has no padding token.

    Unlike a policy's, it may lack an end of text, as a BERT's does.
    """
    from actors.models.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(path, "reward.model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"reward.model: must have a tokenizer with a padding token, got none in {path!r}; set pad_token in its "
            "tokenizer_config.json"
        )
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return tokenizer


def _results(
    sample_ids: list[int], scores: list[Score], turns: list[list[float]], *, chunk: int, attempt: int, started: float
) -> tuple[RewardReport, pa.Table]:
    rewards, statuses, details = [list(column) for column in zip(*scores, strict=True)] or ([], [], [])
    ok = [reward for reward, status, _ in scores if status == "ok"]
    failures = {
        sample: f"{status}: {detail}"
        for sample, score in zip(sample_ids, scores, strict=True)
        for _, status, detail in [score]
        if status != "ok" and score is not _LEFT_OUT
    }
    report = RewardReport(
        chunk=chunk,
        attempt=attempt,
        samples=len(scores),
        ok=len(ok),
        failed=len(failures),
        mean=float(np.mean(ok)) if ok else math.nan,
        seconds=time.monotonic() - started,
        failures=failures,
    )
    columns: dict[str, object] = {
        "sample_id": sample_ids,
        "reward": rewards,
        "turn_rewards": turns,
        "status": statuses,
        "detail": details,
    }
    return report, Scores.of(columns).table
