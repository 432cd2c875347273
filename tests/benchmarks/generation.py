"""Tokens per second of the built-in engine beside `transformers.generate`, in one run and on one set of prompts.

    python tests/benchmarks/generation.py [tiny|gpt2] [--repeats 3] [--threads 2]

Random weights; completions have full length (no end-of-text token). Runs are interleaved and the median is printed,
since only ratios within one run mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

# so that it runs from a checkout, installed or not
sys.path[:0] = [
    str(Path(__file__).parents[2]),
    str(Path(__file__).parents[1]),
]

import tiny_models  # noqa: E402
from actors.config import RolloutConfig, SamplingConfig  # noqa: E402
from actors.engine.protocol import Request  # noqa: E402
from actors.engine.torch_engine import TorchEngine  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A GPT-2 and a batch of rows x (prompt + new) tokens."""

    width: int
    layers: int
    vocabulary: int
    rows: int
    prompt: int
    new: int


SHAPES = {
    "tiny": Shape(width=64, layers=2, vocabulary=64, rows=32, prompt=5, new=16),
    "gpt2": Shape(width=768, layers=12, vocabulary=50257, rows=64, prompt=32, new=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="gpt2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory() as folder:
        save(shape, Path(folder))
        runs = contenders(shape, folder)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                run(2 if repeat == 0 else shape.new)  # the first round only warms up
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
    report(arguments.shape, shape, {name: statistics.median(values) for name, values in seconds.items()})


def save(shape: Shape, folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    heads = max(2, shape.width // 64)
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_models.byte_tokenizer().save_pretrained(folder)


def contenders(shape: Shape, folder: str) -> dict[str, Callable[[int], Any]]:
    """Name -> a function that generates so many tokens for every row."""
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, size=(shape.rows, shape.prompt)).astype(np.int32)
    runs: dict[str, Callable[[int], Any]] = {}
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    for dtype in dtypes:
        runs[f"generate {dtype}"] = _generate(folder, getattr(torch, dtype), torch.from_numpy(ids.astype(np.int64)))
        runs[f"raylign {dtype}"] = _raylign(folder, RolloutConfig(slots=shape.rows, dtype=dtype), ids)
    return runs


def _generate(folder: str, dtype: torch.dtype, ids: torch.Tensor) -> Callable[[int], Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    mask = torch.ones_like(ids)
    return lambda new: model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0
    )


def _raylign(folder: str, config: RolloutConfig, ids: np.ndarray) -> Callable[[int], Any]:
    engine = TorchEngine(folder, config, torch.device("cpu"))
    engine.ends = np.array([], np.int64)
    requests = [Request(sample_id=i, group_id=i, prompt=row) for i, row in enumerate(ids)]
    return lambda new: engine.generate(requests, SamplingConfig(max_new_tokens=new), seed=0)


def report(name: str, shape: Shape, seconds: dict[str, float]) -> None:
    anchor = seconds["generate bfloat16"]
    model, batch = (
        f"{shape.layers} x {shape.width}, vocabulary {shape.vocabulary}",
        f"{shape.rows} x ({shape.prompt} + {shape.new}) tokens",
    )
    print(f"{name}: {model}, {batch}, {torch.get_num_threads()} threads")
    print(f"{'engine':<20}{'seconds':>10}{'tokens/s':>12}{'x generate bf16':>18}")
    for contender, value in seconds.items():
        print(f"{contender:<20}{value:>10.3f}{shape.rows * shape.new / value:>12.0f}{anchor / value:>18.2f}")


if __name__ == "__main__":
    main()
