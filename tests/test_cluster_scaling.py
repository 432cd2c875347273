"""How many workers are worth their nodes, on traces of steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.scaling import PATIENCE, StepLoad, wanted


def load(hunger: float, *, workers: int = 4, chunks: int = 16) -> StepLoad:
    return StepLoad(seconds=10, waited=10 * hunger, chunks=chunks, workers=workers)


@pytest.mark.parametrize(
    ("trace", "held", "expected", "why"),
    [
        ([], 2, 2, "nothing is known yet"),
        ([load(0.5)], 3, 7, "the learners wait: all that the recipe allows"),
        ([load(0.5, chunks=4)] * PATIENCE, 7, 3, "four chunks keep four workers busy, one of them in the core"),
        ([load(0.5, chunks=4)], 7, 7, "one may be chance"),
        ([load(0.5, chunks=1)] * PATIENCE, 2, 0, "one chunk needs one worker, which is in the core"),
        ([load(0.2)] * 20, 3, 3, "they wait a little: as it is"),
        ([load(0.05)] * (PATIENCE - 1), 3, 3, "one may be chance"),
        ([load(0.05)] * PATIENCE, 3, 2, "they hardly wait"),
        ([load(0.05)] * PATIENCE, 0, 0, "the core stays"),
        ([load(0.2), *[load(0.05)] * (PATIENCE - 1)], 3, 3, "not yet for long enough"),
        ([load(0.14, workers=2)] * PATIENCE, 1, 1, "with one fewer of two they would wait twice as long"),
        ([load(0.05)] * PATIENCE + [load(0.4)], 2, 7, "a change in the work is answered at once"),
        ([StepLoad(seconds=0, waited=0, chunks=4, workers=1)], 0, 0, "a step without a time says nothing"),
    ],
)
def test_the_number_of_workers_for_a_trace(trace: list[StepLoad], held: int, expected: int, why: str) -> None:
    assert wanted(trace, held=held, core=1, most=7) == expected, why


def test_a_long_learning_phase_does_not_make_the_pool_come_and_go() -> None:
    """Rollouts of 12 s of work in steps whose learning takes 100 s: it shrinks once, one by one, and stays there."""
    held, trace, changes = 7, list[StepLoad](), 0
    for _ in range(200):
        workers = held + 1
        waited = 12 / workers
        trace.append(StepLoad(seconds=100 + waited, waited=waited, chunks=16, workers=workers))
        now = wanted(trace, held=held, core=1, most=7)
        if now != held:
            changes, held, trace = changes + 1, now, []
    assert (held, changes) == (0, 7)


@given(
    st.lists(
        st.builds(
            lambda seconds, share, chunks, workers: StepLoad(
                seconds=seconds, waited=seconds * share, chunks=chunks, workers=workers
            ),
            st.floats(0, 1e4),
            st.floats(0, 1),
            st.integers(1, 64),
            st.integers(0, 8),
        ),
        max_size=12,
    ),
    st.integers(0, 7),
)
def test_it_stays_between_none_and_most(trace: list[StepLoad], held: int) -> None:
    assert 0 <= wanted(trace, held=held, core=1, most=7) <= 7
