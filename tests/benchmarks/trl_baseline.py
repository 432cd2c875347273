"""TRL's GRPOTrainer and RLOOTrainer on the walks: the same model, reward, batch and budget as ours, in this process.

A step is `prompts` x `group` completions and `epochs` updates on them, as it is with us; neither side has a KL penalty.
Everything else is TRL's default unless `settings` say otherwise, but for bfloat16 and gradient checkpointing, which
only slow so small a model down.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALL = 'pip install -c constraints.txt -e ".[bench]"'


def is_installed() -> bool:
    """Whether TRL can be imported."""
    return find_spec("trl") is not None


def train(
    trainer: str, model: str, export_to: Path, *, seed: int, steps: int, batch: dict[str, int], settings: dict[str, Any]
) -> tuple[list[float], float]:
    """Train with `trl.<trainer>Trainer` and save the model.

    Mean reward of each step's completions, (steps,), and the seconds of all steps.

    batch: as in a recipe. settings: fields of `trl.<trainer>Config`; num_iterations, the updates of a step, is one of
    them.
    """
    import datasets
    import transformers
    import trl

    from pipeline.tasks.walks import RandomWalks, optimality

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")
    means: list[float] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        rewards = optimality(prompts, completions, [{}] * len(prompts))
        means.append(sum(rewards) / len(rewards))
        return rewards

    reward.__name__ = "optimality"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
    asked = datasets.Dataset.from_list([{"prompt": prompt.text} for prompt in RandomWalks().prompts("train")])
    with tempfile.TemporaryDirectory() as scratch:
        config = getattr(trl, f"{trainer}Config")(
            output_dir=scratch,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch["prompts"] * batch["group_size"],
            gradient_accumulation_steps=1,
            num_generations=batch["group_size"],
            max_steps=steps * settings["num_iterations"],
            max_completion_length=9,
            temperature=1.0,
            beta=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trained = getattr(trl, f"{trainer}Trainer")(
            model=model, args=config, train_dataset=asked, processing_class=tokenizer, reward_funcs=reward
        )
        trained.remove_callback(transformers.PrinterCallback)
        started = time.monotonic()
        trained.train()
    seconds = time.monotonic() - started
    trained.save_model(str(export_to))
    tokenizer.save_pretrained(export_to)
    return means, seconds
