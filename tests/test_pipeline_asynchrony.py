"""Asynchrony in logical time: whoever is fast, slow or lost, a step takes the same samples of the same version."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.work import Work
from driver_setup import Letters
from pipeline.algorithms.ppo import PPO
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig
from pipeline.encoding.prompt_stream import PromptStream
from pipeline.samples.buffer import Buffer
from pipeline.samples.collector import Collector
from pipeline.samples.ledger import Ledger, LedgerState
from pipeline.samples.published import PublishedWeights, Versions
from pipeline.tasks.task import PromptText
from random_inputs import random_inputs

STEPS = 6
FAILED = 7  # every so many samples has no reward
FLAT = 5  # every so many groups has no variance


def length_of(sample: int) -> int:
    """Tokens of a sample, which are also how long it takes: a few are fifty times as long as the others."""
    return 100 if sample % 13 == 0 else 2


@dataclass
class Call:
    """A piece of work that a worker does."""

    work: Work
    attempt: int = 0

    def answer(self) -> tuple[Any, ...]:
        return tuple(self.work.send(WORKER, self.attempt))

    @property
    def tokens(self) -> int:
        return sum(map(length_of, self.answer()[0].sample_ids))


def method(function: Callable[..., tuple[Any, ...]]) -> Any:
    """A function, called as a method of a Ray actor is."""
    return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=function))


def generate(
    prompts: Any, group_size: int, chunk: int, attempt: int, weights: Any, without: Collection[int], pause_after: int
) -> tuple[Any, ...]:
    groups = prompts["group_id"].to_pylist()
    ids = [group * group_size + k for group in groups for k in range(group_size)]
    return go_on([(sample, ()) for sample in ids], chunk, attempt, weights, without, pause_after)


def go_on(
    begun: Any, chunk: int, attempt: int, weights: Any, without: Collection[int], pause_after: int
) -> tuple[Any, ...]:
    """Rollouts are (sample, version of each token)."""
    rows = []
    for sample, versions in begun:
        more = length_of(sample) - len(versions)
        rows.append((sample, versions + (weights.version,) * min(more, pause_after or more)))
    report = SimpleNamespace(
        version=weights.version,
        action_tokens=sum(len(versions) for _, versions in rows) - sum(len(versions) for _, versions in begun),
        seconds=0.0,
        paused=sum(len(versions) < length_of(sample) for sample, versions in rows),
        sample_ids=[sample for sample, _ in rows],
    )
    return report, rows


def score(rollouts: Any, chunk: int, attempt: int, without: Collection[int], within_s: float) -> tuple[Any, ...]:
    ids = [sample for sample, _ in rollouts]
    report = SimpleNamespace(
        failures={sample: "error: told to fail" for sample in ids if sample % FAILED == 3},
        flat_groups=[group for group in sorted({sample // 2 for sample in ids}) if group % FLAT == 2],
        batches_split=0,
        sample_ids=ids,
    )
    return report, "scores"


WORKER = SimpleNamespace(generate=method(generate), go_on=method(go_on), score=method(score))


class Pool:
    """What a collector needs of a pool. A test decides which call is answered next, or lost."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def submit(self, work: Work, *, first: bool = False) -> None:
        self.calls.append(Call(work))

    def answer(self, call: Call) -> None:
        self.calls.remove(call)
        report, *data = call.answer()
        call.work.on_done(report, tuple(data), call.attempt)

    def lose_worker(self, call: Call) -> None:
        call.attempt += 1
        assert call.work.on_retry is not None or call.work.phase.startswith("scoring")
        if call.work.on_retry is not None:
            call.work.on_retry()

    def lose_input(self, call: Call) -> None:
        if call.work.on_input_lost is not None:
            self.calls.remove(call)
            call.work.on_input_lost()


def published(version: int) -> PublishedWeights:
    nothing: Any = (None,)
    return PublishedWeights(version=version, checksum=str(version), holder=nothing, timeout_s=1)


def config_of(staleness: int, steps: int = STEPS, *, freshest: bool = False) -> RunConfig:
    config = RunConfig(
        task="walks",
        steps=steps,
        schedule="freshest" if freshest else "logical",
        max_staleness=staleness,
        batch=BatchConfig(prompts=6, group_size=2, dynamic_sampling=True),
        algorithm=PPO(),
    )
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"chunk_size": 4, "segment_tokens": 30}),
            "reward": config.reward.model_copy(update={"max_failed": 1.0}),
        }
    )


@cache
def prompts() -> PromptStream:
    letters: Any = Letters()
    texts = [PromptText(text=letter * 2, metadata={}) for letter in "abcdefgh"]
    return PromptStream(texts, letters, seed=0, max_prompt_tokens=4, context=64, max_new_tokens=4)


@dataclass
class Simulated:
    """A run of the samples' part of the driver: real collector, buffer and ledger, and no process at all."""

    config: RunConfig
    taken: list[tuple[tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)
    versions_of: dict[int, tuple[int, ...]] = field(default_factory=dict)  # sample -> of each token

    def begin(self, state: LedgerState, versions: Versions) -> None:
        self.rollout, self.reward = Pool(), Pool()
        self.versions = versions
        self.ledger = Ledger.of(2, state)
        self.buffer = Buffer(self.ledger, self.config.batch.samples, self.config.max_staleness)
        pools: Any = (self.rollout, self.reward)
        self.collector = Collector(self.config, prompts(), *pools, self.buffer, lambda kind, text: None)
        self.collector.reissue(versions)

    def run(self, next_call: Callable[[list[tuple[Pool, Call]]], Any], first: int, last: int) -> None:
        """Steps first to last - 1. next_call: answers or loses one of the open calls; False: lets the driver go on."""
        for step in range(first, last):
            if isinstance(next_call, Adversary) and next_call.random.random() < 0.3:
                self.collector.renew()  # a node that may hold samples is about to leave
            self.collector.keep_generating(step, self.versions)
            while not self.buffer.is_ready(step):
                assert self._open, f"step {step} waits for nothing"
                next_call(self._open)
            batch = self.buffer.take(step, self.versions.newest.version)
            assert len(batch.sample_ids) == self.config.batch.samples
            rollouts = {sample: versions for part in batch.rollouts for sample, versions in part}
            found = {version for sample in batch.sample_ids for version in rollouts[sample]}
            oldest = max(0, step - self.config.max_staleness)
            assert found == {oldest} if self.config.repeats else found <= set(range(oldest, step + 1))
            self.versions_of |= {sample: rollouts[sample] for sample in batch.sample_ids}
            self.taken.append((batch.sample_ids, batch.rollouts))
            self._while_learning(next_call)
            self.buffer.close(batch, trained=len(batch.sample_ids))
            self._while_learning(next_call)
            keep = self.config.max_staleness if self.config.repeats else 0
            self.versions = self.versions.with_next(published(step + 1), keep)
            account = self.ledger.check()
            assert account.in_flight == sum(c.samples for c in self.ledger.open.values() if c.step > step)

    def _while_learning(self, next_call: Callable[[list[tuple[Pool, Call]]], Any]) -> None:
        while self._open and next_call(self._open) is not False:
            pass

    @property
    def _open(self) -> list[tuple[Pool, Call]]:
        return [(pool, call) for pool in (self.rollout, self.reward) for call in pool.calls]


def in_order(calls: list[tuple[Pool, Call]]) -> bool:
    """Every call is answered when the driver waits for it, the oldest first."""
    pool, call = calls[0]
    pool.answer(call)
    return False


@cache
def quiet(staleness: int, steps: int = STEPS) -> Simulated:
    run = Simulated(config_of(staleness, steps))
    run.begin(LedgerState(), Versions(published(0)))
    run.run(in_order, 0, steps)
    return run


class Adversary:
    """Answers, loses and waits at random, in one of several moods."""

    def __init__(self, seed: int, mood: str) -> None:
        self.random, self.mood = random.Random(seed), mood
        self.losses = 0

    def __call__(self, calls: list[tuple[Pool, Call]]) -> bool | None:
        pool, call = self._choose(calls)
        if self.losses < 20 and self.random.random() < 0.2:
            self.losses += 1
            (pool.lose_worker if self.random.random() < 0.7 else pool.lose_input)(call)
        else:
            pool.answer(call)
        return None if self.random.random() < 0.7 else False

    def _choose(self, calls: list[tuple[Pool, Call]]) -> tuple[Pool, Call]:
        if self.mood == "newest first":
            return calls[-1]
        if self.mood == "shortest first":
            return min(calls, key=lambda one: one[1].tokens)
        if self.mood == "rewards late":
            return calls[0]
        return self.random.choice(calls)


MOODS = ("any", "newest first", "shortest first", "rewards late")


@random_inputs(200)
@given(st.integers(0, 3), st.integers(0, 2**32), st.sampled_from(MOODS), st.sets(st.integers(1, STEPS - 1)))
def test_no_timing_and_no_loss_changes_what_a_step_takes(
    staleness: int, seed: int, mood: str, breaks: set[int]
) -> None:
    """Workers answer in any order, are lost, lose what they hold; the driver is killed after some steps and goes on.
    Never does a sample change its step or its version, is lost or trained twice, however long it takes.
    """
    calm, run, adversary = quiet(staleness), Simulated(config_of(staleness)), Adversary(seed, mood)
    config = run.config
    run.config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"max_attempts": 100})}  # the adversary is very unkind
    )
    state, versions = LedgerState(), Versions(published(0))
    for first, last in segments(breaks):
        run.begin(state, versions)
        run.run(adversary, first, last)
        state = LedgerState.model_validate_json(run.ledger.state().model_dump_json())
        versions = Versions(published(last), [published(one.version) for one in run.versions.older])
    assert run.taken == calm.taken
    trained = [sample for ids, _ in run.taken for sample in ids]
    assert len(trained) == len(set(trained)) == STEPS * config.batch.samples
    issued_for_these_steps = run.ledger.watermark
    left_out = run.ledger.account().filtered + run.ledger.account().quarantined
    assert len(trained) + left_out == issued_for_these_steps + later_refills(run)
    assert {sample: len(versions) for sample, versions in run.versions_of.items()} == {
        sample: length_of(sample) for sample in trained
    }


@random_inputs(100)
@given(st.integers(1, 3), st.integers(0, 2**32), st.sampled_from(MOODS), st.sets(st.integers(1, STEPS - 1)))
def test_the_newest_weights_at_once_and_still_no_token_too_old_and_no_sample_lost(
    staleness: int, seed: int, mood: str, breaks: set[int]
) -> None:
    """Schedule `freshest`: the bound holds for each token, whenever its reply was begun, paused, lost or begun anew."""
    run, adversary = Simulated(config_of(staleness, freshest=True)), Adversary(seed, mood)
    config = run.config
    run.config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_attempts": 100})})
    state, versions = LedgerState(), Versions(published(0))
    for first, last in segments(breaks):
        run.begin(state, versions)
        run.run(adversary, first, last)
        state = LedgerState.model_validate_json(run.ledger.state().model_dump_json())
        assert run.versions.older == (), "a commit needs none of them"
        versions = Versions(published(last))
    trained = [sample for ids, _ in run.taken for sample in ids]
    assert len(trained) == len(set(trained)) == STEPS * config.batch.samples
    assert trained == [sample for ids, _ in quiet(staleness).taken for sample in ids], "in order, the same prompts"
    assert all(len(versions) == length_of(sample) for sample, versions in run.versions_of.items())
    assert all(list(versions) == sorted(versions) for versions in run.versions_of.values())


def test_a_long_reply_is_gone_on_with_by_the_weights_of_its_time() -> None:
    """Sample 0 of the first step after the start has 100 tokens, 30 in a segment; a version comes after the first."""
    run = Simulated(config_of(1, freshest=True))
    run.begin(LedgerState(), Versions(published(0)))
    run.collector.keep_generating(0, run.versions)
    [call] = [call for call in run.rollout.calls if 0 in call.answer()[0].sample_ids]
    run.rollout.answer(call)
    run.collector.versions = run.versions.with_next(published(1), 0)
    [call] = [call for call in run.rollout.calls if call.work.send(WORKER, 0)[0].sample_ids[0] == 0]
    assert dict(call.answer()[1])[0] == (0,) * 30 + (1,) * 30


def segments(breaks: set[int]) -> Iterator[tuple[int, int]]:
    edges = [0, *sorted(breaks), STEPS]
    yield from pairwise(edges)


def later_refills(run: Simulated) -> int:
    """Samples of the trained steps that were issued after those of later steps, because they replaced others."""
    open_samples = {s for c in run.ledger.open.values() for s in range(c.first_sample, c.first_sample + c.samples)}
    issued = run.ledger.next_group * 2
    return sum(sample not in open_samples for sample in range(run.ledger.watermark, issued))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_long_samples_are_trained_as_often_as_they_are_issued(staleness: int) -> None:
    """The shortest answer first, always: nothing may favour them."""
    run = Simulated(config_of(staleness))
    run.begin(LedgerState(), Versions(published(0)))
    run.run(Adversary(0, "shortest first"), 0, STEPS)
    kept = [s for s in range(run.ledger.watermark) if s % FAILED != 3 and (s // 2) % FLAT != 2]
    kept = [s for s in kept if all(member % FAILED != 3 for member in (s - s % 2, s - s % 2 + 1))]
    assert set(kept) <= run.versions_of.keys()
    assert 100 in map(len, run.versions_of.values())


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_run_that_is_extended_is_the_longer_run(staleness: int) -> None:
    """N steps and N more are 2N: the groups of the steps that come after are issued, and wait."""
    half = Simulated(config_of(staleness, STEPS // 2))
    half.begin(LedgerState(), Versions(published(0)))
    half.run(in_order, 0, STEPS // 2)
    assert {chunk.step for chunk in half.ledger.open.values()} == set(range(STEPS // 2, STEPS // 2 + staleness))
    rest = Simulated(config_of(staleness), taken=half.taken)
    rest.begin(half.ledger.state(), half.versions)
    rest.run(in_order, STEPS // 2, STEPS)
    assert rest.taken == quiet(staleness).taken


def test_samples_that_are_made_again_leave_late_answers_and_losses_of_the_first_attempt_without_effect() -> None:
    """A node is about to leave: what waits is made again. Then the call that was scoring it tells that its input is
    lost, at once, and once more when the step is over.
    """
    run = Simulated(config_of(1))
    run.begin(LedgerState(), Versions(published(0)))
    run.collector.keep_generating(0, run.versions)
    for call in list(run.rollout.calls):
        run.rollout.answer(call)
    late = list(run.reward.calls)
    run.collector.renew()
    assert run.ledger.check().reissued == 24, "every sample that had been generated"
    run.reward.lose_input(late[0])
    assert run.ledger.check().reissued == 24, "it is made again already"
    run.reward.calls = [call for call in run.reward.calls if call not in late]
    run.run(in_order, 0, STEPS)
    assert run.taken == quiet(1).taken
    for call in late[1:]:
        assert call.work.on_input_lost is not None
        call.work.on_input_lost()
    assert run.taken == quiet(1).taken and run.ledger.check().balances


def test_without_staleness_nothing_is_ahead() -> None:
    run = quiet(0)
    assert run.ledger.open == {}
    assert run.versions.older == ()


def test_with_staleness_the_pools_are_so_many_steps_ahead_and_no_more() -> None:
    run = Simulated(config_of(2))
    run.begin(LedgerState(), Versions(published(0)))
    run.collector.keep_generating(0, run.versions)
    assert {(chunk.step, chunk.version) for chunk in run.ledger.open.values()} == {(0, 0), (1, 0), (2, 0)}
    run = quiet(2)
    assert [one.version for one in run.versions.older] == [STEPS - 2, STEPS - 1]
    assert {(chunk.step, chunk.version) for chunk in run.ledger.open.values()} == {
        (STEPS, STEPS - 2),
        (STEPS + 1, STEPS - 1),
    }
    assert np.mean([len(ids) for ids, _ in run.taken]) == 12
