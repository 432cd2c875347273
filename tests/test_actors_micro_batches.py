"""Which rows meet in which minibatch and micro-batch, and the tensors cut from them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors import ragged
from actors.learner.micro_batches import Batch, deal, in_row_order, minibatches
from learner_helpers import actions_of, make_experience, replace, rollouts_of

CPU = torch.device("cpu")


@given(st.integers(1, 50), st.integers(1, 3), st.data())
def test_every_row_is_in_exactly_one_minibatch_of_every_epoch(rows: int, epochs: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, rows))
    plan = minibatches(rows, epochs=epochs, minibatches=parts, seed=3, step=5)
    assert len(plan) == epochs
    for epoch in plan:
        assert sorted(np.concatenate(epoch)) == list(range(rows))
        assert len(epoch) == parts
        assert max(map(len, epoch)) - min(map(len, epoch)) <= 1


def test_the_permutation_depends_on_seed_step_and_epoch() -> None:
    def first(seed: int = 0, step: int = 0, epoch: int = 0) -> list[int]:
        return minibatches(32, epochs=epoch + 1, minibatches=1, seed=seed, step=step)[epoch][0].tolist()

    assert first() == first()
    assert len({tuple(first()), tuple(first(seed=1)), tuple(first(step=1)), tuple(first(epoch=1))}) == 4


def test_an_epoch_is_the_same_however_many_follow_it() -> None:
    short, long = (minibatches(20, epochs=n, minibatches=3, seed=1, step=2) for n in (1, 4))
    assert [m.tolist() for m in short[0]] == [m.tolist() for m in long[0]]


def test_more_minibatches_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"minibatches: must be .* <= the 3 rows of the step, got 4"):
        minibatches(3, epochs=1, minibatches=4, seed=0, step=0)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 9))
def test_deal_gives_every_row_once_and_every_rank_as_many_micro_batches(
    lengths: list[int], ranks: int, size: int
) -> None:
    rows = np.arange(len(lengths))
    shares = deal(rows, np.asarray(lengths), ranks=ranks, micro_batch_size=size)
    assert len({len(share) for share in shares}) == 1, "unequal counts hang ZeRO 2 and 3"
    assert sorted(np.concatenate([m for share in shares for m in share])) == list(rows)
    assert all(len(m) <= size for share in shares for m in share)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=60), st.integers(2, 4))
def test_deal_balances_tokens_to_within_the_longest_row(lengths: list[int], ranks: int) -> None:
    shares = deal(np.arange(len(lengths)), np.asarray(lengths), ranks=ranks, micro_batch_size=8)
    tokens = [sum(lengths[row] for m in share for row in m) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_deal_in_snake_order() -> None:
    shares = deal(np.asarray([4, 0, 2, 1, 3]), np.asarray([50, 40, 30, 20, 10]), ranks=2, micro_batch_size=2)
    assert [[m.tolist() for m in share] for share in shares] == [[[0, 3], [4]], [[1], [2]]]


def test_ranks_without_rows_get_empty_micro_batches() -> None:
    shares = deal(np.asarray([7]), np.full(8, 5), ranks=3, micro_batch_size=4)
    assert [[m.tolist() for m in share] for share in shares] == [[[7]], [[]], [[]]]


def golden() -> pa.Table:
    """Row 0: prompt 11 12, answer 13 14. Row 1: prompt 21, answer 22, an observed 23, answer 24 25."""
    table = make_experience(2)
    columns = {
        "tokens": [[11, 12, 13, 14], [21, 22, 23, 24, 25]],
        "action_mask": [[False, False, True, True], [False, True, False, True, True]],
        "advantages": [[0, 0, 1.5, 2.5], [0, 3.5, 0, 4.5, 5.5]],
        **{
            name: [[0.0] * 4, [0.0] * 5]
            for name in ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "returns")
        },
    }
    for name, values in columns.items():
        table = replace(table, name, values)
    return table


def test_a_micro_batch_by_hand() -> None:
    batch, chosen = Batch(golden(), CPU), np.asarray([1, 0])
    inputs, actions = batch.inputs(chosen), actions_of(batch, chosen)
    assert inputs.input_ids.tolist() == [[21, 22, 23, 24], [11, 12, 13, 14]], (
        "the longest row's last token is never a state"
    )
    assert inputs.targets.tolist() == [22, 24, 25, 13, 14]
    assert inputs.states.tolist() == [0, 2, 3, 5, 6]
    assert actions.row.tolist() == [0, 0, 0, 1, 1]
    assert actions.rows == 2
    assert actions.advantages.tolist() == [3.5, 4.5, 5.5, 1.5, 2.5]


def test_aligned_puts_numbers_back_where_their_tokens_are() -> None:
    batch = Batch(golden(), CPU)
    micro = [np.asarray([1]), np.asarray([0])]
    parts = [batch.aligned(rows, actions_of(batch, rows).advantages) for rows in micro]
    rows, column = in_row_order(micro, parts)
    assert rows.tolist() == [0, 1]
    assert column.to_pylist() == [[0, 0, 1.5, 2.5], [0, 3.5, 0, 4.5, 5.5]]


def test_any_cut_and_order_restores_every_column() -> None:
    table = make_experience(13, seed=4)
    batch = Batch(table, CPU)
    for ranks, size in ((1, 1), (1, 13), (2, 3), (3, 4)):
        micro = [m for share in deal(np.arange(13), batch.lengths, ranks=ranks, micro_batch_size=size) for m in share]
        rows, column = in_row_order(micro, [batch.aligned(m, actions_of(batch, m).returns) for m in micro])
        assert rows.tolist() == list(range(13))
        assert column.to_pylist() == table.column("returns").to_pylist()


def test_a_slice_of_a_table_is_read_as_it_stands() -> None:
    whole, part = make_experience(9), make_experience(9).slice(4, 3)
    a, b = Batch(whole, CPU), Batch(part, CPU)
    assert torch.equal(a.inputs(np.asarray([5, 6])).targets, b.inputs(np.asarray([1, 2])).targets)
    assert torch.equal(actions_of(a, np.asarray([5])).advantages, actions_of(b, np.asarray([1])).advantages)


def test_flat_columns_of_one_chunk_are_views() -> None:
    table = rollouts_of(make_experience(5))
    assert np.shares_memory(Batch(table, CPU).tokens, ragged.flat(table.column("tokens"))[0])


def test_a_row_that_begins_with_an_action_is_refused() -> None:
    with pytest.raises(AssertionError, match="first token has no state"):
        Batch(replace(golden(), "action_mask", [[True] * 4, [True] * 5]), CPU)
