"""The manager's beginning: it chooses as the demonstrations do, which end with a control token before each reply.

Left out: options that were on offer when a demonstration was made; all count as offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.manager.cloning import MOST, clone_head, demonstrated
from actors.manager.option_head import save_head
from actors.models.causal_lm import context_of
from actors.models.option_names import option_token
from actors.models.option_tokens import option_ids
from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer
from pipeline.encoding.prompt_stream import permutation
from pipeline.tasks.task import Task, demonstrations_of


def check_options_shown(task: Task, options: Sequence[str]) -> None:
    """Raises ValueError unless each option's control token ends the prompt of some demonstration."""
    prompts = [demonstration.prompt for demonstration in demonstrations_of(task, "train")]
    for name in options:
        token = option_token(name)
        if not any(prompt.endswith(token) for prompt in prompts):
            raise ValueError(
                f"manager.start: must be uniform where an option is never shown, got demonstrations, and of task "
                f'{task.name!r} no prompt ends with {token}; set manager.start = "uniform", or let the task show it'
            )


def imitate_options(model: str, task: Task, options: Sequence[str]) -> None:
    """Write the head of a manager that imitates the task's demonstrations into the folder of a model.

    model: a folder in the run, whose tokenizer knows the control tokens. At most MOST demonstrations are used, spread
    over all of them. Raises ValueError when an option is not among them.
    """
    shown = [
        one.prompt for one in demonstrations_of(task, "train") if one.prompt.endswith(tuple(map(option_token, options)))
    ]
    chosen = [shown[place] for place in sorted(permutation(0, 0, len(shown))[:MOST])]
    tokenizer, longest = load_tokenizer(model), context_of(model)
    ids = [row for row in TextCodec(tokenizer).encode_prompts(chosen) if 1 < len(row) <= longest]
    numbers = demonstrated(ids, option_ids(tokenizer, options))
    head = clone_head(model, [row[:-1] for row in ids], numbers.tolist(), len(options))
    save_head(Path(model), head)
