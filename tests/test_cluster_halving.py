"""The search for the items that kill or hang whoever works on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.halving import Halving


def search(
    count: int, bad: set[int], group_of: Callable[[int], int] = lambda item: item
) -> tuple[dict[int, str], list[tuple[int, ...]]]:
    """What is found among the items 0, 1, ... of which these are bad, and the sets that failed on the way."""
    halving, failed, why = Halving(group_of), list[tuple[int, ...]](), None
    tries = halving.tries(range(count))
    while True:
        try:
            items = next(tries) if why is None else tries.send(why)
        except StopIteration:
            return halving.found, failed
        why = "killed" if bad & set(items) else ""
        if why:
            failed.append(items)


@given(
    st.integers(1, 40).flatmap(
        lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1), min_size=1, max_size=3))
    )
)
def test_all_that_is_to_blame_is_found_in_order_and_nothing_else(case: tuple[int, set[int]]) -> None:
    count, bad = case
    found, failed = search(count, bad)
    assert list(found) == sorted(bad)
    assert len(failed) <= len(bad) * (count.bit_length() + 2)


def test_one_of_64_costs_at_most_seven_workers() -> None:
    """Two on its own; of the larger sets each time the first half, if it is in that."""
    costs = [len(search(64, {bad})[1]) for bad in range(64)]
    assert (min(costs), max(costs)) == (2, 7)


def test_a_group_that_has_lost_a_member_is_not_looked_at_any_further() -> None:
    found, failed = search(16, {8, 9, 10, 11}, group_of=lambda item: item // 4)
    assert found == {8: "killed"}
    assert len(failed) <= 5


def test_a_failure_that_does_not_come_again_blames_nobody() -> None:
    assert search(8, set()) == ({}, [])
    halving = Halving(lambda item: item)
    tries = halving.tries([7])
    next(tries)
    assert tries.send("killed") == (7,), "once may be a coincidence"
    with pytest.raises(StopIteration):
        tries.send("")
    assert halving.found == {}
