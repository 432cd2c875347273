"""The manager: RLlib learns what the formulas say, repeats to the bit, and gives back what it saved."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.manager.manager import Manager
from actors.manager.option_head import OptionHead
from actors.manager.turns import TurnAdvantages, Turns
from manager_helpers import OPTIONS, WIDTH, learn, make_manager, make_turns, replace, slow_gae

ROOT = Path(__file__).parents[1]


def state(manager: Manager) -> dict[str, torch.Tensor]:
    """Weights and moments, copied."""
    return {f"{f.name}/{kind}": tensor.clone() for f in manager._fragments() for kind, tensor in f.tensors.items()}


def parameters(manager: Manager) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in manager._learner.model.named_parameters()}


def set_weights(manager: Manager, *, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in manager._learner.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


# What is learnt


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lam"), [(0.95, 0.95), (1.0, 1.0), (0.5, 0.0)])
def test_advantages_equal_a_slow_loop(seed: int, gamma: float, lam: float) -> None:
    manager = make_manager(gamma=gamma, lam=lam)
    set_weights(manager, seed=seed, scale=0.3)
    table = make_turns(20, seed=seed)
    assert {row["truncated"] for row in table.to_pylist()} == {True, False}
    found = TurnAdvantages(manager.advantages(table)[1]).table
    advantages, values = slow_gae(table, manager, gamma=gamma, lam=lam)
    np.testing.assert_allclose(found["advantage"].to_numpy(), advantages, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["value"].to_numpy(), values, rtol=0, atol=1e-6)
    assert found["sample_id"].equals(table["sample_id"])
    assert found["turn"].equals(table["turn"])


def test_a_truncated_conversation_is_continued_by_the_state_after_it_and_a_terminated_one_is_not() -> None:
    manager = make_manager(gamma=0.5, lam=1.0)
    set_weights(manager, seed=1, scale=0.3)
    table = make_turns(1, seed=7)  # one conversation
    [ended] = [i for i, row in enumerate(table.to_pylist()) if row["terminated"] or row["truncated"]]
    after = np.linspace(-1, 2, WIDTH).astype(np.float32)
    rewards = table["reward"].to_pylist()

    def last_return(truncated: bool) -> float:
        flags = [i == ended for i in range(len(table))]
        cut = replace(table, "truncated", [flag and truncated for flag in flags])
        cut = replace(cut, "terminated", [flag and not truncated for flag in flags])
        cut = replace(cut, "last_features", [after.tolist() if flag and truncated else [] for flag in flags])
        _, found = manager.advantages(cut)
        return float(found["advantage"][ended].as_py() + found["value"][ended].as_py())

    assert last_return(False) == pytest.approx(rewards[ended], abs=1e-6)
    assert last_return(True) == pytest.approx(rewards[ended] + 0.5 * float(manager.values(after[None])[0]), abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["small rewards", "errors beyond RLlib's bound of 10"])
def test_updates_equal_hand_written_ones(scale: float) -> None:
    """One minibatch an epoch, so that an epoch is a step of Adam on the whole table."""
    settings: dict[str, Any] = {"epochs": 3, "minibatch_size": 1000, "max_grad_norm": 0.7, "entropy_coef": 0.02}
    manager = make_manager(value_coef=0.25, clip=0.1, **settings)
    set_weights(manager, seed=2, scale=0.2)
    table = make_turns(15, seed=3, offer=0.7, scale=scale)
    turns = Turns(table)
    own = {name: parameter.clone().double().requires_grad_() for name, parameter in parameters(manager).items()}
    adam = torch.optim.Adam(list(own.values()), lr=0.01, eps=1e-5)
    advantages = torch.tensor(slow_gae(table, manager, gamma=0.95, lam=0.95)[0], dtype=torch.float64)
    returns = advantages + torch.from_numpy(manager.values(turns.features)).double()
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
    report = manager.update(table)

    h = torch.tensor(turns.features, dtype=torch.float64)
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    option = torch.from_numpy(turns.column("option").astype(np.int64))[:, None]
    recorded = torch.from_numpy(turns.column("option_logprob").copy()).double()
    offered, losses, norms = torch.from_numpy(turns.offered.copy()), [], []
    for _ in range(3):
        logits = (h @ own["policy_weight"].T + own["policy_bias"]).masked_fill(~offered, -1e30)
        logprobs = logits.log_softmax(1)
        ratio = (logprobs.gather(1, option)[:, 0] - recorded).exp()
        surrogate = torch.minimum(ratio * whitened, ratio.clamp(0.9, 1.1) * whitened).mean()
        value = h @ own["value_weight"][0] + own["value_bias"]
        entropy = -(logprobs.exp() * logprobs.where(offered, torch.zeros(()).double())).sum(1).mean()
        loss = -surrogate + 0.25 * (value - returns).square().mean() - 0.02 * entropy
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(own.values()), 0.7)))
        losses.append(float(loss))
        adam.step()
    for name, parameter in parameters(manager).items():
        torch.testing.assert_close(parameter.double(), own[name].detach(), rtol=0, atol=2e-5)
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert report.grad_norm == pytest.approx(np.mean(norms), rel=1e-4)
    assert report.advantage_std == pytest.approx(float(advantages.std(correction=0)), rel=1e-4)
    assert (report.turns, report.conversations, report.updates, report.skipped) == (len(table), 15, 3, 0)


def test_equal_returns_are_whitened_to_nothing() -> None:
    """In float32, rewards of 1000.1 would leave their rounding, divided by the least standard deviation."""
    manager = make_manager(gamma=0.0, entropy_coef=0.0)
    table = make_turns(200, seed=1)
    report = manager.update(replace(table, "reward", [1000.1] * len(table)))
    assert report.advantage_mean == pytest.approx(1000.1)
    assert report.policy_loss == pytest.approx(0, abs=1e-6)
    assert not parameters(manager)["policy_weight"].any()
    assert parameters(manager)["value_bias"].item() > 0


def test_each_turn_is_learnt_from_once_an_epoch_in_minibatches_of_nearly_one_size() -> None:
    manager = make_manager(epochs=3, minibatch_size=7)
    table = make_turns(12, seed=4)
    manager.update(table)
    sizes = [each.turns for each in manager._learner.statistics]
    assert sum(sizes) == 3 * len(table)
    assert max(sizes) <= 7
    assert max(sizes) - min(sizes) <= 1


def test_single_turns_one_by_one_are_finite() -> None:
    """With RLlib's artificial turns left in the batch, a minibatch of one turn may hold none that counts."""
    report = make_manager(minibatch_size=1).update(make_turns(3, seed=6))
    assert math.isfinite(report.loss)
    assert report.skipped == 0


def test_one_option_gives_no_gradient_to_the_policy_head() -> None:
    manager = make_manager(options=1)
    for seed in range(3):
        report = manager.update(make_turns(seed=seed, options=1))
        assert (report.policy_loss, report.entropy) == (pytest.approx(0, abs=1e-6), 0)
    assert not any(tensor.any() for name, tensor in state(manager).items() if name.startswith("policy"))
    assert parameters(manager)["value_weight"].any()


def test_permuting_options_permutes_results() -> None:
    permutation = np.array([2, 0, 1])  # option o is called permutation[o]
    manager, other = make_manager(), make_manager()
    for seed in range(3):
        table = make_turns(seed=seed, head=OptionHead(manager.weights()), offer=0.7)
        turns = Turns(table)
        offered = np.empty_like(turns.offered)
        offered[:, permutation] = turns.offered
        renamed = replace(table, "offered", offered.tolist())
        renamed = replace(renamed, "option", permutation[turns.column("option")])
        report, same = manager.update(table), other.update(renamed)
        assert same.loss == pytest.approx(report.loss, abs=1e-5)
        assert same.ratio_deviation < 1e-5
    own, theirs = parameters(manager), parameters(other)
    assert own["policy_weight"].abs().min() > 0
    for name in ("policy_weight", "policy_bias"):
        torch.testing.assert_close(theirs[name][permutation], own[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs["value_weight"], own["value_weight"], rtol=0, atol=1e-5)


def test_an_option_never_on_offer_is_never_moved() -> None:
    manager = make_manager()
    for seed in range(3):
        table = make_turns(seed=seed, options=2)
        report = manager.update(replace(table, "offered", [[*row, False] for row in table["offered"].to_pylist()]))
        assert report.entropy <= math.log(2) + 1e-6
        assert report.ratio_deviation < (1e-5 if seed == 0 else 10)  # later tables were sampled from a uniform policy
    assert not parameters(manager)["policy_weight"][2].any()
    assert parameters(manager)["policy_weight"][:2].any()
    assert all(tensor.isfinite().all() for tensor in state(manager).values())


@pytest.mark.parametrize(
    ("column", "value"), [("option_logprob", -200.0), ("reward", 1e25)], ids=["a gradient of NaN", "a norm of infinity"]
)
def test_a_gradient_that_is_not_finite_is_dropped_and_counted(column: str, value: float) -> None:
    manager = make_manager(epochs=2, minibatch_size=1000)
    learn(manager, [0])
    before = state(manager)
    table = make_turns(seed=1)
    report = manager.update(replace(table, column, [value] * len(table)))
    assert (report.updates, report.skipped, report.grad_norm) == (0, 2, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(manager).items())
    learn(manager, [2])
    assert all(tensor.isfinite().all() for tensor in state(manager).values())


def test_a_small_problem_is_learnt() -> None:
    """Four situations, four options, of which one is rewarded in each: from chance, 1/4, to nearly always."""
    rng, width = np.random.default_rng(0), 16
    situations = rng.normal(size=(4, width)).astype(np.float32)
    right = np.array([2, 0, 3, 1])
    manager = make_manager(width=width, options=4, minibatch_size=64)
    rewards, spread = [], []
    for step in range(15):
        samples, turns = np.repeat(np.arange(step * 48, step * 48 + 48), 2), np.tile(np.arange(2, dtype=np.int32), 48)
        situation = rng.integers(4, size=96)
        features = (situations[situation] + 0.1 * rng.normal(size=(96, width))).astype(np.float32)
        offered = np.ones((96, 4), bool)
        chosen = OptionHead(manager.weights()).choose(features, offered, samples, turns, seed=0)
        reward = (chosen.options == right[situation]).astype(np.float32)
        table = Turns.of(
            {
                "sample_id": samples,
                "turn": turns,
                "features": features.tolist(),
                "offered": offered.tolist(),
                "option": chosen.options,
                "option_logprob": chosen.logprobs,
                "reward": reward,
                "terminated": turns == 1,
                "truncated": np.zeros(96, bool),
                "last_features": [[]] * 96,
            }
        ).table
        report = manager.update(table)
        assert report.ratio_deviation < 1e-5
        assert report.reward == pytest.approx(float(reward.mean()))
        rewards.append(report.reward)
        spread.append(report.entropy)
    assert rewards[0] < 0.4
    assert min(rewards[-3:]) > 0.9
    assert spread[-1] < 0.5 * math.log(4) < spread[0]
    greedy = OptionHead(manager.weights()).choose(
        situations, np.ones((4, 4), bool), np.arange(4), np.zeros(4, np.int32), seed=0, greedy=True
    )
    assert greedy.options.tolist() == right.tolist()


@pytest.mark.parametrize("width", [1, 12, 768])
def test_the_learner_s_log_probs_are_those_that_the_head_recorded(width: int) -> None:
    manager = make_manager(width=width)
    set_weights(manager, seed=3, scale=3 / math.sqrt(width))
    head = OptionHead(manager.weights())
    report = manager.update(make_turns(40, seed=2, width=width, head=head, offer=0.8))
    assert report.ratio_deviation < 1e-5
    assert 0 < report.entropy < 0.9 * math.log(OPTIONS)  # far from uniform


# The same again


def test_updates_repeat_to_the_bit_in_processes_with_other_numbers_of_threads(tmp_path: Path) -> None:
    code = (
        "import ray, sys\n"
        "from manager_helpers import learn, make_manager\n"
        "manager = make_manager(width=300, diversity_coef=0.5)\n"
        "from manager_helpers import make_turns\n"
        "for seed in range(3): manager.update(make_turns(40, seed=seed, width=300, heard=True))\n"
        "assert not ray.is_initialized()\n"
        "print(manager.save(sys.argv[1]).file.checksum)\n"
    )
    found = []
    for threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / threads)],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")  # RLlib is silent
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(found[0].split()) == 1, "the checksum alone"


def test_the_order_of_turns_depends_on_the_seed() -> None:
    results = []
    for seed in (1, 1, 2):
        manager = make_manager(seed=seed)
        np.random.seed(len(results))
        learn(manager, [0])
        results.append(parameters(manager)["value_weight"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_generators_of_the_process_are_left_alone() -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    learn(make_manager(), [0])
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize("first", [0, 2])
def test_saving_and_restoring_in_between_changes_nothing(first: int, tmp_path: Path) -> None:
    through = make_manager()
    learn(through, range(first + 2))

    half = make_manager()
    learn(half, range(first))
    saved = half.save(str(tmp_path))
    restored = make_manager()
    learn(restored, [8, 9])  # undone by what follows
    report = restored.restore(str(tmp_path), [saved.file.name])
    assert report.steps == half.steps
    assert restored.save(str(tmp_path / "again")).file == saved.file
    learn(restored, range(first, first + 2))

    after, expected = state(restored), state(through)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert restored.steps == through.steps > half.steps


# The discriminator


HEARD: dict[str, Any] = {"diversity_coef": 0.5, "discriminator_learning_rate": 0.1}


def test_the_manager_learns_the_same_to_the_bit_whatever_the_discriminator_says() -> None:
    """Weights, moments and advantages: the intrinsic reward is the worker's alone."""
    deaf, hearing = make_manager(), make_manager(**HEARD)
    for seed in range(3):
        table = make_turns(seed=seed, head=OptionHead(deaf.weights()), offer=0.8, heard=True)
        silent = replace(table, "utterance", [[]] * len(table))
        plain, heard = deaf.advantages(silent)[1], hearing.advantages(table)[1]
        assert heard.drop_columns("log_q").equals(plain.drop_columns("log_q"))
        assert not np.any(plain["log_q"].to_numpy())
        assert heard["log_q"].to_numpy().max() <= 0
        first, second = deaf.update(silent), hearing.update(table)
        assert first.discriminator is None
        assert second.discriminator is not None
        assert dataclasses.replace(second, discriminator=None, seconds=first.seconds) == first
    own, theirs = state(deaf), state(hearing)
    assert theirs.keys() - own.keys() == {
        f"discriminator_weight/{kind}" for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    assert all(torch.equal(theirs[name], own[name]) for name in own)
    assert hearing.steps == deaf.steps


def test_turns_are_scored_before_the_discriminator_learns_from_them() -> None:
    manager, table = make_manager(**HEARD), make_turns(seed=1, offer=0.7, heard=True)
    for _ in range(2):
        log_q = manager.advantages(table)[1]["log_q"].to_numpy().astype(np.float64)
        gain = log_q + np.log(Turns(table).offered.sum(1))
        found = manager.update(table).discriminator
        assert found is not None
        assert found.reward == pytest.approx(0.5 * gain.mean(), abs=1e-6)
    assert found.reward > 0.05, "the second time it knows them"


def test_the_discriminator_is_saved_and_restored_to_the_bit(tmp_path: Path) -> None:
    tables = [make_turns(seed=seed, heard=True) for seed in range(4)]
    through, half, restored = (make_manager(**HEARD) for _ in range(3))
    for table in tables[:2]:
        half.update(table)
    saved = half.save(str(tmp_path)).file
    restored.update(tables[3])  # undone by what follows
    restored.restore(str(tmp_path), [saved.name])
    assert restored.save(str(tmp_path / "again")).file == saved
    for table in tables[2:]:
        restored.update(table)
    for table in tables:
        through.update(table)
    assert restored.save(str(tmp_path / "a")).file == through.save(str(tmp_path / "b")).file
    assert restored.advantages(tables[0])[1].equals(through.advantages(tables[0])[1])
    with pytest.raises(ValueError, match="'discriminator_weight' is unknown to the model"):
        make_manager().restore(str(tmp_path), [saved.name])


def test_a_discriminator_without_utterances_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Turns.utterance: must have the tokens of each turn .* is 0.5, got none"):
        make_manager(**HEARD).advantages(make_turns())


def test_a_file_of_another_kind_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    manager = make_manager()
    learn(manager, [0])
    before = state(manager)
    file = make_manager(options=4).save(str(tmp_path)).file
    with pytest.raises(ValueError, match="'policy_weight' must have the model's 36 elements, got 48"):
        manager.restore(str(tmp_path), [file.name])
    (tmp_path / file.name).write_bytes(b"\x80\x04pickled")
    with pytest.raises(ValueError, match="must be a shard that a learner wrote"):
        manager.restore(str(tmp_path), [file.name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(manager).items())


# What is refused


def test_a_manager_has_one_rank() -> None:
    with pytest.raises(ValueError, match="must have one rank, got rank 0 of 2"):
        Manager(spec=make_manager()._spec, rank=0, ranks=2, timeout_s=1.0)


def test_turns_of_another_shape_are_refused() -> None:
    manager = make_manager()
    with pytest.raises(ValueError, match="12 features and 3 options, as the manager has, got 12 and 4"):
        manager.update(make_turns(options=4))
    with pytest.raises(ValueError, match="must have at least one turn"):
        manager.update(Turns.schema.empty_table())
    with pytest.raises(ValueError, match=r"features: must be \(rows, 12\), got \(2, 5\)"):
        manager.values(np.zeros((2, 5), np.float32))
    assert manager.steps == 0
