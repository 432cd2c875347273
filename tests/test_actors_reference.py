"""The reference's log-probs, against the Hugging Face model called on one unpadded row at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.config import ReferenceConfig
from actors.experience import TokenLogprobs
from actors.models.causal_lm import load_causal_lm
from actors.reference import ReferenceWorker
from learner_helpers import make_experience, rollouts_of, save_tiny_model

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(Path(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def worker(path: str) -> ReferenceWorker:
    return ReferenceWorker(path=path, config=ReferenceConfig(batch_size=4), temperature=TEMPERATURE)


def expected(path: str, rollouts: pa.Table) -> list[list[float]]:
    model = load_causal_lm(path, torch.float32)
    out = []
    for tokens, mask in zip(rollouts["tokens"].to_pylist(), rollouts["action_mask"].to_pylist(), strict=True):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0] / TEMPERATURE, -1)
        out.append([float(logprobs[t - 1, token]) if mask[t] else 0.0 for t, token in enumerate(tokens)])
    return out


def test_log_probs_are_those_of_the_model_at_the_sampling_temperature(path: str, worker: ReferenceWorker) -> None:
    rollouts = rollouts_of(make_experience(11))
    report, table = worker.logprobs(rollouts, chunk=4, attempt=2)
    assert TokenLogprobs(table).table["sample_id"].to_pylist() == rollouts["sample_id"].to_pylist()
    want = expected(path, rollouts)
    for got, row in zip(table["logprobs"].to_pylist(), want, strict=True):
        assert got == pytest.approx(row, abs=1e-5)
    flat = np.concatenate(
        [np.asarray(row)[mask] for row, mask in zip(want, rollouts["action_mask"].to_pylist(), strict=True)]
    )
    assert (report.chunk, report.attempt, report.rows, report.action_tokens) == (4, 2, 11, len(flat))
    assert report.mean == pytest.approx(flat.mean(), abs=1e-5)


def test_a_chunk_gives_the_same_bits_again_and_another_worker_the_same(path: str, worker: ReferenceWorker) -> None:
    rollouts = rollouts_of(make_experience(9, seed=3))
    first = worker.logprobs(rollouts, 0, 0)[1]
    worker.logprobs(rollouts_of(make_experience(5, seed=8)), 1, 0)
    again = worker.logprobs(rollouts, 0, 1)[1]
    other = ReferenceWorker(path=path, config=ReferenceConfig(batch_size=4), temperature=TEMPERATURE).logprobs(
        rollouts, 0, 0
    )[1]
    assert first.equals(again)
    assert first.equals(other)


def test_an_empty_chunk_gives_an_empty_table(worker: ReferenceWorker) -> None:
    report, table = worker.logprobs(rollouts_of(make_experience(3)).slice(0, 0), 0, 0)
    assert (report.rows, report.action_tokens, report.mean, table.num_rows) == (0, 0, 0.0, 0)


def test_a_table_of_another_type_is_refused(worker: ReferenceWorker) -> None:
    with pytest.raises(ValueError, match=r"Rollouts: column 'reward' is not declared"):
        worker.logprobs(make_experience(3), 0, 0)


def test_a_gpu_that_is_not_there_is_refused(path: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="gpus: must be 0 where torch sees no GPU, got 1"):
        ReferenceWorker(path=path, config=ReferenceConfig(gpus=1), temperature=1.0)


def test_samples_that_are_left_out_have_no_row_and_the_others_are_as_with_them(worker: ReferenceWorker) -> None:
    rollouts = rollouts_of(make_experience(9, seed=3))
    ids = rollouts["sample_id"].to_pylist()
    whole = worker.logprobs(rollouts, 0, 0)[1]["logprobs"].to_pylist()
    report, rest = worker.logprobs(rollouts, 0, 1, without=ids[::2])
    assert (report.rows, rest["sample_id"].to_pylist()) == (4, ids[1::2])
    for got, want in zip(rest["logprobs"].to_pylist(), whole[1::2], strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    assert worker.logprobs(rollouts, 0, 2, without=ids)[1].num_rows == 0
