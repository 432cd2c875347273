"""What is trained is what is judged: the learner in memory and the folder it saved agree on text, whatever the
tokenizer; and where they do not, it is said.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny_models
from actors.config import LearnerConfig
from actors.learner.learner import Learner, LearnerSpec, UpdatePlan
from actors.learner.trainees.base import Trainee
from actors.learner.trainees.policy import PolicyTrainee
from actors.learner.trainees.reward_model import RewardModelTrainee
from actors.models.reward_model import Preference
from actors.models.text import TextCodec
from actors.models.tokenizer import load_tokenizer
from actors.reward.worker import ClassifierReward
from cluster.faults import RunError
from pipeline.encoding.blocks import encode_block
from pipeline.encoding.encode import comparison_texts, demonstration_texts
from pipeline.preparation.finetune import Imitation
from pipeline.preparation.saved_model_check import (
    ROWS,
    SavedPolicyCheck,
    check_rewards,
    choose_probes,
    comparison_ids,
    response_ids,
)
from pipeline.tasks.task import Comparison, Demonstration
from pipeline.training.checkpoints import TrainingCheckpoint
from pipeline.training.job import HeldoutLoss, TrainingJob, TrainingState
from pipeline.training.probes import PolicyProbes, RewardProbes
from ports import free_port

TOKENIZERS = {
    "bytes": tiny_models.byte_tokenizer,
    "<s>": tiny_models.piece_tokenizer,
    "<s>, legacy": lambda: tiny_models.piece_tokenizer(scheme="legacy"),
    "<s> and </s>": lambda: tiny_models.piece_tokenizer(scheme="first", ends=True),
}
REPLIES = [
    (" Sure thing", " no"),
    ("fine</s>", "bad</s>"),
    (" ok<|endoftext|>", "no<|endoftext|>"),
    ("é", "e"),
    ("1", "2"),
    (" Su", "Su"),
]
COMPARISONS = [Comparison(prompt=prompt, replies=pair) for prompt in ("Q:", "<s>Why?", "a <s> b") for pair in REPLIES]
DEMONSTRATIONS = [Demonstration(prompt=c.prompt, response=c.replies[0]) for c in COMPARISONS]


class Trained:
    """A learner that has made a few updates on a table, and the job it was for, whose model it has saved."""

    def __init__(self, role: Any, model: Path, folder: Path, *, standardise: bool = True) -> None:
        texts = (
            comparison_texts(COMPARISONS, lambda prompt: ())
            if role == "reward"
            else demonstration_texts(DEMONSTRATIONS, lambda prompt: ())
        )
        numbered = texts.append_column("number", pa.array(range(texts.num_rows), pa.int64()))
        encoded = encode_block(
            numbered, comparisons=role == "reward", tokenizer_path=str(model), context=96, shortens=True
        )
        assert encoded.num_rows == len(COMPARISONS)
        ids = pa.array(range(encoded.num_rows), pa.int64())
        names = [name for name in encoded.column_names if name not in ("number", "truncated", "cut")]
        self.table = pa.table({name: ids if name in ("sample_id", "group_id") else encoded[name] for name in names})
        path = folder / "heldout.parquet"
        pq.write_table(self.table, path)
        codec = TextCodec(load_tokenizer(str(model)))
        known = [(c.prompt, c.replies if role == "reward" else c.replies[:1]) for c in COMPARISONS]
        chosen = choose_probes(path, known, comparison_ids(codec) if role == "reward" else response_ids(codec))
        probes = RewardProbes(chosen) if role == "reward" else PolicyProbes(chosen)
        learning = LearnerConfig(learning_rate=1e-3, micro_batch_size=8)
        trainee: Trainee[Any] = PolicyTrainee(objective=Imitation())
        if role == "reward":
            trainee = RewardModelTrainee(objective=Preference(), scale_texts=str(path) if standardise else "")
        spec = LearnerSpec(trainee=trainee, path=str(model), config=learning, total_updates=100, seed=0)
        learner = Learner(spec=spec, rank=0, ranks=1, timeout_s=60)
        learner.connect("127.0.0.1", free_port())
        learner.update(self.table, UpdatePlan(step=0, epochs=2, minibatches=2, seed=0, aggregation="token_mean"))
        self.job = TrainingJob(
            name=role,
            title="",
            section="",
            trainee=trainee,
            model=str(model),
            train=path,
            heldout=path,
            rows=1,
            best=folder / "best",
            learner=learning,
            measure=lambda learner, heldout: HeldoutLoss(loss=0, values={}, text=""),
            epochs=1,
            early_stop=True,
            batch=1,
            checkpoint_every=1,
            seed=0,
            probes=probes,
        )
        self.learner = learner
        scale, values = learner.export(str(self.job.best)), probes.noted(learner, self.table)
        nothing = HeldoutLoss(loss=0, values={}, text="")
        state = TrainingState(before=nothing, best=nothing, scale=scale, probe_values=values)
        self.state = TrainingCheckpoint.from_text(TrainingCheckpoint(state=state, shards=()).to_text()).state


@pytest.fixture(params=TOKENIZERS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_models.save_llama(tmp_path / "model", tokenizer=TOKENIZERS[request.param]())


def test_a_saved_reward_model_judges_text_as_the_one_in_memory_judged_its_tokens(model: Path, tmp_path: Path) -> None:
    """All texts, not the probes alone: also replies that name a special token or end in one, and prompts that begin
    with `<s>`.
    """
    trained = Trained("reward", model, tmp_path)
    assert len(trained.job.probes.rows) == ROWS and len(trained.state.probe_values) == ROWS
    reward = ClassifierReward(str(trained.job.best))
    check_rewards(trained.job, trained.state, reward)
    values = trained.learner.infer(trained.table)[1]
    masks = trained.table["action_mask"].to_pylist()
    known = [
        value
        for own, mask in zip(values["values"].to_pylist(), masks, strict=True)
        for value, marked in zip(own, mask, strict=True)
        if marked
    ]
    saved = reward(
        [c.prompt for c in COMPARISONS for _ in c.replies],
        [reply for c in COMPARISONS for reply in c.replies],
        [{}] * len(known),
    )
    np.testing.assert_allclose(
        np.subtract(saved, saved[0]), np.subtract(known, known[0]) / trained.state.scale, atol=1e-4
    )
    assert np.std(saved) == pytest.approx(1, abs=1e-3)


def test_a_saved_policy_imitates_text_as_the_one_in_memory_imitated_its_tokens(model: Path, tmp_path: Path) -> None:
    trained = Trained("policy", model, tmp_path)
    assert len(trained.job.probes.rows) == ROWS and len(trained.state.probe_values) == ROWS
    said: list[str] = []
    assert SavedPolicyCheck()(trained.job, trained.state, said.append) == {}
    assert said == ["check of the saved model"]


def without_begin(folder: Path) -> None:
    """Another tokenizer: it puts nothing before a text."""
    tiny_models.piece_tokenizer(begins=False).save_pretrained(folder)


def other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(
        {name: tensor * float("nan") for name, tensor in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


@pytest.mark.parametrize("damage", [without_begin, other_weights, no_numbers])
@pytest.mark.parametrize("role", ["reward", "policy"])
def test_a_saved_model_that_is_another_is_refused(role: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    trained = Trained(
        role, tiny_models.save_llama(tmp_path / "model", tokenizer=tiny_models.piece_tokenizer()), tmp_path
    )
    damage(trained.job.best)
    check: Callable[[], Any] = (
        (lambda: check_rewards(trained.job, trained.state, ClassifierReward(str(trained.job.best))))
        if role == "reward"
        else (lambda: SavedPolicyCheck()(trained.job, trained.state, lambda text: None))
    )
    with pytest.raises(
        RunError,
        match=rf"^{role} failed during 'check of the saved model': the model in .*best is not the one that was "
        r"trained: ' ?\w",
    ):
        check()


def test_rows_that_have_lost_something_are_not_chosen(tmp_path: Path) -> None:
    codec = TextCodec(tiny_models.byte_tokenizer())
    texts = [("ab", ("cd",)), ("ab", ("cde",)), ("ab", ("c" * 20,))]
    whole = [response_ids(codec)(*text) for text in texts]
    pq.write_table(
        pa.table({"tokens": pa.array([whole[0][1:], *whole[1:]], pa.list_(pa.int32()))}), tmp_path / "a.parquet"
    )
    assert [probe.row for probe in choose_probes(tmp_path / "a.parquet", texts, response_ids(codec))] == [1]
    pq.write_table(pa.table({"tokens": pa.array([], pa.list_(pa.int32()))}), tmp_path / "b.parquet")
    assert choose_probes(tmp_path / "b.parquet", [], response_ids(codec)) == ()


def test_the_numbers_of_the_probes_survive_a_checkpoint() -> None:
    nothing = HeldoutLoss(loss=0, values={}, text="")
    state = TrainingState(before=nothing, best=nothing, scale=1, probe_values={"3": [0.5, -0.25, 0.1 + 0.2]})
    written = TrainingCheckpoint(state=state, shards=()).to_text()
    assert TrainingCheckpoint.from_text(written).state == state
    with pytest.raises(ValueError, match="its checksum does not match"):
        TrainingCheckpoint.from_text(written.replace("-0.25", "-0.26"))
