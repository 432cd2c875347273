"""The rollout worker: a chunk in, a table of rollouts and a report of scalars out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import tiny_models
from actors import ragged, weights
from actors.config import RolloutConfig, SamplingConfig
from actors.experience import Prompts, Rollouts
from actors.models.causal_lm import load_causal_lm
from actors.rollout.worker import RolloutReport, RolloutWorker
from actors.weights import Weights

SAMPLING = SamplingConfig(max_new_tokens=8, stop=("e", "a"))
TEXTS = ("Once upon", "x", "a rather longer prompt than the others", "To be", "1 + 1 =")


@dataclass
class Source:
    """Weights already at hand, and how often they were asked for."""

    held: Weights
    fetched: list[int] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.held.version

    @property
    def checksum(self) -> str:
        return self.held.checksum

    def fetch(self) -> Weights:
        self.fetched.append(self.held.version)
        return self.held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_gpt2(tmp_path_factory.mktemp("policy"))


def worker(folder: Path, *, untie_head: bool = False) -> RolloutWorker:
    return RolloutWorker(
        path=str(folder), config=RolloutConfig(slots=8), sampling=SAMPLING, seed=11, untie_head=untie_head
    )


def source(folder: Path, version: int, scale: float = 1.0, *, untie_head: bool = False) -> Source:
    model = load_causal_lm(str(folder), torch.float32, untie_head=untie_head)
    return Source(weights.pack([(name, p * scale) for name, p in model.named_parameters()], "float32", version))


def prompts(first: int = 0) -> pa.Table:
    tokenizer = tiny_models.byte_tokenizer()
    rows = [np.array(tokenizer.encode(text), np.int32) for text in TEXTS]
    return Prompts.of(
        {
            "group_id": np.arange(first, first + len(rows)),
            "tokens": rows,
            "metadata": [f'{{"row": {i}}}' for i in range(len(rows))],
        }
    ).table


def test_columns_hold_prompt_and_completion_as_the_schema_says(folder: Path) -> None:
    report, table = worker(folder).generate(prompts(first=20), 3, chunk=4, attempt=2, weights=source(folder, 7))
    rows = Rollouts(table).table.to_pylist()
    asked = prompts(first=20).to_pylist()
    assert [r["sample_id"] for r in rows] == list(range(60, 75))
    for i, row in enumerate(rows):
        prompt = asked[i // 3]["tokens"]
        length, start = len(row["tokens"]), len(prompt)
        assert row["group_id"] == 20 + i // 3
        assert row["tokens"][:start] == prompt
        assert row["turn_starts"] == [start]
        assert row["action_mask"] == [False] * start + [True] * (length - start)
        assert row["logprobs"][:start] == [0.0] * start
        assert all(value < 0 for value in row["logprobs"][start:])
        assert row["versions"] == [-1] * start + [7] * (length - start)
        assert (row["option"], row["option_logprobs"]) == ([], [])
        assert row["metadata"] == asked[i // 3]["metadata"]
        assert row["finish"] == "stop" or length - start == 8
    assert {r["finish"] for r in rows} == {"stop", "length"}
    lengths = [len(r["tokens"]) for r in rows]
    assert (report.chunk, report.attempt, report.version, report.samples) == (4, 2, 7, 15)
    assert report.lengths.tolist() == lengths
    assert report.prompt_tokens == 3 * sum(len(a["tokens"]) for a in asked)
    assert report.prompt_tokens + report.action_tokens == sum(lengths)
    assert (report.stopped, report.truncated) == tuple([r["finish"] for r in rows].count(f) for f in ("stop", "length"))
    assert report.seconds > 0


def test_a_reissued_chunk_is_reproduced_by_another_worker_with_another_past(folder: Path) -> None:
    one, other, held = worker(folder), worker(folder), source(folder, 1)
    other.generate(prompts(first=99), 5, 0, 0, held)
    _, table = one.generate(prompts(), 4, 1, 0, held)
    _, again = other.generate(prompts(), 4, 1, 1, held)
    assert table.equals(again)


def test_a_part_of_a_chunk_gives_the_same_samples(folder: Path) -> None:
    one, held = worker(folder), source(folder, 1)
    _, table = one.generate(prompts(), 4, 1, 0, held)
    _, part = one.generate(prompts().slice(2, 2), 4, 1, 0, held)
    assert part.equals(table.slice(8, 8))


def test_samples_that_are_left_out_change_no_other(folder: Path) -> None:
    """Whole groups, some of a group, and all: a row that is not there stands for nothing."""
    one, held = worker(folder), source(folder, 1)
    whole = one.generate(prompts(first=20), 3, 0, 0, held)[1]
    for without in ({60, 61, 62}, {60, 64, 74}, set(range(60, 75)) - {70}):
        report, table = one.generate(prompts(first=20), 3, 0, 0, held, without=without)
        assert table.equals(whole.filter(pc.invert(pc.is_in(whole["sample_id"], pa.array(sorted(without))))))
        assert report.samples == len(report.lengths) == 15 - len(without)
    report, table = one.generate(prompts(first=20), 3, 0, 0, held, without=set(range(60, 75)))
    assert (report.samples, report.action_tokens, table.num_rows) == (0, 0, 0)
    assert Rollouts(table).table.schema == whole.schema


def test_weights_are_fetched_only_when_they_differ(folder: Path) -> None:
    one, first, second = worker(folder), source(folder, 0), source(folder, 1, scale=0.5)
    before, table = one.generate(prompts(), 1, 0, 0, first)
    one.generate(prompts(), 1, 1, 0, first)
    after, changed = one.generate(prompts(), 1, 2, 0, second)
    assert (first.fetched, second.fetched) == ([0], [1])
    assert (before.version, before.checksum) == (0, first.held.checksum)
    assert (after.version, after.checksum) == (1, second.held.checksum)
    assert not table.column("logprobs").equals(changed.column("logprobs"))
    back, same = one.generate(prompts(), 1, 3, 0, first)
    assert back.version == 0
    assert same.equals(table)


def test_the_same_version_with_other_weights_is_fetched_and_another_version_of_the_same_is_not(folder: Path) -> None:
    one, first = worker(folder), source(folder, 4)
    one.generate(prompts(), 1, 0, 0, first)
    after_rollback, renamed = source(folder, 4, scale=0.5), source(folder, 5, scale=0.5)
    report, table = one.generate(prompts(), 1, 1, 0, after_rollback)
    assert (report.version, report.checksum, after_rollback.fetched) == (4, after_rollback.checksum, [4])
    report, same = one.generate(prompts(), 1, 1, 0, renamed)
    assert (report.version, renamed.fetched) == (5, [])
    assert same.column("logprobs").equals(table.column("logprobs"))


def test_damaged_weights_are_refused_and_the_old_ones_stay(folder: Path) -> None:
    one, first, second = worker(folder), source(folder, 0), source(folder, 1, scale=0.5)
    _, table = one.generate(prompts(), 1, 0, 0, first)
    second.held.buckets[0][5] ^= 1
    with pytest.raises(ValueError, match="version 1 must have checksum"):
        one.generate(prompts(), 1, 1, 0, second)
    report, same = one.generate(prompts(), 1, 2, 0, first)
    assert (report.version, first.fetched) == (0, [0])
    assert same.equals(table)


def test_an_untied_head_is_loaded_on_its_own(folder: Path) -> None:
    held = source(folder, 3, untie_head=True)
    assert "lm_head.weight" in held.held.manifest.names
    _, untied = worker(folder, untie_head=True).generate(prompts(), 2, 0, 0, held)
    _, tied = worker(folder).generate(prompts(), 2, 0, 0, source(folder, 3))
    assert untied.equals(tied)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is unknown to the model"):
        worker(folder).generate(prompts(), 2, 0, 0, held)


def test_sample_takes_other_settings_and_leaves_training_rollouts_alone(folder: Path) -> None:
    one, held = worker(folder), source(folder, 0)
    greedy = one.sample(prompts(), 1, SamplingConfig(max_new_tokens=3, temperature=0), 5, held)
    assert (ragged.lengths(greedy.column("tokens")) - [len(t) for t in TEXTS]).max() == 3
    assert one.sample(prompts(), 1, SamplingConfig(max_new_tokens=3, temperature=0), 6, held).equals(greedy)
    assert not one.sample(prompts(), 1, SAMPLING, 12, held).equals(one.sample(prompts(), 1, SAMPLING, 13, held))
    assert one.generate(prompts(), 1, 0, 0, held)[1].equals(one.sample(prompts(), 1, SAMPLING, 11, held))


def test_a_prompt_that_fills_the_context_names_its_sample(folder: Path) -> None:
    table = Prompts.of({"group_id": [8], "tokens": [np.zeros(96, np.int32)], "metadata": ["{}"]}).table
    with pytest.raises(ValueError, match="got 96 tokens for sample 16"):
        worker(folder).generate(table, 2, 0, 0, source(folder, 0))


def test_the_kl_to_the_start_is_seen_and_nothing_else_changes(folder: Path) -> None:
    """0 while the weights are the start's; of other weights, what the start's log-probs say of the first rollouts.

    And the next chunk is what it would be.
    """
    one, other = worker(folder), worker(folder)
    same, moved = source(folder, 1), source(folder, 2, scale=1.05)
    rollouts = one.generate(prompts(), 2, 0, 1, same)[1]
    assert one.start_kl(rollouts).per_rollout == pytest.approx(0, abs=1e-4)
    rollouts = one.generate(prompts(), 2, 0, 1, moved)[1]
    found = one.start_kl(rollouts)
    model = load_causal_lm(str(folder), torch.float32)
    nats, tokens = 0.0, 0
    for row in rollouts.to_pylist():
        with torch.no_grad():
            start = torch.log_softmax(model(torch.tensor([row["tokens"]])).logits[0], -1)
        for t in np.flatnonzero(row["action_mask"]):
            nats += row["logprobs"][t] - float(start[t - 1, row["tokens"][t]])
            tokens += 1
    assert abs(nats) > 0.01
    assert (found.rollouts, found.per_rollout, found.per_token) == (
        len(rollouts),
        pytest.approx(nats / len(rollouts), rel=1e-4),
        pytest.approx(nats / tokens, rel=1e-4),
    )
    one._path = str(folder / "gone")
    gone = one.start_kl(rollouts)
    assert gone.rollouts == 0 and "gone" in gone.problem, "it is only shown, so it ends nothing"
    other.generate(prompts(), 2, 0, 1, same)
    assert one.generate(prompts(9), 2, 1, 1, moved)[1].equals(other.generate(prompts(9), 2, 1, 1, moved)[1])


def in_segments(one: RolloutWorker, sources: list[Source], tokens: int) -> tuple[pa.Table, list[RolloutReport]]:
    """A chunk whose replies are left after so many tokens and gone on with, each time by the next of these weights."""
    report, table = one.generate(prompts(first=20), 3, 4, 0, sources[0], pause_after=tokens)
    reports = [report]
    for held in sources[1:]:
        report, table = one.go_on(table, 4, 0, held, pause_after=tokens)
        reports.append(report)
    return table, reports


@pytest.mark.parametrize("tokens", [1, 3, 7, 8])
def test_a_reply_in_segments_is_the_reply_in_one_piece(folder: Path, tokens: int) -> None:
    """Also where a stop string ends one; the log-probs are those of a prefill, so they agree within rounding."""
    whole_report, whole = worker(folder).generate(prompts(first=20), 3, 4, 0, source(folder, 7))
    table, reports = in_segments(worker(folder), [source(folder, 7)] * -(-8 // tokens), tokens)
    assert [report.paused > 0 for report in reports] == [*[True] * (len(reports) - 1), False]
    assert sum(report.action_tokens for report in reports) == whole_report.action_tokens
    for name in ("sample_id", "group_id", "tokens", "action_mask", "versions", "turn_starts", "finish", "metadata"):
        assert table[name].to_pylist() == whole[name].to_pylist(), name
    ours, theirs = (ragged.flat(one["logprobs"])[0] for one in (table, whole))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_each_segment_is_sampled_by_its_own_weights_and_says_so(folder: Path) -> None:
    """Versions 3, 3, 5: the log-probs of a token are those of the version that it names, given all tokens before it."""
    sources = [source(folder, 3), source(folder, 3), source(folder, 5, scale=1.2)]
    table, reports = in_segments(worker(folder), sources, 3)
    assert reports[-1].paused == 0
    models = {version: load_causal_lm(str(folder), torch.float32) for version in (3, 5)}
    with torch.no_grad():
        for parameter in models[5].parameters():
            parameter.mul_(1.2)
    seen = set()
    for row in table.to_pylist():
        [start], tokens = row["turn_starts"], row["tokens"]
        assert row["versions"][start:] == [3] * min(6, len(tokens) - start) + [5] * max(0, len(tokens) - start - 6)
        for version, model in models.items():
            with torch.no_grad():
                found = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            for place in range(start, len(tokens)):
                if row["versions"][place] == version:
                    seen.add(version)
                    assert row["logprobs"][place] == pytest.approx(float(found[place - 1, tokens[place]]), abs=1e-4)
    assert seen == {3, 5}


def test_samples_that_are_left_out_are_not_gone_on_with(folder: Path) -> None:
    one, held = worker(folder), source(folder, 1)
    _, begun = one.generate(prompts(first=20), 3, 0, 0, held, pause_after=2)
    _, rest = one.go_on(begun, 0, 0, held, without={61, 70})
    assert rest["sample_id"].to_pylist() == [sample for sample in range(60, 75) if sample not in (61, 70)]
