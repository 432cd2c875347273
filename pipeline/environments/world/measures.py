"""Exact measures of replies and conversations in the world: are they sentences, to the point, how near to the best.

    python -m pipeline.environments.world.measures RUN_DIR [--every 10]

prints the measures of a run's conversations while it trained, and the returns of its evaluation.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.environments.run_measures import (
    ConversationMeasures,
    Turns,
    evaluated_returns,
    in_common,
    print_measures,
    read_turns,
    share_of_replies,
)
from pipeline.environments.world.layout import deed_of, layout, read_scene
from pipeline.environments.world.rules import DEEDS, NO_SENTENCE, RUDE, SUBTASKS, expected_gain
from pipeline.environments.world.solve import solve_flat


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyMeasures:
    """The measures of many replies, each to its own prompt.

    replies: their number. parsed: share that are sentences, in [0, 1]. to_the_point: share that name the partner's
    topic, in [0, 1]. gain: mean expected gain in the value of the mood, one reply ahead. best_gain: the highest mean
    gain that these prompts allow. subtasks: share of each sub-task, of RUDE and of NO_SENTENCE.
    """

    replies: int
    parsed: float
    to_the_point: float
    gain: float
    best_gain: float
    subtasks: Mapping[str, float]


def measure_replies(prompts: Sequence[str], replies: Sequence[str]) -> ReplyMeasures:
    """Measure these replies to these prompts.

    Raises ValueError if there is no reply, or if a prompt does not end with a line of the partner.
    """
    if not replies:
        raise ValueError("replies: must be at least one, got none")
    scenes = [read_scene(prompt) for prompt in prompts]
    deeds = [deed_of(reply, scene.noun) for scene, reply in zip(scenes, replies, strict=True)]
    count = len(deeds)
    return ReplyMeasures(
        replies=count,
        parsed=sum(deed.subtask != NO_SENTENCE for deed in deeds) / count,
        to_the_point=sum(deed.to_the_point for deed in deeds) / count,
        gain=sum(expected_gain(scene.state, deed) for scene, deed in zip(scenes, deeds, strict=True)) / count,
        best_gain=sum(max(expected_gain(scene.state, deed) for deed in DEEDS) for scene in scenes) / count,
        subtasks={name: number / count for name, number in Counter(deed.subtask for deed in deeds).most_common()},
    )


def share_of_best(prompts: Sequence[str], returns: Sequence[float]) -> float:
    """The mean return of conversations from these prompts, divided by the best possible mean return.

    Raises ValueError if there is no conversation.
    """
    if not returns:
        raise ValueError("returns: must be at least one, got none")
    values = solve_flat().values
    best = [values[read_scene(prompt).state] for prompt in prompts]
    return sum(returns) / sum(value for value, _ in zip(best, returns, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldMeasures(ConversationMeasures):
    """The measures of whole conversations; their best return is the highest that their openings allow.

    to_the_point: share of all replies, in [0, 1]. subtasks: share of each sub-task, of RUDE and of NO_SENTENCE among
    all replies.
    """

    to_the_point: float
    subtasks: Mapping[str, float]

    def own_cells(self) -> dict[str, str]:
        """The columns of this world alone."""
        return {"to point": f"{self.to_the_point:.1%}"} | {name: f"{used:.0%}" for name, used in self.subtasks.items()}


def measure_conversations(prompts: Sequence[str], turns: Sequence[Turns]) -> WorldMeasures:
    """Measure conversations by their prompts, and by what the environment said to each of their replies.

    Raises ValueError if there is no conversation, or if a prompt does not end with a line of the partner.
    """
    values = solve_flat().values
    best = [values[read_scene(prompt).state] for prompt, _ in zip(prompts, turns, strict=True)]
    common = in_common(turns, sum(best) / max(len(turns), 1))
    used = Counter(turn["info"]["subtask"] for own in turns for turn in own)
    return WorldMeasures(
        **common,
        to_the_point=share_of_replies(turns, "to_the_point"),
        subtasks={name: used[name] / used.total() for name in (*SUBTASKS, RUDE, NO_SENTENCE)},
    )


def measure_table(path: Path, tokenizer: Path) -> WorldMeasures:
    """Measure the conversations of a step: a Parquet file of its rollouts or experience.

    tokenizer: the `tokenizer.json` of the model. Raises ValueError as `measure_conversations` does.
    """
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    rows = pq.read_table(path, columns=["tokens", "turn_starts", "metadata"], partitioning=None).to_pylist()
    codec = Tokenizer.from_file(str(tokenizer))
    return measure_conversations(
        [codec.decode(row["tokens"][: row["turn_starts"][0]], skip_special_tokens=False) for row in rows],
        read_turns(rows),
    )


def shares_of_evaluation(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(mean return, share of the best possible one) of the policy and of the baseline, by an `evaluation.json`.

    The prompts must be openings.
    """
    openings = [layout([reply["prompt"]]) for reply in record["replies"]]
    found = {}
    for who, rewards in evaluated_returns(record).items():
        pairs = [(opening, value) for opening, own in zip(openings, rewards, strict=True) for value in own]
        returns = [value for _, value in pairs]
        found[who] = (sum(returns) / len(returns), share_of_best([opening for opening, _ in pairs], returns))
    return found


def _tokenizer(run_dir: Path) -> Path:
    """The tokenizer of a run's models. Raises ValueError if no folder that may hold it does."""
    config = run_dir / "config.toml"
    given = tomllib.loads(config.read_text(encoding="utf-8"))["model"]["path"] if config.exists() else ""
    places = [run_dir / "policy", run_dir / "finetuned", *([Path(given)] if given else [])]
    for place in places:
        if (place / "tokenizer.json").exists():
            return place / "tokenizer.json"
    raise ValueError(f"run_dir: must have a model with a tokenizer.json, got none in {', '.join(map(str, places))}")


if __name__ == "__main__":
    print_measures(__doc__, lambda run_dir, path: measure_table(path, _tokenizer(run_dir)), shares_of_evaluation)
