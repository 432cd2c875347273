"""Exact measures of replies and conversations in the world: are they sentences, to the point, how near to the best.

    python -m pipeline.environments.world.measures RUN_DIR [--every 10]

prints the measures of a run's conversations while it trained, and the returns of its evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
class ConversationMeasures:
    """The measures of whole conversations.

    mean_return: their mean return. best_return: the highest mean return that their openings allow. replies: the mean
    number in a conversation. parsed, to_the_point: share of all replies, in [0, 1]. subtasks: share of each sub-task,
    of RUDE and of NO_SENTENCE among all replies.
    """

    conversations: int
    mean_return: float
    best_return: float
    replies: float
    parsed: float
    to_the_point: float
    subtasks: Mapping[str, float]

    @property
    def share(self) -> float:
        """The mean return as a share of the best possible one."""
        return self.mean_return / self.best_return


def measure_conversations(prompts: Sequence[str], turns: Sequence[Sequence[Mapping[str, Any]]]) -> ConversationMeasures:
    """Measure conversations by their prompts, and by what the environment said to each of their replies.

    turns: `metadata.conversation.turns` of each rollout. Raises ValueError if there is no conversation, or if a prompt
    does not end with a line of the partner.
    """
    if not turns:
        raise ValueError("conversations: must be at least one, got none")
    values, said = solve_flat().values, [turn["info"] for own in turns for turn in own]
    best = [values[read_scene(prompt).state] for prompt, _ in zip(prompts, turns, strict=True)]
    used = Counter(info["subtask"] for info in said)
    return ConversationMeasures(
        conversations=len(turns),
        mean_return=sum(turn["reward"] for own in turns for turn in own) / len(turns),
        best_return=sum(best) / len(turns),
        replies=len(said) / len(turns),
        parsed=sum(info["parsed"] for info in said) / len(said),
        to_the_point=sum(info["to_the_point"] for info in said) / len(said),
        subtasks={name: used[name] / len(said) for name in (*SUBTASKS, RUDE, NO_SENTENCE)},
    )


def measure_table(path: Path, tokenizer: Path) -> ConversationMeasures:
    """Measure the conversations of a step: a Parquet file of its rollouts or experience.

    tokenizer: the `tokenizer.json` of the model. Raises ValueError as `measure_conversations` does.
    """
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    rows = pq.read_table(path, columns=["tokens", "turn_starts", "metadata"]).to_pylist()
    codec = Tokenizer.from_file(str(tokenizer))
    return measure_conversations(
        [codec.decode(row["tokens"][: row["turn_starts"][0]], skip_special_tokens=False) for row in rows],
        [json.loads(row["metadata"])["conversation"]["turns"] for row in rows],
    )


def shares_of_evaluation(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(mean return, share of the best possible one) of the policy and of the baseline, by an `evaluation.json`.

    The prompts must be openings. Replies without a reward are left out.
    """
    openings = [layout([reply["prompt"]]) for reply in record["replies"]]
    found = {}
    for who, rewards in next(iter(record["rewards"].values())).items():
        pairs = [
            (opening, value)
            for opening, own in zip(openings, rewards, strict=True)
            for value in own
            if value is not None
        ]
        returns = [value for _, value in pairs]
        found[who] = (sum(returns) / len(returns), share_of_best([opening for opening, _ in pairs], returns))
    return found


def main() -> None:
    """Print the measures of a run; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--every", type=int, default=10, help="steps from one line to the next; the last has one, too")
    arguments = parser.parse_args()
    for line in _lines(arguments.run_dir, arguments.every):
        sys.stdout.write(f"{line}\n")


def _lines(run_dir: Path, every: int) -> Iterator[str]:
    kinds = (*SUBTASKS, RUDE, NO_SENTENCE)
    yield f"{'':10}{'return':>8}{'of best':>9}{'replies':>9}{'parsed':>8}{'to point':>10}" + "".join(
        f"{name:>{len(name) + 2}}" for name in kinds
    )
    steps = {int(path.parent.name[5:]): path for path in (run_dir / "experience").glob("step=*/experience.parquet")}
    for step in sorted(steps):
        if step % every == 0 or step == max(steps):
            found = measure_table(steps[step], _tokenizer(run_dir))
            yield (
                f"{f'step {step}':10}{found.mean_return:8.3f}{found.share:9.1%}{found.replies:9.2f}{found.parsed:8.1%}"
                f"{found.to_the_point:10.1%}" + "".join(f"{found.subtasks[name]:{len(name) + 2}.0%}" for name in kinds)
            )
    if (run_dir / "evaluation.json").exists():
        evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
        for who, (mean, share) in shares_of_evaluation(evaluation).items():
            yield f"{who:10}{mean:8.3f}{share:9.1%}"


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
    main()
