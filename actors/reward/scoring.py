"""The calls of a reward function for one chunk: in batches, and sample by sample if a batch fails.

Each call has a time limit, and so has the chunk. A function that raises or does not return fails only for the samples
that cause it. A function that returns too few or too many values ends the run.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors import ragged
from actors.reward.time_limit import OutOfTimeError, call_within
from cluster.faults import ContractError

if TYPE_CHECKING:
    from actors.config import RewardConfig

MAX_DETAIL = 200  # characters of a failure's reason that are kept
_RETRIES = 0.5  # largest share of a chunk's time for calls sample by sample
# calls sample by sample end after so many times reward.timeout_s without a success, as with a dead server
_HOPELESS = 4
Score = tuple[float, str, str]  # reward, status, detail
Sample = tuple[str, str, dict[str, Any]]  # prompt, response, metadata


@dataclass(slots=True)
class Scoring:
    """One call of `RewardWorker.score`: the function, its time, and what happened so far."""

    function: Callable[..., Any]
    config: RewardConfig
    started: float
    within_s: float
    retrying_s: float = 0.0  # so far
    batches_split: int = 0
    why_split: str = ""

    def batch(self, samples: Sequence[Sample]) -> list[Score]:
        """Score a batch, one score a sample; if it fails, its samples are scored one by one."""
        scores = self._call(samples)
        if len(samples) == 1 or scores[0][1] == "ok":
            return scores
        self.batches_split += 1
        self.why_split = self.why_split or f"a batch {scores[0][2]}"
        return self._one_by_one(samples, scores)

    def _call(self, samples: Sequence[Sample]) -> list[Score]:
        """Call the function once; returns all scores, or the same failure for all."""
        left_s = self.started + self.within_s - time.monotonic()
        limit_s = min(self.config.timeout_s, left_s)
        if limit_s <= 0:
            return [(math.nan, "timeout", f"was not tried: {self.within_s:g} s of scoring its chunk were over")] * len(
                samples
            )
        columns = [list(column) for column in zip(*samples, strict=True)]
        try:
            rewards = call_within(limit_s, lambda: _checked(self.function(*columns), len(samples), self.config))
            return [(float(reward), "ok", "") for reward in rewards]
        except OutOfTimeError:
            limit = (
                f"reward.timeout_s = {limit_s:g} s"
                if limit_s == self.config.timeout_s
                else f"the {limit_s:.3g} s that were left for its chunk"
            )
            return [(math.nan, "timeout", f"took longer than {limit}")] * len(samples)
        except ContractError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code may raise anything; it becomes this sample's status
            return [(math.nan, "error", what_went_wrong(error))] * len(samples)

    def _one_by_one(self, samples: Sequence[Sample], scores: list[Score]) -> list[Score]:
        """Call the function on single samples, while there is time and some succeed.

        scores: the failure of the batch, which samples that are not tried keep.
        """
        began, has_worked = time.monotonic(), False
        found = [
            (reward, status, f"{detail}, with its batch, and was not tried alone") for reward, status, detail in scores
        ]
        for row in _spread(len(samples)):
            took_s = time.monotonic() - began
            if self.retrying_s + took_s > _RETRIES * self.within_s or (
                not has_worked and took_s >= _HOPELESS * self.config.timeout_s
            ):
                break
            [found[row]] = self._call([samples[row]])
            has_worked |= found[row][1] == "ok"
        self.retrying_s += time.monotonic() - began
        return found


def _spread(count: int) -> list[int]:
    """0 ... count - 1 in an order that begins all over the range, as 0, 4, 2, 6, 1, 5, 3, 7.

    Neighbours are often samples of one prompt.
    """
    width = max(count - 1, 1).bit_length()
    return sorted(range(count), key=lambda row: int(f"{row:0{width}b}"[::-1], 2))


def _checked(values: Any, count: int, config: RewardConfig) -> ragged.Array:
    """The rewards as (count,) float32.

    Raises ContractError for another number of them, ValueError for one that is not finite.
    """
    got = len(values) if hasattr(values, "__len__") and not hasattr(values, "shape") else getattr(values, "shape", None)
    if got not in (count, (count,)):
        returned = (
            f"{got} value{'' if got == 1 else 's'}"
            if isinstance(got, int)
            else f"{type(values).__name__}"
            if got is None
            else f"shape {tuple(got)}"
        )
        name = f"reward.function: {config.function!r}" if config.function else f"reward.model: {config.model!r}"
        raise ContractError(
            f"{name} must return one number a response, got {returned} for {count} responses; return a list as long as "
            "`responses`"
        )
    rewards = np.asarray(values, dtype=np.float64)
    finite = np.abs(rewards) <= np.finfo(np.float32).max  # false for NaN too
    if not finite.all():
        raise ValueError(f"must return finite numbers, got {rewards[~finite][0]}")
    return rewards.astype(np.float32)


def what_went_wrong(error: BaseException) -> str:
    """An error of the user's code in one line: its type, its first line, and where the user's code raised it."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"[:MAX_DETAIL].rstrip(": ")
    # without the frames of the import machinery
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    # the text of a SyntaxError says where it is
    if isinstance(error, SyntaxError) or not frames or frames[-1].filename == __file__:
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
