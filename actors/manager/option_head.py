"""The choice of options in a rollout worker: pi(o | h) = softmax(W · LN(h) + b) over the options on offer.

Shapes: N turns, D features, K options.

Each row is computed by itself, in NumPy, so its bits do not depend on its neighbours. Sums are float64 and the logits
are rounded to float32, so they differ from the learner's by the learner's rounding only. The random number of a choice
depends on (seed, sample_id, turn) alone. Left out: RLlib and torch, so a worker starts without them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from actors.models.option_names import TRAINED_HEAD

EPSILON = 1e-5  # of the layer norm, here and in the learner
WEIGHTS = ("policy_weight", "policy_bias")

FILE = "option-head.safetensors"  # in the folder of a policy
Floats = npt.NDArray[np.float32]

_OPTIONS = 1  # top word of the counter; the tokens of a sample count from 0 and never come so far


class Choices(NamedTuple):
    """The options of N turns, and log pi(option | h)."""

    options: npt.NDArray[np.int16]  # (N,)
    logprobs: Floats  # (N,)


def save_head(folder: Path, weights: Mapping[str, Floats]) -> None:
    """Write a manager's head into the folder of the policy that it has chosen options for.

    The policy's `config.json` is told of it, so that a head that is lost later is missed.
    """
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(weights[name]) for name in WEIGHTS}, folder / FILE)
    config = folder / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8")) | {TRAINED_HEAD: FILE}
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_head(model: str, options: int, width: int) -> dict[str, Floats]:
    """The head in the folder of a policy; for a model without a manager, one that chooses all options alike.

    model: folder, or hub name of a model whose config is in the cache. options: K. width: D. Raises ValueError for a
    head of other sizes, and where the head of a policy that was trained with a manager is not there.
    """
    folder = Path(model)
    if not (folder / FILE).is_file():
        if TRAINED_HEAD in _config(model):
            raise ValueError(
                f"{model}: must be a folder with the manager's head, {FILE}, since the policy was trained with a "
                f"manager, got none; copy the file from the run's policy folder, or, to have options chosen at random, "
                f"remove {TRAINED_HEAD} from config.json"
            )
        return {"policy_weight": np.zeros((options, width), np.float32), "policy_bias": np.zeros(options, np.float32)}
    from safetensors.numpy import load_file

    found: dict[str, Floats] = load_file(folder / FILE)
    shapes = {name: found[name].shape for name in WEIGHTS if name in found}
    if shapes != {"policy_weight": (options, width), "policy_bias": (options,)}:
        raise ValueError(
            f"{folder / FILE}: must be the head of a manager of {options} options and {width} features, got {shapes}; "
            "name the options that it was trained with"
        )
    return found


def _config(model: str) -> dict[str, Any]:
    """The entries of a model's config.json; none if it has none. model: folder, or name of a cached hub model."""
    path: Path | str | None = Path(model) / "config.json"
    if not os.path.isdir(model):
        from huggingface_hub import try_to_load_from_cache

        path = found if isinstance(found := try_to_load_from_cache(model, "config.json"), str) else None
    if path is None or not os.path.isfile(path):
        return {}
    entries: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return entries


class OptionHead:
    """The policy head of a manager, from `Manager.weights`."""

    def __init__(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """weights: policy_weight (K, D) and policy_bias (K,), finite float32. Raises ValueError for anything else."""
        if set(weights) != set(WEIGHTS):
            raise ValueError(f"weights: must be {sorted(WEIGHTS)}, got {sorted(weights)}")
        weight, bias = (np.ascontiguousarray(weights[name]) for name in WEIGHTS)
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or {weight.dtype, bias.dtype} != {np.dtype(np.float32)}:
            raise ValueError(
                "weights: must be float32, policy_weight (options, features) and policy_bias (options,), got "
                f"{weight.dtype} {weight.shape} and {bias.dtype} {bias.shape}"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("weights: must be finite, got a number that is not; restore the manager's last commit")
        self._weight = weight.astype(np.float64)
        self._bias = bias.astype(np.float64)

    @property
    def options(self) -> int:
        """K"""
        return len(self._bias)

    @property
    def width(self) -> int:
        """D"""
        return int(self._weight.shape[1])

    def logits(self, features: Floats) -> Floats:
        """The logits of all options, offered or not: (N, D) -> (N, K).

        Raises ValueError for another width, and for features or logits that are not finite.
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features: must be (rows, {self.width}), got {features.shape}")
        _check_finite("features", features)
        out = np.empty((len(features), self.options), np.float32)
        for row, h in enumerate(features):
            centred = h.astype(np.float64)
            centred -= centred.mean()
            normed = centred / np.sqrt((centred * centred).mean() + EPSILON)
            with np.errstate(over="ignore"):  # refused below
                out[row] = (self._weight * normed).sum(1) + self._bias  # not `@`, whose order of sums is the library's
        _check_finite("logits", out)
        return out

    def choose(
        self,
        features: Floats,
        offered: npt.NDArray[np.bool_],
        sample_ids: npt.NDArray[np.int64],
        turns: npt.NDArray[np.int32],
        *,
        seed: int,
        greedy: bool = False,
    ) -> Choices:
        """Choose an option for each turn among those on offer.

        features: (N, D). offered: (N, K). sample_ids, turns: (N,), which turn of which conversation a row is. greedy:
        take the likeliest option, the first of equals, and report the log-prob that sampling gives it; used where
        tokens are sampled at temperature 0. Raises ValueError for a turn without an option on offer, and as `logits`.
        """
        logits, offered = self.logits(features), np.asarray(offered, np.bool_)
        if offered.shape != logits.shape:
            raise ValueError(f"offered: must be {logits.shape}, got {offered.shape}")
        if not offered.any(1).all():
            raise ValueError(f"offered: must offer an option in each row, got none in row {offered.any(1).argmin()}")
        options = np.empty(len(logits), np.int16)
        logprobs = np.empty(len(logits), np.float32)
        for row, (of_row, on_offer) in enumerate(zip(logits, offered, strict=True)):
            shifted = np.where(on_offer, of_row.astype(np.float64), -np.inf)
            shifted -= shifted.max()
            sums = np.exp(shifted).cumsum()
            uniform = option_uniform(seed, int(sample_ids[row]), int(turns[row]))
            option = int(shifted.argmax()) if greedy else _inverse_cdf(sums, uniform)
            options[row], logprobs[row] = option, shifted[option] - np.log(sums[-1])
        return Choices(options, logprobs)


def option_uniform(seed: int, sample_id: int, turn: int) -> float:
    """The random number in [0, 1) of a turn's choice.

    It comes from the Philox generator of the sample's tokens (`actors/engine/sampler.py`), at a counter that no token
    reaches, so options and tokens are independent.
    """
    key = np.array([seed % 2**64, sample_id % 2**64], np.uint64)
    counter = np.array([0, turn, 0, _OPTIONS], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def _check_finite(name: str, values: Floats) -> None:
    if not (finite := np.isfinite(values).all(1)).all():
        raise ValueError(
            f"{name}: must be finite, got row {finite.argmin()} with a number that is not; the model that made the "
            "features, or the manager, is damaged"
        )


def _inverse_cdf(sums: npt.NDArray[np.float64], uniform: float) -> int:
    """The first option whose running sum of probabilities exceeds uniform * total; so never one of probability zero.

    Rounding could bring the product up to the total, so it is kept below.
    """
    target = min(uniform * sums[-1], np.nextafter(sums[-1], 0.0))
    return int((sums <= target).sum())
