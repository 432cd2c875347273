"""Tokens per second of conversations of four turns, beside the same tokens in single turns, in one run.

    python tests/benchmarks/conversations.py [tiny|small|gpt2] [--repeats 5] [--threads 2]

Three ways to have the same tokens: a conversation, whose turns go on with the keys and values that are there; one turn
as long as all turns and answers together (what the engine can do at best); and each turn a request of its own with the
history as its prompt (what a server without conversations does). The environment is a real one behind the rollout
worker's partner: threads, text, an encoder. Random weights, turns of full length. Runs are interleaved and the median
is printed, since only ratios within one run mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# so that it runs from a checkout, installed or not
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import tiny_models  # noqa: E402
from actors.config import RolloutConfig, SamplingConfig  # noqa: E402
from actors.engine.protocol import Request  # noqa: E402
from actors.engine.torch_engine import TorchEngine  # noqa: E402
from actors.models.text import TextCodec  # noqa: E402
from actors.rollout.conversations import Conversations, Opening  # noqa: E402
from pipeline.environments.checks import CheckedEnvironment  # noqa: E402
from pipeline.environments.environment import Turn  # noqa: E402
from pipeline.environments.served import ServedEnvironment  # noqa: E402
from pipeline.tasks.task import PromptText  # noqa: E402

TURNS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A GPT-2, and conversations: rows of a prompt, then TURNS turns of `turn` tokens, each with `answer` after it."""

    width: int
    layers: int
    rows: int
    prompt: int
    turn: int
    answer: int

    @property
    def after_prompt(self) -> int:
        """Tokens after the prompt; the last turn has no answer."""
        return TURNS * (self.turn + self.answer) - self.answer


SHAPES = {
    "tiny": Shape(width=64, layers=2, rows=64, prompt=16, turn=12, answer=12),
    "small": Shape(width=256, layers=4, rows=64, prompt=32, turn=24, answer=16),
    "gpt2": Shape(width=768, layers=12, rows=32, prompt=32, turn=24, answer=16),
}


class Talker:
    """Says the same line after each of the first three turns."""

    def __init__(self, answer: int) -> None:
        self._line = "a" * answer  # a token a byte

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[list[Any], list[Turn]]:
        return [[0] for _ in prompts], [Turn()] * len(prompts)

    def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
        for episode in episodes:
            episode[0] += 1
        return [Turn(text=self._line, reward=1.0, terminated=episode[0] == TURNS) for episode in episodes]

    def close(self, episodes: Sequence[Any]) -> None:
        """It holds nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory() as folder:
        save(shape, Path(folder))
        engine = TorchEngine(folder, RolloutConfig(slots=64), torch.device("cpu"))
        engine.ends = np.zeros(0, np.int64)  # every turn has its full length
        codec = TextCodec(engine.tokenizer)
        runs: dict[str, Callable[[], None]] = {
            "one conversation": lambda: converse(engine, codec, shape),
            "one long turn": lambda: one_turn(engine, shape),
            "a request a turn": lambda: turn_by_turn(engine, shape),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                if repeat:  # the first round only warms up
                    seconds[name].append(time.perf_counter() - started)
    report(arguments.shape, shape, {name: statistics.median(values) for name, values in seconds.items()})


def save(shape: Shape, folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tiny_models.WORDS,
        n_positions=shape.prompt + shape.after_prompt + 8,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=max(2, shape.width // 64),
        bos_token_id=256,
        eos_token_id=256,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_models.byte_tokenizer().save_pretrained(folder)


def requests(shape: Shape, length: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(sample_id=row, group_id=row, prompt=rng.integers(0, 256, length).astype(np.int32))
        for row in range(shape.rows)
    ]


def converse(engine: TorchEngine, codec: TextCodec, shape: Shape) -> None:
    served = ServedEnvironment(CheckedEnvironment(Talker(shape.answer), "talker"), lambda line: line)
    talk = Conversations(served, codec, max_turns=TURNS, timeout_s=60)
    asked = requests(shape, shape.prompt)
    talk.begin({one.sample_id: Opening(prompt="", metadata={}, seed=0) for one in asked})
    done = engine.generate(asked, SamplingConfig(max_new_tokens=shape.turn), seed=0, partner=talk)
    talk.close()
    assert sum(len(one.turn_starts) for one in done) == TURNS * shape.rows


def one_turn(engine: TorchEngine, shape: Shape) -> None:
    engine.generate(requests(shape, shape.prompt), SamplingConfig(max_new_tokens=shape.after_prompt), seed=0)


def turn_by_turn(engine: TorchEngine, shape: Shape) -> None:
    for turn in range(TURNS):
        history = shape.prompt + turn * (shape.turn + shape.answer)
        engine.generate(requests(shape, history), SamplingConfig(max_new_tokens=shape.turn), seed=turn)


def report(name: str, shape: Shape, seconds: dict[str, float]) -> None:
    print(f"float32 {flops(torch.float32):.0f} GFLOP/s, {torch.get_num_threads()} thread(s)")
    print(f"{name}: {shape.rows} x ({shape.prompt} + {TURNS} turns of {shape.turn}, answers of {shape.answer} tokens)")
    tokens = shape.rows * shape.after_prompt
    for way, taken in seconds.items():
        ratio = seconds["one long turn"] / taken
        print(f"{way:20} {taken:7.3f} s  {tokens / taken:9.0f} tokens/s  {ratio:5.2f} of one long turn")


def flops(dtype: torch.dtype) -> float:
    """Speed of a matrix product of 1024 rows, in GFLOP/s."""
    left, right = (torch.randn(1024, 1024, dtype=dtype) for _ in range(2))
    left @ right
    started = time.perf_counter()
    for _ in range(5):
        left @ right
    return 5 * 2 * 1024**3 / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    main()
