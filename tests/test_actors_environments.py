"""Conversations of a rollout worker with an environment: tokens, failures, deadlines, ends, and who is closed when."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import tiny_models
from actors import ragged, weights
from actors.config import EnvironmentConfig, ReferenceConfig, RewardConfig, RolloutConfig, SamplingConfig
from actors.experience import Prompts, Rollouts, Scores
from actors.models.causal_lm import load_causal_lm
from actors.models.text import TextCodec
from actors.reference import ReferenceWorker
from actors.reward.worker import RewardWorker
from actors.rollout.worker import RolloutWorker
from actors.weights import Weights
from cluster.faults import ContractError
from pipeline.environments.checks import CheckedEnvironment
from pipeline.environments.environment import Turn
from pipeline.environments.served import ServedEnvironment
from pipeline.tasks.task import PromptText

CONTEXT = 96
SAMPLING = SamplingConfig(max_new_tokens=6, stop=("e",))
TEXTS = ("Once upon", "x", "a rather longer prompt", "To be", "1 + 1 =")


@dataclass
class Source:
    """Weights already at hand."""

    held: Weights

    @property
    def version(self) -> int:
        return self.held.version

    @property
    def checksum(self) -> str:
        return self.held.checksum

    @property
    def manager(self) -> None:
        return None

    def fetch(self) -> Weights:
        return self.held


class Scripted:
    """An environment whose every answer is a function of what it heard; it notes what is begun and what is closed.

    A conversation has one to four turns, as its row says; a turn's reward is the length of the reply.
    """

    def __init__(self, spoil: Callable[[int, int], Turn | None] = lambda row, turn: None, opening: str = "") -> None:
        """spoil: (number of the prompt's row, number of the turn) to the turn that is said instead."""
        self.spoil, self.opening = spoil, opening
        self.begun: list[object] = []
        self.closed: Counter[int] = Counter()

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> tuple[list[Any], list[Turn]]:
        episodes = [
            {"row": prompt.metadata["row"], "turns": 0, "length": 1 + prompt.metadata["row"] % 4, "seed": seed}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        self.begun += episodes
        return episodes, [self.spoil(e["row"], -1) or Turn(text=self.opening) for e in episodes]

    def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
        return [self._turn(episode, reply) for episode, reply in zip(episodes, replies, strict=True)]

    def _turn(self, episode: Any, reply: str) -> Turn:
        number, episode["turns"] = episode["turns"], episode["turns"] + 1
        return self.spoil(episode["row"], number) or Turn(
            text=f"{reply[::-1]}<{number}>",
            reward=float(len(reply)),
            terminated=episode["turns"] >= episode["length"],
            info={"number": number},
        )

    def close(self, episodes: Sequence[Any]) -> None:
        self.closed.update(id(episode) for episode in episodes)


def lay_out(line: str) -> str:
    return f"[{line}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_gpt2(tmp_path_factory.mktemp("policy"), context=CONTEXT)


def worker(folder: Path, environment: Any, *, slots: int = 8, **talk: Any) -> RolloutWorker:
    served = ServedEnvironment(CheckedEnvironment(environment, "scripted"), lay_out)
    return RolloutWorker(
        path=str(folder),
        config=RolloutConfig(slots=slots),
        sampling=SAMPLING,
        seed=11,
        talk=EnvironmentConfig(name="scripted", **talk),
        environment=lambda: served,
    )


def source(folder: Path) -> Source:
    model = load_causal_lm(str(folder), torch.float32)
    return Source(weights.pack(list(model.named_parameters()), "float32", 7))


def prompts(rows: Sequence[int] = range(len(TEXTS))) -> pa.Table:
    codec = TextCodec(tiny_models.byte_tokenizer())
    return Prompts.of(
        {
            "group_id": list(rows),
            "tokens": codec.encode_prompts([TEXTS[row % len(TEXTS)] for row in rows]),
            "metadata": [json.dumps({"row": row}) for row in rows],
        }
    ).table


def had(folder: Path, environment: Any, group_size: int = 2, **settings: Any) -> list[dict[str, Any]]:
    table = worker(folder, environment, **settings).generate(prompts(), group_size, 0, 0, source(folder))[1]
    return list(Rollouts(table).table.to_pylist())


def said(row: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(row["metadata"])["conversation"])


def test_what_is_trained_is_what_was_said_and_nothing_is_encoded_again(folder: Path) -> None:
    environment = Scripted()
    codec = TextCodec(tiny_models.byte_tokenizer())
    table = worker(folder, environment).generate(prompts(), 3, 0, 0, source(folder))[1]
    rows = Rollouts(table).table.to_pylist()
    assert {len(row["turn_starts"]) for row in rows} == {1, 2, 3, 4}
    for row in rows:
        record, tokens, acted = said(row), np.array(row["tokens"]), np.array(row["action_mask"])
        prompt = codec.encode_prompts([TEXTS[json.loads(row["metadata"])["row"]]])[0]
        assert row["tokens"][: len(prompt)] == prompt
        assert row["turn_starts"][0] == len(prompt)
        assert not acted[: len(prompt)].any()
        assert record["end"] == "terminated"
        assert len(record["turns"]) == len(row["turn_starts"])
        for number, (begin, after) in enumerate(
            zip(row["turn_starts"], [*row["turn_starts"][1:], len(tokens)], strict=True)
        ):
            reply = tokens[begin:after][acted[begin:after]]
            [text] = codec.decode_replies([reply])
            turn = record["turns"][number]
            assert turn["line"] == f"{text[::-1]}<{number}>"
            assert turn["reward"] == len(text)
            line = tokens[begin:after][~acted[begin:after]]  # after the reply, in one piece
            assert acted[begin : begin + len(reply)].all()
            expected = codec.encode_continuations([lay_out(turn["line"])])[0] if after < len(tokens) else []
            assert line.tolist() == expected
    # one pass over the whole conversation gives the log-probs that were recorded turn by turn
    reference = ReferenceWorker(path=str(folder), config=ReferenceConfig(), temperature=1.0)
    again = reference.logprobs(table, 0, 0)[1]
    acted = ragged.flat(table["action_mask"])[0]
    before, after = (ragged.flat(one["logprobs"])[0][acted] for one in (table, again))
    np.testing.assert_allclose(before, after, atol=2e-5)


def test_chunks_workers_and_slots_change_no_bit(folder: Path) -> None:
    whole = worker(folder, Scripted(), max_turns=3).generate(prompts(), 2, 0, 0, source(folder))[1]
    for slots, cuts in ((16, [[0, 1], [2, 3, 4]]), (8, [[4], [3], [2], [1], [0]])):
        other = worker(folder, Scripted(), slots=slots, max_turns=3)
        parts = [other.generate(prompts(rows), 2, 0, 0, source(folder))[1] for rows in cuts]
        joined = pa.concat_tables(parts).sort_by("sample_id").combine_chunks()
        assert joined.equals(whole.sort_by("sample_id").combine_chunks())


def test_samples_of_a_prompt_begin_in_the_same_state(folder: Path) -> None:
    environment = Scripted(opening="Hello.")
    rows = had(folder, environment, group_size=3)
    seeds: dict[int, set[int]] = {}
    for episode in environment.begun:
        seeds.setdefault(episode["row"], set()).add(episode["seed"])  # type: ignore[index]
    assert all(len(own) == 1 for own in seeds.values())
    assert len(set.union(*seeds.values())) == len(TEXTS)
    codec = TextCodec(tiny_models.byte_tokenizer())
    opening = codec.encode_continuations([lay_out("Hello.")])[0]
    assert all(row["tokens"][row["turn_starts"][0] - len(opening) : row["turn_starts"][0]] == opening for row in rows)


def test_openings_that_differ_within_a_group_end_the_run_by_a_line_that_says_so(folder: Path) -> None:
    random = Random(0)
    with pytest.raises(ContractError, match="must have the same opening line"):
        had(folder, Scripted(lambda row, turn: Turn(text=str(random.random())) if turn < 0 else None))


def test_turns_have_a_limit_and_a_broken_off_conversation_ends_before_the_reply_that_would_follow(
    folder: Path,
) -> None:
    environment = Scripted(lambda row, turn: Turn(text="cut", truncated=True) if (row, turn) == (1, 0) else None)
    rows = had(folder, environment, max_turns=2)
    ends = Counter(said(row)["end"] for row in rows)
    assert ends["max_turns"] and ends["terminated"] and ends["truncated"] == 2
    codec = TextCodec(tiny_models.byte_tokenizer())
    for row in rows:
        record = said(row)
        assert len(row["turn_starts"]) == len(record["turns"]) <= 2
        if record["end"] in ("max_turns", "truncated"):
            line = codec.encode_continuations([lay_out(record["turns"][-1]["line"])])[0]
            assert row["tokens"][-len(line) - 1 :] == [*line, 256]
            assert not any(row["action_mask"][-len(line) - 1 :])
        else:
            assert row["action_mask"][-1]


def test_without_room_the_last_reply_keeps_its_reward(folder: Path) -> None:
    rows = had(folder, Scripted(lambda row, turn: Turn(text="long " * 30, reward=2.5) if turn >= 0 else None))
    for row in rows:
        assert said(row) == {
            "opening": "",
            "turns": [{"reward": 2.5, "line": "long " * 30, "info": {}}],
            "end": "no_room",
            "failure": "",
        }
        stopped = row["tokens"][-1] in (256, ord("e"))
        assert (row["finish"], row["action_mask"][-1]) == ("stop" if stopped else "length", True)


def test_a_failure_is_of_its_conversation_alone(folder: Path) -> None:
    healthy = had(folder, Scripted())
    environment = Scripted(lambda row, turn: Turn(failure="error: server gone") if (row, turn) == (3, 0) else None)
    rows = had(folder, environment)
    for row, other in zip(rows, healthy, strict=True):
        if row["sample_id"] // 2 == 3:
            assert (row["finish"], said(row)["end"], said(row)["failure"]) == ("error", "failed", "error: server gone")
        else:
            assert row == other
    scorer = RewardWorker(config=RewardConfig(), tokenizer_path=str(folder), conversations=True)
    table = pa.Table.from_pylist(rows, schema=Rollouts.schema)
    report, scores = scorer.score(table, 0, 0)
    assert report.failures == dict.fromkeys((6, 7), "error: environment: server gone")
    ok = Scores(scores).table.filter(pc.equal(scores["status"], "ok"))
    assert len(ok) == 8


def test_what_failed_once_is_had_again_to_the_same_bits(folder: Path) -> None:
    failed: set[int] = set()

    def once(row: int, turn: int) -> Turn | None:
        if row in (2, 4) and turn == (0 if row == 2 else -1) and len([r for r in failed if r // 10 == row]) < 2:
            failed.add(row * 10 + len([r for r in failed if r // 10 == row]))
            return Turn(failure="error: try again")
        return None

    assert had(folder, Scripted(once)) == had(folder, Scripted())
    assert len(failed) == 4


def test_an_exception_fails_the_conversations_of_that_call_and_a_broken_contract_ends_the_run(folder: Path) -> None:
    class Raises(Scripted):
        def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
            raise ConnectionError("no route")

    environment = Raises()
    for row in had(folder, environment):
        assert said(row)["failure"].startswith("error: ConnectionError: no route")
    assert environment.closed == {id(episode): 1 for episode in environment.begun}

    class Short(Scripted):
        def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
            return []

    broken = Short()
    with pytest.raises(ContractError, match="step must return a list of"):
        had(folder, broken)
    assert broken.closed == {id(episode): 1 for episode in broken.begun}


def test_a_slow_partner_blocks_nobody_and_one_that_is_silent_has_failed(folder: Path) -> None:
    release = threading.Event()

    class Slow(Scripted):
        def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
            if any(episode["row"] == 1 for episode in episodes):
                release.wait(300)
            return super().step(episodes, replies)

    environment = Slow()
    rows = had(folder, environment, timeout_s=2)
    healthy = had(folder, Scripted())
    for row, other in zip(rows, healthy, strict=True):
        if row["sample_id"] // 2 == 1:
            assert said(row)["failure"] == "timeout: no answer within 2 s"
        else:
            assert row == other
    assert not any(environment.closed[id(e)] for e in environment.begun if e["row"] == 1), "it is still busy"  # type: ignore[index]
    release.set()
    for _ in range(6000):
        if len(environment.closed) == len(environment.begun):
            break
        threading.Event().wait(0.01)
    assert environment.closed == {id(episode): 1 for episode in environment.begun}


@pytest.mark.parametrize("slots", [8, 16])
def test_who_fails_does_not_depend_on_who_shared_its_call(folder: Path, slots: int) -> None:
    class Raises(Scripted):
        def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> list[Turn]:
            if any(episode["row"] == 1 for episode in episodes):
                raise ConnectionError("no route")
            return super().step(episodes, replies)

    environment = Raises()
    healthy = had(folder, Scripted())
    for row, other in zip(had(folder, environment, slots=slots), healthy, strict=True):
        if row["sample_id"] // 2 == 1:
            assert said(row)["failure"].startswith("error: ConnectionError: no route")
        else:
            assert row == other


def test_an_opening_line_without_room_fails_its_conversation_alone(folder: Path) -> None:
    environment = Scripted(lambda row, turn: Turn(text="x" * 200) if (row, turn) == (2, -1) else None)
    for row in had(folder, environment):
        assert (row["finish"] == "error") == (row["sample_id"] // 2 == 2)
        if row["finish"] == "error":
            assert said(row)["failure"] == "error: there is no room for its opening line in the model's context"


def test_a_failure_is_told_in_the_environments_own_words(folder: Path) -> None:
    for told, status, detail in (
        ("server gone", "error", "environment: server gone"),
        ("HTTP 503: overloaded", "error", "environment: HTTP 503: overloaded"),
        ("ok: not at all", "error", "environment: ok: not at all"),
        ("timeout: 3 s", "timeout", "environment: 3 s"),
    ):
        environment = Scripted(lambda row, turn, told=told: Turn(failure=told) if turn == 0 else None)  # type: ignore[misc]
        table = worker(folder, environment).generate(prompts([0]), 1, 0, 0, source(folder))[1]
        scorer = RewardWorker(config=RewardConfig(), tokenizer_path=str(folder), conversations=True)
        [score] = scorer.score(table, 0, 0)[1].to_pylist()
        assert (score["status"], score["detail"]) == (status, detail)


def test_a_conversation_that_cannot_be_closed_leaves_the_others_to_be_closed(folder: Path) -> None:
    class Stuck(Scripted):
        def close(self, episodes: Sequence[Any]) -> None:
            super().close(episodes)
            if episodes[0]["row"] == 1:
                raise OSError("busy")

    environment = Stuck()
    had(folder, environment)
    assert environment.closed == dict.fromkeys((id(episode) for episode in environment.begun), 1)


def test_every_conversation_is_closed_once_however_it_ends(folder: Path) -> None:
    for settings in ({}, {"max_turns": 1}, {"max_turns": 2, "slots": 16}):
        environment = Scripted(lambda row, turn: Turn(failure="error: x") if (row, turn) == (0, 1) else None)
        had(folder, environment, **settings)
        assert environment.closed == {id(episode): 1 for episode in environment.begun}
    broken = load_causal_lm(str(folder), torch.float32)
    for parameter in broken.parameters():
        parameter.data.fill_(float("nan"))
    environment = Scripted()
    ill = Source(weights.pack(list(broken.named_parameters()), "float32", 8))
    with pytest.raises(FloatingPointError):
        worker(folder, environment).generate(prompts(), 2, 0, 0, ill)
    assert environment.closed == {id(episode): 1 for episode in environment.begun}


def test_rewards_of_turns_and_of_the_whole_are_added_at_the_last_turn(folder: Path) -> None:
    table = worker(folder, Scripted()).generate(prompts(), 2, 0, 0, source(folder))[1]
    rows = table.to_pylist()
    alone = RewardWorker(config=RewardConfig(), tokenizer_path=str(folder), conversations=True).score(table, 0, 0)[1]
    both = RewardWorker(
        config=RewardConfig(function=f"{__name__}:sees_all"), tokenizer_path=str(folder), conversations=True
    ).score(table, 0, 0)[1]
    for row, a, b in zip(rows, alone.to_pylist(), both.to_pylist(), strict=True):
        rewards = [turn["reward"] for turn in said(row)["turns"]]
        assert a["turn_rewards"] == rewards
        assert a["reward"] == sum(rewards)
        assert b["turn_rewards"] == [*rewards[:-1], rewards[-1] + len(rewards) / 4]
        assert b["reward"] == sum(rewards) + len(rewards) / 4


def sees_all(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A quarter for each turn; the prompt must be the conversation up to the last reply."""
    for prompt, own in zip(prompts, metadata, strict=True):
        lines = [lay_out(turn["line"]) for turn in own["conversation"]["turns"][:-1]]
        assert all(line in prompt for line in lines)
        assert prompt.startswith(TEXTS[own["row"]])
    return [len(own["conversation"]["turns"]) / 4 for own in metadata]


def test_metadata_that_says_conversation_already_is_refused(folder: Path) -> None:
    table = prompts().set_column(2, "metadata", pa.array([json.dumps({"row": 0, "conversation": 1})] * 5))
    with pytest.raises(ContractError, match="must have no entry 'conversation'"):
        worker(folder, Scripted()).generate(table, 1, 0, 0, source(folder))
