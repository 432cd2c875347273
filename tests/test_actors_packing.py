"""Sequences that share a line: which do, where they lie, and that none sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny_models
from actors.learner.micro_batches import Batch, share_out
from actors.models.causal_lm import PolicyModel, load_causal_lm
from actors.models.packing import block_causal, check_packing, first_fit, side_by_side
from learner_helpers import make_experience, replace
from test_actors_model import save

CPU = torch.device("cpu")


def test_first_fit_by_hand() -> None:
    lengths = np.asarray([4, 8, 1, 4, 2, 1, 12])
    bins = first_fit(np.asarray([0, 1, 2, 3, 4, 5, 6]), lengths, 10)
    assert [b.tolist() for b in bins] == [[6], [1, 4], [0, 3, 2, 5]], (
        "the longest first, each where it first fits; 12 > 10 is alone"
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60), st.integers(1, 3), st.integers(1, 4))
def test_every_row_is_on_one_line_that_is_not_too_long(
    lengths: list[int], capacity: int, ranks: int, size: int
) -> None:
    sizes, rows = np.asarray(lengths), np.arange(len(lengths))[::-1]
    shares = share_out(rows, sizes, ranks=ranks, micro_batch_size=size, pack_tokens=capacity)
    assert len({len(share) for share in shares}) == 1, "unequal counts hang ZeRO 2 and 3"
    assert sorted(np.concatenate([micro.rows for share in shares for micro in share])) == sorted(rows)
    lines = []
    for micro in (micro for share in shares for micro in share if len(micro.rows)):
        assert micro.line is not None
        assert len(np.unique(micro.line)) <= size
        lines += [micro.rows[micro.line == line] for line in np.unique(micro.line)]
    assert all(sizes[line].sum() <= capacity or len(line) == 1 for line in lines)
    everywhere = share_out(rows, sizes, ranks=1, micro_batch_size=1, pack_tokens=capacity)[0]
    assert sorted(line.tolist() for line in lines) == sorted(micro.rows.tolist() for micro in everywhere), (
        "the lines do not depend on the ranks"
    )


def test_side_by_side_by_hand() -> None:
    grid = side_by_side(np.asarray([11, 12, 13, 21, 22, 31]), np.asarray([0, 3, 5, 6]), np.asarray([0, 1, 1]))
    assert grid.tokens.tolist() == [[11, 12, 13], [21, 22, 31]]
    assert grid.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert grid.segments.tolist() == [[0, 0, 0], [1, 1, 2]]
    assert grid.starts.tolist() == [0, 3, 5]
    short = side_by_side(np.asarray([11, 12, 13, 21]), np.asarray([0, 3, 4]), np.asarray([0, 1]))
    assert (short.tokens.tolist(), short.segments.tolist()) == ([[11, 12, 13], [21, 0, 0]], [[0, 0, 0], [1, -1, -1]])


def test_block_causal_by_hand() -> None:
    seen = block_causal(torch.tensor([[0, 0, 1, -1]])).int()
    assert seen.tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PolicyModel:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return PolicyModel(load_causal_lm(str(getattr(tiny_models, f"save_{request.param}")(folder)), torch.float32), 1.0)


@torch.no_grad()
def logprobs(model: PolicyModel, batch: Batch, rows: Any, line: Any = None) -> Tensor:
    return model(batch.inputs(np.asarray(rows), None if line is None else np.asarray(line)))[0]  # type: ignore[no-any-return]


def test_a_sequence_has_on_a_shared_line_the_log_probs_it_has_alone(model: PolicyModel) -> None:
    batch = Batch(make_experience(6), CPU)
    rows, line = [4, 0, 2, 5, 1, 3], [0, 0, 0, 1, 1, 2]
    assert batch.inputs(np.asarray(rows), np.asarray(line)).segments is not None
    want = torch.cat([logprobs(model, batch, [row]) for row in rows])
    assert float(want.std()) > 0.5, "log-probs that hardly differ would hide a wrong mask"
    torch.testing.assert_close(logprobs(model, batch, rows, line), want, atol=2e-5, rtol=0)


def test_a_change_in_one_sequence_does_not_reach_its_neighbours(model: PolicyModel) -> None:
    table = make_experience(3)
    tokens = table["tokens"].to_pylist()
    tokens[1] = [(token + 7) % 90 for token in tokens[1]]
    counts = [sum(mask) for mask in table["action_mask"].to_pylist()]
    before, after = (
        logprobs(model, Batch(t, CPU), [0, 1, 2], [0, 0, 0]).split(counts)
        for t in (table, replace(table, "tokens", tokens))
    )
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert float((before[1] - after[1]).abs().max()) > 0.1


def test_lines_of_one_sequence_are_what_they_were() -> None:
    """Packing that joins nothing takes the path without a mask, to the bit."""
    batch, rows = Batch(make_experience(4), CPU), np.asarray([3, 1, 0])
    padded, packed = batch.inputs(rows), batch.inputs(rows, np.asarray([0, 1, 2]))
    assert packed.segments is packed.position_ids is None
    assert torch.equal(padded.input_ids, packed.input_ids) and torch.equal(padded.states, packed.states)


def test_actions_are_in_the_order_of_targets_however_rows_are_laid() -> None:
    batch, rows = Batch(make_experience(4), CPU), np.asarray([3, 1, 0])
    packed = batch.inputs(rows, np.asarray([0, 0, 1]))
    assert torch.equal(packed.targets, batch.inputs(rows).targets)
    grid = packed.input_ids.flatten()
    follows = [
        int(grid[state + 1]) == int(target)
        for state, target in zip(packed.states, packed.targets, strict=True)
        if state + 1 < len(grid)
    ]
    assert sum(follows) >= len(follows) - 3, "all but each row's last token stand right after the state that chose them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "opt", "falcon"])
def test_families_that_can_be_packed(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check_packing(load_causal_lm(save(family, tmp_path), dtype), str(tmp_path))


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    path = save("mistral", tmp_path, sliding_window=8, max_position_embeddings=64)
    with pytest.raises(
        ValueError,
        match=r"^pack_tokens: must be 0 for a model .* \(family mistral\), which lets a token see the last 8 alone; "
        r"set pack_tok",
    ):
        check_packing(load_causal_lm(path, torch.float32), path)


def test_a_family_without_position_ids_of_its_own_is_refused(tmp_path: Path) -> None:
    model: Any = load_causal_lm(save("gpt2", tmp_path), torch.float32)
    trunk = model.base_model.forward
    # as one that makes them from the mask alone
    model.base_model.forward = lambda position_ids=None, **inputs: trunk(**inputs)
    with pytest.raises(ValueError, match=r"whose hidden states then differ by up to"):
        check_packing(model, str(tmp_path))
