"""The reward actor: rollouts in, a score and a status for each of them out.

A reward comes from a Python function named by import path, or from a Hugging Face sequence classifier; both are one
`RewardFunction`. Reward code is a user's and does go wrong, so every failure ends as a status of the one sample that
caused it: never as a zero that would be trained on, and never at the cost of its neighbours.

Left out: caching, and a retry of a function that failed by chance. The pool re-issues a chunk whose worker was lost.
"""

from __future__ import annotations

import importlib
import json
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from actors import ragged
from actors.experience import Rollouts, Scores

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from actors.config import RewardConfig

MAX_DETAIL = 200  # characters of a failure's reason that are kept
_CLASSIFIER = "reward.model: must be a folder or hub name of a sequence classifier"
Score = tuple[float, str, str]  # reward, status, detail


class RewardFunction(Protocol):
    """What a user writes: one finite number for each response; higher is better. Example, in `my_rewards.py`:

        def politeness(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
            return [float("please" in response.lower()) for response in responses]

    which a recipe names as `function = "my_rewards:politeness"`.

    prompts:   text before the first action token, special tokens (such as role markers) included.
    responses: text of the action tokens, special tokens left out.
    metadata:  what the task said of each prompt.

    It must judge each sample by itself: it is called on batches, and again on single samples when a batch fails.
    """

    def __call__(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]], /) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """What the driver learns of a scored chunk: scalars, the failed samples and the groups without variance; the scores themselves stay in the table."""

    chunk: int
    attempt: int
    samples: int
    ok: int
    failed: int
    mean: float  # over the samples that are ok; nan when there are none
    seconds: float
    failures: dict[int, str]  # sample_id -> "timeout: ..." or "error: ..."
    flat_groups: tuple[int, ...] = ()  # whose samples all have the same score


class RewardWorker:
    """Scores chunks of rollouts. Holds nothing between calls but the tokenizer and the reward function."""

    def __init__(self, *, config: RewardConfig, tokenizer_path: str) -> None:
        from actors.model import load_tokenizer

        self.config = config
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.function = load_reward(config)

    def score(self, rollouts: pa.Table, chunk: int, attempt: int) -> tuple[RewardReport, pa.Table]:
        """A `Rollouts` table to a report and the `Scores` table, row by row in the same order.

        The reward of a row whose status is not `ok` is NaN: nothing can take it for a number. A rollout that
        failed itself (finish `error`) is an `error` here and never reaches the function.
        """
        started = time.monotonic()
        table = Rollouts(rollouts).table
        prompts, responses = self.texts(table)
        metadata = [json.loads(text) for text in table["metadata"].to_pylist()]
        scores: list[Score] = [(math.nan, "error", "rollout: generation failed")] * table.num_rows
        rows = [row for row, finish in enumerate(table["finish"].to_pylist()) if finish != "error"]
        for start in range(0, len(rows), self.config.batch_size):
            batch = rows[start : start + self.config.batch_size]
            answers = self._call([prompts[row] for row in batch], [responses[row] for row in batch], [metadata[row] for row in batch])
            for row, answer in zip(batch, answers, strict=True):
                scores[row] = answer
        flat = flat_groups(table["group_id"].to_pylist(), [reward for reward, _, _ in scores])
        report, scored = _results(table["sample_id"].to_pylist(), scores, chunk=chunk, attempt=attempt, started=started)
        return replace(report, flat_groups=flat), scored

    def _call(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[Score]:
        """One score a sample. A batch that fails is called again sample by sample, so a failure is charged to its cause alone."""
        try:
            with _time_limit(self.config.timeout_s):
                rewards = _checked(self.function(prompts, responses, metadata), len(prompts))
            return [(float(reward), "ok", "") for reward in rewards]
        except _OutOfTimeError:
            failed: Score = (math.nan, "timeout", f"took longer than reward.timeout_s = {self.config.timeout_s:g} s")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code may raise anything; it becomes this sample's status
            failed = (math.nan, "error", what_went_wrong(error))
        if len(prompts) == 1:
            return [failed]
        samples = zip(prompts, responses, metadata, strict=True)
        return [self._call([prompt], [response], [row])[0] for prompt, response, row in samples]

    def texts(self, table: pa.Table) -> tuple[list[str], list[str]]:
        """Prompts and responses as text. A rollout's later environment turns belong to neither."""
        tokens, offsets = ragged.flat(table["tokens"])
        actions, _ = ragged.flat(table["action_mask"])
        prompts, responses = [], []
        for start, end in pairwise(offsets):
            row, chosen = tokens[start:end], actions[start:end]
            first = int(chosen.argmax()) if chosen.any() else len(row)
            prompts.append(self._decode(row[:first], skip_special=False))
            responses.append(self._decode(row[chosen], skip_special=True))
        return prompts, responses

    def _decode(self, ids: ragged.Array, *, skip_special: bool) -> str:
        # Embeddings are often padded beyond the tokenizer's vocabulary, so such an id can be sampled; it stands for no text.
        known = ids[(ids >= 0) & (ids < len(self.tokenizer))].tolist()
        return str(self.tokenizer.decode(known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))


class ClassifierReward:
    """A `RewardFunction` that is a Hugging Face sequence classifier with one output, read by its own tokenizer.

    The text is prompt + response; one that is too long loses its beginning, for the end is what is judged.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", label: int = -1) -> None:
        """label: of the output that is the reward, where there are several. Raises ValueError naming the path when it holds no such classifier, or no
        tokenizer that can pad."""
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = check_classifier(path, label)
        self._label = max(label, 0)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{_CLASSIFIER}, got {path!r}: {error}") from error
        model.config.pad_token_id = self.tokenizer.pad_token_id  # the classifier reads the last token that is not this one
        self.model = model.to(device).eval()

    def __call__(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]], /) -> list[float]:
        """The classifier's logit of each text."""
        import torch

        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=limit is not None, max_length=limit).to(self.model.device)
        with torch.inference_mode():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, labels)
        return [float(logit) for logit in logits[:, self._label]]


def flat_groups(groups: Sequence[int], rewards: Sequence[float]) -> tuple[int, ...]:
    """Groups whose rewards are equal, in order; a NaN, which a failure has, is equal to nothing. Exact: a reward function says equal where it means it."""
    of_group: dict[int, list[float]] = {}
    for group, reward in zip(groups, rewards, strict=True):
        of_group.setdefault(group, []).append(reward)
    return tuple(sorted(group for group, own in of_group.items() if all(reward == own[0] for reward in own)))


def load_reward(config: RewardConfig) -> RewardFunction:
    """The function or classifier a configuration names. Raises ValueError when it names neither or both."""
    if bool(config.function) == bool(config.model):
        given = "both" if config.function else "neither"
        raise ValueError(f"reward: must name a function or a model, got {given}; set one of reward.function and reward.model")
    if config.model:
        from actors.device import assigned_compute

        return ClassifierReward(config.model, device=assigned_compute(config.gpus).device, label=config.label)
    return load_function(config.function)


def load_function(path: str, field: str = "reward.function") -> Callable[..., Any]:
    """What `package.module:name` names. Needs neither Ray nor torch, so a recipe is checked before anything starts.

    Raises ValueError naming the field when it cannot be imported, whatever importing it raises, or is not callable.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{field}: must be package.module:name, got {path!r}; name a callable by its import path")
    try:
        with user_code(f"{field}: must be importable, got {path!r}", but=ImportError):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{field}: must be importable, got {path!r}: {error}; put the module on PYTHONPATH or in the working directory") from error
    found = getattr(module, name, None)
    if not callable(found):
        problem = "no such name in the module" if found is None else f"of type {type(found).__name__}"
        raise ValueError(f"{field}: must be callable, got {path!r}: {problem}; define it in {module.__file__}")
    return found  # type: ignore[no-any-return]


@contextmanager
def user_code(rule: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Inside, code of the user's runs, which may raise anything and even exit: a ValueError of one line that begins with `rule`. `but` goes through."""
    try:
        yield
    except but:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{rule}, but it raised {what_went_wrong(error)}") from error


def what_went_wrong(error: BaseException) -> str:
    """An error of the user's code in one line: its type, its first line, and where it was raised unless that is in this file."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"[:MAX_DETAIL].rstrip(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]  # not the import machinery's own
    if isinstance(error, SyntaxError) or not frames or frames[-1].filename == __file__:  # a SyntaxError says itself where
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def check_classifier(path: str, label: int = -1) -> Any:
    """The tokenizer of a classifier. Raises ValueError for what is wrong with the classifier and can be seen before its weights are loaded."""
    from transformers import AutoConfig

    from actors.model import check_model, quiet_transformers

    check_model(path, _CLASSIFIER)
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{_CLASSIFIER}, got {path!r}: {str(error).strip().splitlines()[0]}") from error
    if label < 0 and config.num_labels != 1:
        names = ", ".join(f"{number} {name}" for number, name in sorted(config.id2label.items()))
        raise ValueError(f"reward.model: must have one output, got {config.num_labels} labels in {path!r} ({names}); choose one by reward.label")
    if label >= config.num_labels:
        raise ValueError(f"reward.label: must be below the number of outputs of {path!r}, {config.num_labels}, got {label}")
    return _classifier_tokenizer(path)


def _classifier_tokenizer(path: str) -> Any:
    """It need not know an end of text, as a policy's must: a BERT's does not. Without a padding token it pads with its end of text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"reward.model: must have its tokenizer beside it, got {path!r}: {error}; save the one it was trained with there") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up for some families; all texts would look the same
        raise ValueError(f"reward.model: must have its tokenizer beside it, got {path!r} without; save the one it was trained with there")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"reward.model: must have a tokenizer with a padding token, got none in {path!r}; set pad_token in its tokenizer_config.json")
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return tokenizer


class _OutOfTimeError(BaseException):
    """The alarm. Not an `Exception`, so that a reward function's own `except Exception` does not swallow it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _OutOfTimeError in the block after `seconds`.

    Python delivers signals to the main thread alone, where Ray runs the methods of an ordinary actor. In any other thread,
    and inside foreign code that never returns to the interpreter, only the pool's deadline ends the call.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum: int, frame: object) -> None:
        raise _OutOfTimeError

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, expire)
    previous, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if previous:  # somebody else's alarm, as a test runner sets: it goes on where it was
            signal.setitimer(signal.ITIMER_REAL, max(previous - (time.monotonic() - started), 1e-3))


def _checked(values: Sequence[float], count: int) -> ragged.Array:
    """The rewards as (count,) float32. Raises ValueError for another number of them, or one that is not finite."""
    rewards = np.asarray(values, dtype=np.float64)
    if rewards.shape != (count,):
        raise ValueError(f"must return one number a response, shape ({count},), got shape {rewards.shape}")
    finite = np.abs(rewards) <= np.finfo(np.float32).max  # false for NaN too
    if not finite.all():
        raise ValueError(f"must return finite numbers, got {rewards[~finite][0]}")
    return rewards.astype(np.float32)


def _results(sample_ids: list[int], scores: list[Score], *, chunk: int, attempt: int, started: float) -> tuple[RewardReport, pa.Table]:
    rewards, statuses, details = [list(column) for column in zip(*scores, strict=True)] or ([], [], [])
    ok = [reward for reward, status, _ in scores if status == "ok"]
    failures = {sample: f"{status}: {detail}" for sample, (_, status, detail) in zip(sample_ids, scores, strict=True) if status != "ok"}
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
    columns: dict[str, object] = {"sample_id": sample_ids, "reward": rewards, "turn_rewards": [[] for _ in scores], "status": statuses, "detail": details}
    return report, Scores.of(columns).table
