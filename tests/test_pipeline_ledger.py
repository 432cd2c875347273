"""The ledger and the buffer: every sample ends once, and the account balances at every moment."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.samples.buffer import Buffer
from pipeline.samples.chunk import LOST_A_MEMBER, NO_VARIANCE, State
from pipeline.samples.ledger import Ledger, LedgerState
from random_inputs import random_inputs


def through(ledger: Ledger, number: int, failed: dict[int, str] | None = None) -> None:
    ledger.generated(number)
    ledger.scored(number, failed or {})


def test_sample_ids_are_dense_and_deterministic() -> None:
    ledger = Ledger(group_size=4)
    first, second = ledger.issue(2, step=0, version=0), ledger.issue(3, step=0, version=0)
    assert (first.first_sample, first.samples) == (0, 8)
    assert (second.first_group, second.first_sample, second.samples) == (2, 8, 12)
    assert second.trainable() == list(range(8, 20))


def test_the_account_of_a_step() -> None:
    ledger = Ledger(group_size=2)
    chunk = ledger.issue(3, step=0, version=0)
    assert ledger.check().in_flight == 6
    through(ledger, chunk.number, {3: "error: division by zero"})
    assert chunk.trainable() == [0, 1, 4, 5]
    ledger.close([chunk.number], trained=4)
    account = ledger.check()
    assert (account.issued, account.trained, account.filtered, account.quarantined, account.in_flight) == (
        6,
        4,
        1,
        1,
        0,
    )
    assert ledger.quarantined == {3: "error: division by zero"}


def test_groups_left_out_are_accounted_for_by_reason() -> None:
    """Groups of 2: 0 is flat, 1 lost a member, 2 is flat and lost a member, 3 is good. What a commit keeps says the
    same.
    """
    ledger = Ledger(group_size=2)
    chunk = ledger.issue(4, step=0, version=0)
    ledger.generated(chunk.number)
    ledger.scored(chunk.number, {2: "error: a", 4: "error: b"}, flat=(0, 2))
    assert chunk.trainable() == [6, 7]
    ledger.close([chunk.number], trained=2)
    account = ledger.check()
    assert (account.issued, account.trained, account.filtered, account.quarantined, account.in_flight) == (
        8,
        2,
        4,
        2,
        0,
    )
    assert ledger.filtered == {"lost a member": 2, "no variance": 2}
    assert Ledger.of(2, LedgerState.model_validate_json(ledger.state().model_dump_json())).state() == ledger.state()


def test_a_flat_group_of_another_chunk_is_noticed() -> None:
    ledger = Ledger(group_size=2)
    chunk = ledger.issue(2, step=0, version=0)
    ledger.generated(chunk.number)
    with pytest.raises(AssertionError, match="chunk 0 does not hold all groups of"):
        ledger.scored(chunk.number, {}, flat=(2,))


def test_a_chunk_of_which_nothing_is_left_ends_with_the_step_and_is_shown_to_nobody() -> None:
    ledger = Ledger(group_size=2)
    buffer = Buffer(ledger, samples=2, max_staleness=0)
    for flat in ((0,), (), (2,)):
        chunk = ledger.issue(1, step=0, version=0)
        buffer.put_rollouts(chunk.number, f"rollouts {chunk.number}")  # type: ignore[arg-type]
        buffer.put_scores(chunk.number, f"scores {chunk.number}")  # type: ignore[arg-type]
        ledger.generated(chunk.number)
        ledger.scored(chunk.number, {}, flat)
    batch = buffer.take(step=0, version=0)
    assert (batch.chunks, batch.emptied, batch.rollouts, batch.sample_ids) == ((1,), (0, 2), ("rollouts 1",), (2, 3))


def test_training_a_sample_less_or_twice_is_noticed() -> None:
    ledger = Ledger(group_size=1)
    chunk = ledger.issue(4, step=0, version=0)
    through(ledger, chunk.number)
    with pytest.raises(AssertionError, match="trained 5 samples, the ledger gave it 4"):
        ledger.close([chunk.number], trained=5)


def test_a_closed_chunk_cannot_be_closed_again() -> None:
    ledger = Ledger(group_size=1)
    chunk = ledger.issue(4, step=0, version=0)
    through(ledger, chunk.number)
    ledger.close([chunk.number], trained=4)
    with pytest.raises(KeyError):
        ledger.close([chunk.number], trained=4)


def test_a_reissued_chunk_keeps_its_samples_and_fences_the_old_attempt() -> None:
    ledger = Ledger(group_size=2)
    chunk = ledger.issue(2, step=0, version=0)
    ledger.generated(chunk.number)
    again = ledger.reissue(chunk.number)
    assert (again.first_sample, again.samples, again.attempt, again.state) == (0, 4, 1, State.ISSUED)
    assert not ledger.fence(chunk.number, 0)
    assert ledger.fence(chunk.number, 1)
    assert ledger.check().reissued == 4


def test_the_watermark_is_the_first_sample_that_has_not_ended() -> None:
    ledger = Ledger(group_size=1)
    a, b = ledger.issue(3, step=0, version=0), ledger.issue(3, step=0, version=0)
    through(ledger, b.number)
    ledger.close([b.number], trained=3)
    assert ledger.watermark == 0
    through(ledger, a.number)
    ledger.close([a.number], trained=3)
    assert ledger.watermark == 6


def test_the_buffer_gives_a_step_in_sample_order_once_it_is_full() -> None:
    ledger = Ledger(group_size=1)
    buffer = Buffer(ledger, samples=4, max_staleness=0)
    a, b = ledger.issue(2, step=0, version=0), ledger.issue(2, step=0, version=0)
    for chunk in (b, a):
        buffer.put_rollouts(chunk.number, f"rollouts {chunk.number}")  # type: ignore[arg-type]
        assert not buffer.is_ready(0)
        through(ledger, chunk.number)
        buffer.put_scores(chunk.number, f"scores {chunk.number}")  # type: ignore[arg-type]
    batch = buffer.take(step=0, version=0)
    assert batch.sample_ids == (0, 1, 2, 3)
    assert batch.rollouts == ("rollouts 0", "rollouts 1")


def test_the_buffer_waits_for_a_refill_when_a_group_was_spoiled() -> None:
    ledger = Ledger(group_size=2)
    buffer = Buffer(ledger, samples=4, max_staleness=0)
    a = ledger.issue(2, step=0, version=0)
    buffer.put_rollouts(0, None)  # type: ignore[arg-type]
    buffer.put_scores(0, None)  # type: ignore[arg-type]
    through(ledger, a.number, {0: "timeout: 1 s"})
    assert not buffer.is_ready(0)
    b = ledger.issue(1, step=0, version=0)
    buffer.put_rollouts(1, None)  # type: ignore[arg-type]
    buffer.put_scores(1, None)  # type: ignore[arg-type]
    through(ledger, b.number)
    assert buffer.take(step=0, version=0).sample_ids == (2, 3, 4, 5)


@pytest.mark.parametrize("sampled_by", [2, 4])
def test_a_sample_of_another_version_than_its_step_has_is_refused(sampled_by: int) -> None:
    """Step 5 with max_staleness 2 is sampled by version 3: neither by an older one nor by a newer one."""
    ledger = Ledger(group_size=1)
    buffer = Buffer(ledger, samples=1, max_staleness=2)
    through(ledger, ledger.issue(1, step=5, version=sampled_by).number)
    with pytest.raises(AssertionError, match=rf"step 5: must be sampled by version 3, got \[{sampled_by}\]"):
        buffer.take(step=5, version=5)


def test_later_steps_wait_in_the_buffer_and_do_not_fill_an_earlier_one() -> None:
    ledger = Ledger(group_size=1)
    buffer = Buffer(ledger, samples=2, max_staleness=1)
    for step in (0, 1):
        chunk = ledger.issue(2, step=step, version=0)
        for put in (buffer.put_rollouts, buffer.put_scores):
            put(chunk.number, f"data {chunk.number}")  # type: ignore[operator]
    through(ledger, 1)
    assert buffer.is_ready(1)
    assert not buffer.is_ready(0), "step 1 is there first, and waits for its turn"
    through(ledger, 0)
    first = buffer.take(step=0, version=0)
    buffer.close(first, trained=2)
    second = buffer.take(step=1, version=1)
    assert (first.sample_ids, first.staleness, second.sample_ids, second.staleness) == ((0, 1), 0, (2, 3), 1)


class LedgerMachine(RuleBasedStateMachine):
    """Random histories of issue, generate, fail, re-issue, close: the account balances after every single one."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(group_size=3)
        self.ended: set[int] = set()
        self.filtered = {LOST_A_MEMBER: 0, NO_VARIANCE: 0}

    def in_state(self, state: State) -> list[int]:
        return [c.number for c in self.ledger.open.values() if c.state is state]

    @rule(groups=st.integers(1, 4))
    def issue(self, groups: int) -> None:
        self.ledger.issue(groups, step=0, version=0)

    @precondition(lambda self: self.in_state(State.ISSUED))
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        self.ledger.generated(data.draw(st.sampled_from(self.in_state(State.ISSUED))))

    @precondition(lambda self: self.in_state(State.GENERATED))
    @rule(data=st.data())
    def score(self, data: st.DataObject) -> None:
        chunk = self.ledger.open[data.draw(st.sampled_from(self.in_state(State.GENERATED)))]
        failed = data.draw(st.sets(st.integers(chunk.first_sample, chunk.first_sample + chunk.samples - 1)))
        flat = data.draw(st.sets(st.integers(chunk.first_group, chunk.first_group + chunk.groups - 1)))
        self.ledger.scored(chunk.number, dict.fromkeys(failed, "error"), flat)

    @precondition(lambda self: self.ledger.open)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.ledger.reissue(data.draw(st.sampled_from(sorted(self.ledger.open))))

    @precondition(lambda self: self.in_state(State.SCORED))
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        numbers = data.draw(st.sets(st.sampled_from(self.in_state(State.SCORED)), min_size=1))
        samples = [s for n in sorted(numbers) for s in self.ledger.open[n].trainable()]
        assert not self.ended & set(samples), "a sample was trained twice"
        self.ended |= set(samples)
        for chunk in (self.ledger.open[n] for n in numbers):
            for group in range(chunk.first_group, chunk.first_group + chunk.groups):
                members = set(range(3 * group, 3 * group + 3))
                lost = members & set(chunk.quarantined)
                if lost or group in chunk.flat:
                    self.filtered[LOST_A_MEMBER if lost else NO_VARIANCE] += len(members - lost)
        self.ledger.close(sorted(numbers), trained=len(samples))

    @rule()
    def break_off_and_go_on(self) -> None:
        """The run ends here and another process takes the account up; it has been through JSON."""
        before = self.ledger.account()
        state = LedgerState.model_validate_json(self.ledger.state().model_dump_json())
        in_flight = {number: chunk.attempt for number, chunk in self.ledger.open.items()}
        self.ledger = Ledger.of(3, state)
        assert {number: chunk.attempt - 1 for number, chunk in self.ledger.open.items()} == in_flight, (
            "the next attempt, so that late answers are fenced"
        )
        assert {chunk.version for chunk in self.ledger.open.values()} <= {0}
        after = self.ledger.account()
        assert after == replace(before, reissued=before.reissued + before.in_flight)

    @invariant()
    def balances(self) -> None:
        assert {reason: count for reason, count in self.filtered.items() if count} == self.ledger.filtered
        account = self.ledger.check()
        assert account.trained == len(self.ended)
        assert self.ledger.watermark <= account.issued


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(random_inputs(60), stateful_step_count=30)
