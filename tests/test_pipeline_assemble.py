"""Experience from rollouts, scores, reference and values: against a slow loop, however the tables come in."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.experience import Experience, Rollouts, Scores, TokenLogprobs, TokenValues
from actors.learner.micro_batches import Batch, deal
from learner_helpers import actions_of
from pipeline.algorithms.a2c import A2C
from pipeline.algorithms.base import Advantages, Algorithm, Trajectories
from pipeline.algorithms.grpo import GRPO
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.algorithms.reinforce_baseline import ReinforceBaseline
from pipeline.algorithms.reinforce_pp import ReinforcePP
from pipeline.algorithms.rloo import RLOO
from pipeline.algorithms.shaping import ShapingConfig
from pipeline.assembly.assembler import Assembler
from pipeline.assembly.assembly import Assembly, assemble
from pipeline.assembly.report import AssemblyReport
from random_inputs import random_inputs

seeds = st.integers(0, 2**32 - 1)
NAN = math.nan


class Shaped(Reinforce):
    """Shows what an algorithm is given: advantages are the token rewards, returns the rollout's group plus
    the values.
    """

    name: Literal["shaped"] = "shaped"  # type: ignore[assignment]
    whiten_advantages: bool = False

    def advantages(self, batch: Trajectories) -> Advantages:
        zero = batch.rewards.new_zeros(())
        return Advantages(
            advantages=batch.rewards, returns=(batch.groups[:, None] + batch.values).where(batch.mask, zero)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One rollout with all that is said of it. Entries of the lists are aligned with tokens, 0 where not acted."""

    sample_id: int
    group_id: int
    tokens: list[int]
    acted: list[bool]
    logprobs: list[float]
    reference: list[float]
    values: list[float]
    reward: float
    finish: str = "stop"

    @property
    def ok(self) -> bool:
        return not math.isnan(self.reward)


def rollouts(samples: list[Sample]) -> pa.Table:
    return Rollouts.of(
        {
            "sample_id": [s.sample_id for s in samples],
            "group_id": [s.group_id for s in samples],
            "tokens": [s.tokens for s in samples],
            "action_mask": [s.acted for s in samples],
            "logprobs": [s.logprobs for s in samples],
            "versions": [[3 if a else -1 for a in s.acted] for s in samples],
            "turn_starts": [[t for t, a in enumerate(s.acted) if a and not s.acted[t - 1]] for s in samples],
            "option": [[] for _ in samples],
            "option_logprobs": [[] for _ in samples],
            "finish": [s.finish for s in samples],
            "metadata": [f'{{"row": {s.group_id}}}' for s in samples],
        }
    ).table


def scores(samples: list[Sample]) -> pa.Table:
    return Scores.of(
        {
            "sample_id": [s.sample_id for s in samples],
            "reward": [s.reward for s in samples],
            "turn_rewards": [[s.reward, 0.0] if s.ok else [] for s in samples],
            "status": ["ok" if s.ok else "timeout" for s in samples],
            "detail": ["" if s.ok else "1 s" for s in samples],
        }
    ).table


def reference(samples: list[Sample]) -> pa.Table:
    return TokenLogprobs.of(
        {"sample_id": [s.sample_id for s in samples], "logprobs": [s.reference for s in samples]}
    ).table


def values(samples: list[Sample]) -> pa.Table:
    return TokenValues.of({"sample_id": [s.sample_id for s in samples], "values": [s.values for s in samples]}).table


def random_step(seed: int) -> list[Sample]:
    """Groups of 1 to 3 samples, of 1 to 3 turns with environment tokens between them; some have no reward, some no
    action at all.
    """
    random = np.random.default_rng(seed)
    group_size, samples = int(random.integers(1, 4)), []
    for number in range(group_size * int(random.integers(1, 8))):
        acted = [False] * int(random.integers(1, 5))
        for _ in range(int(random.integers(0 if number else 1, 4))):
            acted += [True] * int(random.integers(1, 6)) + [False] * int(random.integers(0, 4))
        column = [
            [float(np.float32(x)) * a for x, a in zip(random.normal(size=len(acted)), acted, strict=True)]
            for _ in range(3)
        ]
        samples.append(
            Sample(
                sample_id=1000 + number,
                group_id=500 + number // group_size,
                tokens=random.integers(0, 6, len(acted)).tolist(),
                acted=acted,
                logprobs=column[0],
                reference=column[1],
                values=column[2],
                reward=NAN if number and random.random() < 0.2 else float(np.float32(random.normal())),
                finish=str(random.choice(["stop", "length"])),
            )
        )
    return samples


def tables(
    samples: list[Sample], needs: Algorithm, random: np.random.Generator | None = None
) -> tuple[tuple[int, int, int, int, int], list[pa.Table]]:
    """What `assemble` is given: whole tables in sample order, or, with `random`, cut anywhere, rows and tables
    shuffled.
    """
    kinds = [
        rollouts,
        scores,
        *([reference] if needs.needs_reference else []),
        *([values] if needs.needs_critic else []),
    ]
    parts = [[kind(part) for part in _pieces(samples, random)] for kind in kinds]
    count = dict(zip(kinds, map(len, parts), strict=True))
    return (count[rollouts], count[scores], count.get(reference, 0), count.get(values, 0), 0), [
        table for part in parts for table in part
    ]


def _pieces(samples: list[Sample], random: np.random.Generator | None) -> list[list[Sample]]:
    if random is None:
        return [samples]
    shuffled = [samples[i] for i in random.permutation(len(samples))]
    cuts = [0, *sorted(random.integers(0, len(samples) + 1, 3).tolist()), len(samples)]
    return [shuffled[a:b] for a, b in pairwise(cuts)]


NOTHING = ShapingConfig()


def how(algorithm: Algorithm, shaping: ShapingConfig = NOTHING, max_new_tokens: int = 9) -> Assembly:
    return Assembly(algorithm=algorithm, kl_coef=algorithm.kl_coef, shaping=shaping, max_new_tokens=max_new_tokens)


def run(
    algorithm: Algorithm,
    samples: list[Sample],
    random: np.random.Generator | None = None,
    shaping: ShapingConfig = NOTHING,
) -> tuple[AssemblyReport, pa.Table]:
    counts, given_tables = tables(samples, algorithm, random)
    return assemble(how(algorithm, shaping), [s.sample_id for s in samples if s.ok], counts, *given_tables)


def slow(samples: list[Sample], algorithm: PPO) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns at each token of each sample, by their definitions, in float64."""
    advantages, returns = [], []
    for s in samples:
        at = [t for t, a in enumerate(s.acted) if a]
        rewards = [
            -algorithm.kl_coef * (s.logprobs[t] - s.reference[t]) + (s.reward if t == at[-1] else 0.0) for t in at
        ]
        v = [s.values[t] for t in at] + [0.0]
        deltas = [r + algorithm.gamma * v[i + 1] - v[i] for i, r in enumerate(rewards)]
        gae = [
            sum((algorithm.gamma * algorithm.lam) ** (k - i) * deltas[k] for k in range(i, len(at)))
            for i in range(len(at))
        ]
        advantages.append(dict(zip(at, gae, strict=True)))
        returns.append({t: a + s.values[t] for t, a in advantages[-1].items()})
    every = [a for row in advantages for a in row.values()]
    if algorithm.whiten_advantages:
        mean, deviation = (
            statistics.fmean(every),
            math.sqrt(statistics.variance(every) + 1e-8) if len(every) > 1 else 1e-4,
        )
        advantages = [{t: (a - mean) / deviation for t, a in row.items()} for row in advantages]
    return tuple(
        [[row.get(t, 0.0) for t in range(len(s.tokens))] for s, row in zip(samples, rows, strict=True)]
        for rows in (advantages, returns)
    )  # type: ignore[return-value]


def close(got: list[list[float]], expected: list[list[float]]) -> bool:
    return all(g == pytest.approx(e, rel=1e-3, abs=2e-4) for g, e in zip(got, expected, strict=True))


@random_inputs(150)
@given(
    seeds,
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.booleans(),
)
def test_advantages_and_returns_equal_the_loop(
    seed: int, kl_coef: float, gamma: float, lam: float, whiten: bool
) -> None:
    algorithm = PPO(kl_coef=kl_coef, gamma=gamma, lam=lam, whiten_advantages=whiten)
    samples = random_step(seed)
    trained = [s for s in samples if s.ok]
    _, table = run(algorithm, samples, np.random.default_rng(seed))
    advantages, returns = slow(
        [s if kl_coef else dataclasses.replace(s, reference=s.logprobs) for s in trained], algorithm
    )
    assert close(table["advantages"].to_pylist(), advantages)
    assert close(table["returns"].to_pylist(), returns)


@random_inputs(100)
@given(seeds)
def test_an_algorithm_is_given_token_rewards_values_and_groups(seed: int) -> None:
    """-kl_coef * (log pi - log pi_ref) at every action token, the score at the last one; groups numbered from 0."""
    samples = random_step(seed)
    trained = [s for s in samples if s.ok]
    _, table = run(Shaped(kl_coef=0.5), samples, np.random.default_rng(seed))
    groups = sorted({s.group_id for s in trained})
    for s, rewards, returns in zip(trained, table["advantages"].to_pylist(), table["returns"].to_pylist(), strict=True):
        last = max((t for t, a in enumerate(s.acted) if a), default=-1)
        expected = [
            a * -0.5 * (p - q) + (s.reward if t == last else 0)
            for t, (a, p, q) in enumerate(zip(s.acted, s.logprobs, s.reference, strict=True))
        ]
        assert rewards == pytest.approx(expected, abs=1e-5)
        assert returns == [groups.index(s.group_id) * a for a in s.acted]


@random_inputs(100)
@given(seeds, st.sampled_from([PPO(kl_coef=0.2), PPO(), Reinforce(kl_coef=0.1), Reinforce()]))
def test_the_result_does_not_depend_on_how_the_tables_came_to_the_bit(seed: int, algorithm: Algorithm) -> None:
    samples = random_step(seed)
    report, table = run(algorithm, samples)
    for attempt in range(3):
        again, shuffled = run(algorithm, samples, np.random.default_rng([seed, attempt]))
        assert repr(again) == repr(report)  # nan is not equal to itself
        assert shuffled.equals(table)


@pytest.mark.parametrize(
    "algorithm",
    [GRPO(kl_coef=0.0), GRPO(kl_coef=0.0, std=False), RLOO(kl_coef=0.0)],
    ids=["grpo", "grpo without std", "rloo"],
)
def test_group_statistics_do_not_depend_on_how_groups_fall_on_ranks(algorithm: Algorithm) -> None:
    """They are taken over the whole step, whatever ranks and micro-batches the table's parts come from and its rows go
    to.
    """
    random = np.random.default_rng(0)
    lengths, rewards = random.integers(1, 9, 12), random.normal(size=12).astype(np.float32)
    samples = [  # three groups of four
        Sample(
            sample_id=i,
            group_id=i // 4,
            tokens=[1, *[2] * n],
            acted=[False, *[True] * n],
            logprobs=[0.0] * (n + 1),
            reference=[0.0] * (n + 1),
            values=[0.0] * (n + 1),
            reward=float(rewards[i]),
        )
        for i, n in enumerate(lengths.tolist())
    ]
    table = run(algorithm, samples)[1]
    for ranks, size in itertools.product((1, 2, 3), (1, 3, 12)):
        shares = deal(np.arange(12), lengths + 1, ranks=ranks, micro_batch_size=size)
        split = [
            len({rank for rank, share in enumerate(shares) for rows in share if np.any(rows // 4 == group)})
            for group in range(3)
        ]
        assert max(split) == ranks, "some group must be on all ranks for this test to test it"
        parts = [[samples[row] for rows in share for row in rows] for share in shares]
        counts = (ranks, ranks, 0, 0, 0)
        assert assemble(how(algorithm), range(12), counts, *map(rollouts, parts), *map(scores, parts))[1].equals(table)
        batch = Batch(table, torch.device("cpu"))
        for rows in (rows for share in shares for rows in share):
            got = actions_of(batch, rows)
            for at, row in enumerate(rows.tolist()):
                group = rewards[row // 4 * 4 :][:4].tolist()
                others = statistics.fmean(group) if isinstance(algorithm, GRPO) else (sum(group) - rewards[row]) / 3
                spread = statistics.stdev(group) if isinstance(algorithm, GRPO) and algorithm.std else 1.0
                assert got.advantages[got.row == at].tolist() == pytest.approx(
                    [(rewards[row] - others) / spread] * int(lengths[row]), rel=1e-4
                )


@random_inputs(100)
@given(seeds)
def test_everything_else_is_carried_over_in_sample_order(seed: int) -> None:
    samples = random_step(seed)
    trained = [s for s in samples if s.ok]
    _, table = run(PPO(kl_coef=0.1), samples, np.random.default_rng(seed))
    assert Experience(table).table["sample_id"].to_pylist() == [s.sample_id for s in trained]
    assert table.select(Rollouts.schema.names).equals(rollouts(trained))
    assert table.select(["reward", "turn_rewards"]).equals(scores(trained).select(["reward", "turn_rewards"]))
    assert table["proximal_logprobs"].equals(table["logprobs"])
    assert table["reference_logprobs"].equals(reference(trained)["logprobs"])
    assert table["values"].equals(values(trained)["values"])


@random_inputs(100)
@given(seeds, st.sampled_from([PPO(kl_coef=0.2), Reinforce()]))
def test_columns_are_zero_where_nothing_was_chosen_and_finite_everywhere(seed: int, algorithm: Algorithm) -> None:
    """The NaN reward of a quarantined sample reaches nobody else, and whitening shifts no token that was
    not an action.
    """
    _, table = run(algorithm, random_step(seed), np.random.default_rng(seed))
    acted = np.concatenate([np.zeros(0, np.bool_), *table["action_mask"].to_pylist()])
    for name in ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns"):
        column = np.concatenate([np.zeros(0), *table[name].to_pylist()])
        assert column.shape == acted.shape
        assert np.isfinite(column).all()
        assert not column[~acted.astype(bool)].any()


A = Sample(
    sample_id=4,
    group_id=2,
    tokens=[1, 2, 7, 8, 3, 9],
    acted=[False, False, True, True, False, True],
    logprobs=[0, 0, -1.0, -0.5, 0, -0.25],
    reference=[0, 0, -1.5, -0.5, 0, -0.5],
    values=[0, 0, 0.5, 1.0, 0, 2.0],
    reward=3.0,
)
B = Sample(
    sample_id=5,
    group_id=2,
    tokens=[1, 2, 7],
    acted=[False, False, True],
    logprobs=[0, 0, -2.0],
    reference=[0, 0, -1.0],
    values=[0, 0, 1.0],
    reward=1.0,
    finish="length",
)
FAILED = dataclasses.replace(B, sample_id=6, group_id=3, reward=NAN)


def test_a_step_by_hand() -> None:
    """KL of A: .5, 0, .25; of B: -1.

    With kl_coef 1 A earns -.5, 0, 3 - .25 and B 1 + 1; lambda 1 gives returns that are rewards to go.
    """
    report, table = run(PPO(kl_coef=1.0, lam=1.0, whiten_advantages=False), [A, B, FAILED])
    assert table["returns"].to_pylist() == [[0, 0, 2.25, 2.75, 0, 2.75], [0, 0, 2.0]]
    assert table["advantages"].to_pylist() == [[0, 0, 1.75, 1.75, 0, 0.75], [0, 0, 1.0]]
    returns, errors = [2.25, 2.75, 2.75, 2.0], [1.75, 1.75, 0.75, 1.0]
    assert report.conversation == report.option == {}
    assert {
        name: value for name, value in dataclasses.asdict(report).items() if name not in ("conversation", "option")
    } == pytest.approx(
        {
            "samples": 2,
            "action_tokens": 4,
            "prompt_tokens": 5,  # everything that is not an action
            "reward_mean": 2.0,
            "reward_std": 1.0,
            "shaped_mean": 2.0,
            "kl_per_rollout": (0.5 + 0.25 - 1) / 2,
            "kl_per_token": (0.5 + 0.25 - 1) / 4,
            "kl_bounded": 0.0,
            "flat_groups": 0.0,
            "advantage_std": statistics.pstdev(errors),
            "return_mean": statistics.fmean(returns),
            "value_mean": 1.125,
            "explained_variance": 1 - statistics.pvariance(errors) / statistics.pvariance(returns),
            "response_tokens": 2.0,
            "stopped": 0.5,
            "token_distinct_2": 1.0,
            "version_min": 3,
            "version_mean": 3.0,
        }
    )


def test_groups_that_compare_to_nothing_and_penalties_that_are_cut_off_are_counted() -> None:
    """Groups of 2, 2 and 1, one of them with equal rewards; a token that the reference finds e^12 times likelier."""
    rewards = {(0, 0): 1000.1, (1, 0): 1000.1, (2, 1): 1.0, (3, 1): 2.0, (4, 2): 5.0}
    rows = [replace(A, sample_id=i, group_id=group, reward=reward) for (i, group), reward in rewards.items()]
    far = [reference - 12 * (t == A.acted.index(True)) for t, reference in enumerate(A.logprobs)]
    rows[0] = replace(rows[0], logprobs=far, reference=A.logprobs)
    report, table = run(GRPO(kl_coef=0.5, kl_in="reward"), rows)
    assert report.flat_groups == 0.5
    assert report.kl_bounded == pytest.approx(1 / (5 * sum(A.acted)))
    assert np.isfinite(np.concatenate(table["advantages"].to_numpy())).all()
    assert math.isnan(run(GRPO(), [rows[-1]])[0].flat_groups)
    assert run(GRPO(), [rows[0], rows[1]])[0].reward_std == 0


def test_the_report_counts_only_what_is_trained() -> None:
    many, one = (str(run(PPO(), rows)[0]) for rows in ([A, FAILED], [A]))  # as text, since nan is not equal to itself
    assert many == one
    assert "samples=1," in many


def test_without_a_reference_there_is_no_penalty_and_no_kl() -> None:
    report, table = run(PPO(kl_coef=0), [A, B])
    assert math.isnan(report.kl_per_rollout)
    assert math.isnan(report.kl_per_token)
    assert table["reference_logprobs"].to_pylist() == [[0] * 6, [0] * 3]


@pytest.mark.parametrize(
    ("kind", "kl"),
    [("k1", [0.5, 0, 0.25]), ("k2", [0.125, 0, 0.03125]), ("k3", [math.exp(-0.5) - 0.5, 0, math.exp(-0.25) - 0.75])],
)
def test_the_penalty_is_of_the_estimator_that_was_asked_for(kind: Any, kl: list[float]) -> None:
    _, table = run(Shaped(kl_coef=2.0, kl_estimator=kind), [A, B])
    rewards = [r for r, acted in zip(table["advantages"].to_pylist()[0], A.acted, strict=True) if acted]
    assert rewards == pytest.approx([-2 * kl[0], -2 * kl[1], 3 - 2 * kl[2]])


def test_a_penalty_in_the_loss_is_not_in_the_rewards() -> None:
    report, table = run(Shaped(kl_coef=2.0, kl_in="loss"), [A, B])
    assert table["advantages"].to_pylist() == [[0, 0, 0, 0, 0, 3], [0, 0, 1]]
    assert report.kl_per_rollout == pytest.approx((0.5 + 0.25 - 1) / 2)


def test_what_is_shaped_is_trained_on_and_what_was_given_is_kept() -> None:
    """A ends by itself with 3 tokens; B does not, with 1. Clipped at 2, B gets -5 in place of its score, and A loses 2
    of the last 4 of 4 tokens' penalty.
    """
    shaping = ShapingConfig(clip=2, missing_eos="replace", eos_penalty=-5, overlong_tokens=4, overlong_penalty=2)
    counts, given_tables = tables([A, B], Shaped())
    report, table = assemble(how(Shaped(), shaping, max_new_tokens=4), [4, 5], counts, *given_tables)
    assert table["advantages"].to_pylist() == [[0, 0, 0, 0, 0, 2 - 2 * 3 / 4], [0, 0, -5 - 2 * 1 / 4]]
    assert table["reward"].to_pylist() == [3.0, 1.0]
    assert (report.reward_mean, report.shaped_mean) == (2.0, (0.5 - 5.5) / 2)


@pytest.mark.parametrize("whiten", ["scale", "shift"])
def test_token_rewards_are_whitened_over_the_step_penalty_included(whiten: Any) -> None:
    _, table = run(Shaped(kl_coef=1.0), [A, B], shaping=ShapingConfig(whiten=whiten))
    given_rewards = [-0.5, 0.0, 2.75, 2.0]
    mean, spread = statistics.fmean(given_rewards), statistics.stdev(given_rewards)
    expected = [(r - mean) / spread + (mean if whiten == "scale" else 0) for r in given_rewards]
    acted = [
        r
        for row, mask in zip(table["advantages"].to_pylist(), (A.acted, B.acted), strict=True)
        for r, a in zip(row, mask, strict=True)
        if a
    ]
    assert acted == pytest.approx(expected, rel=1e-5)


def test_without_a_critic_values_are_zero() -> None:
    report, table = run(Reinforce(whiten_advantages=False), [A, B])
    assert table["values"].to_pylist() == [[0] * 6, [0] * 3]
    assert table["advantages"].to_pylist() == [[0, 0, 3, 3, 0, 3], [0, 0, 1]]
    assert (report.value_mean, report.explained_variance) == (0, 0)


def test_the_kl_penalty_compares_the_learners_own_log_probs_when_they_are_given() -> None:
    """The sampler's log-probs stay what they were; ratio and KL are the learner's."""
    proximal = reference([dataclasses.replace(s, reference=s.values) for s in (B, A)])
    counts, given_tables = tables([A, B], Shaped(kl_coef=1.0))
    _, table = assemble(how(Shaped(kl_coef=1.0)), [4, 5], (*counts[:4], 1), *given_tables, proximal)
    assert table["proximal_logprobs"].to_pylist() == [A.values, B.values]
    assert table["logprobs"].to_pylist() == [A.logprobs, B.logprobs]
    assert table["advantages"].to_pylist() == [[0, 0, -2.0, -1.5, 0, 3 - 2.5], [0, 0, 1 - 2.0]]


EVERY = [
    PPO(kl_coef=0.3),
    Reinforce(kl_coef=0.3),
    ReinforceBaseline(kl_coef=0.3, baseline="leave_one_out"),
    A2C(kl_coef=0.3, n_steps=2),
    RLOO(kl_coef=0.3),
    GRPO(kl_coef=0.3),
    GRPO(kl_coef=0.3, kl_in="reward"),
    ReinforcePP(kl_coef=0.3),
]


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda algorithm: algorithm.name)
def test_what_stands_at_prompt_and_environment_tokens_is_not_read(algorithm: Algorithm) -> None:
    def spoiled(column: list[float]) -> list[float]:
        return [x if a else NAN for x, a in zip(column, A.acted, strict=True)]

    bad = dataclasses.replace(A, logprobs=spoiled(A.logprobs), reference=spoiled(A.reference), values=spoiled(A.values))
    (report, table), (good, expected) = (run(algorithm, [s, B]) for s in (bad, A))
    assert report == good
    for name in ("advantages", "returns"):
        assert table[name].equals(expected[name])


def test_a_rollout_without_an_action_earns_nothing_and_disturbs_nobody() -> None:
    empty = Sample(
        sample_id=6,
        group_id=3,
        tokens=[5, 5],
        acted=[False] * 2,
        logprobs=[0, 0],
        reference=[0, 0],
        values=[0, 0],
        reward=9.0,
        finish="error",
    )
    table, without = (run(PPO(), samples)[1] for samples in ([A, B, empty], [A, B]))
    assert table["advantages"].to_pylist() == [*without["advantages"].to_pylist(), [0, 0]]
    assert table["returns"].to_pylist() == [*without["returns"].to_pylist(), [0, 0]]


@pytest.mark.parametrize(
    ("tokens", "acted", "share"),
    [
        ([[1, 7, 8, 7, 8]], [[0, 1, 1, 1, 1]], 2 / 3),  # 78 87 78
        ([[1, 7, 8], [1, 7, 8]], [[0, 1, 1], [0, 1, 1]], 1 / 2),  # 78 78: over all rollouts together
        ([[1, 7, 7, 7, 7]], [[0, 1, 1, 1, 1]], 1 / 3),
        ([[1, 7, 8, 9]], [[0, 1, 1, 1]], 1.0),
        ([[7, 8, 7, 8]], [[0, 0, 1, 1]], 1.0),  # the prompt's pair is not the policy's
        ([[7, 1, 7, 8, 7, 8]], [[0, 1, 0, 1, 0, 1]], 1.0),  # no two actions are neighbours: nothing repeats
        ([[7, 8], [7, 8]], [[1, 1], [1, 1]], 1 / 2),  # 8 7 are neighbours in memory, but in different rollouts
        # 10 02 10 and 0 65536: numbers of any size stay apart
        (
            [[1, 0, 2], [1, 0, 65_536]],
            [[1, 1, 1], [1, 1, 1]],
            3 / 4,
        ),
    ],
)
def test_distinct_2(tokens: list[list[int]], acted: list[list[int]], share: float) -> None:
    samples = [
        Sample(
            sample_id=i,
            group_id=i,
            tokens=t,
            acted=[bool(x) for x in a],
            logprobs=[0] * len(t),
            reference=[0] * len(t),
            values=[0] * len(t),
            reward=1.0,
        )
        for i, (t, a) in enumerate(zip(tokens, acted, strict=True))
    ]
    assert run(Reinforce(), samples)[0].token_distinct_2 == pytest.approx(share)


STEP = [A, B, FAILED]
KINDS = {"Rollouts": rollouts, "Scores": scores, "TokenLogprobs": reference, "TokenValues": values}


def with_tables(changed: dict[str, list[Any]], sample_ids: list[int]) -> None:
    """Assemble STEP with some of its tables replaced."""
    every = {name: changed.get(name, [build(STEP)]) for name, build in KINDS.items()}
    counts = [len(part) for part in every.values()]
    assemble(how(PPO(kl_coef=0.1)), sample_ids, (*counts, 0), *(table for part in every.values() for table in part))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_sample_is_an_error(kind: str) -> None:
    with_tables({}, [4, 5])
    with pytest.raises(AssertionError, match=rf"^{kind}: 1 of 2 samples are missing, the first is 5"):
        with_tables({kind: [KINDS[kind]([A, FAILED])]}, [4, 5])


@pytest.mark.parametrize("kind", ["Rollouts", "Scores"])
def test_no_sample_at_all_is_an_error(kind: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{kind}: 2 of 2 samples are missing"):
        with_tables({kind: []}, [4, 5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_doubled_sample_is_an_error(kind: str) -> None:
    """Two replies for one sample: a fenced worker's answer came through."""
    with pytest.raises(AssertionError, match=rf"^{kind}: samples are doubled"):
        with_tables({kind: [KINDS[kind](STEP), KINDS[kind]([B])]}, [4, 5])


def test_training_on_a_sample_twice_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"^sample_ids: samples are doubled"):
        with_tables({}, [4, 5, 5])


def test_training_on_a_sample_without_a_reward_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"^Scores: a sample without a reward"):
        with_tables({}, [4, 5, 6])


@pytest.mark.parametrize("kind", ["TokenLogprobs", "TokenValues"])
def test_a_column_of_another_length_than_the_tokens_is_an_error(kind: str) -> None:
    """Of equal length in all, so that only the rows tell."""
    moved = [
        dataclasses.replace(A, reference=[0] * 5, values=[0] * 5),
        dataclasses.replace(B, reference=[0] * 4, values=[0] * 4),
    ]
    with pytest.raises(AssertionError, match="not aligned with tokens"):
        with_tables({kind: [KINDS[kind](moved)]}, [4, 5])


def test_the_number_of_tables_must_be_what_was_announced() -> None:
    with pytest.raises(AssertionError):
        assemble(how(PPO()), [4], (1, 1, 0, 1, 0), rollouts([A]), scores([A]))


def test_writing_a_step(tmp_path: Path) -> None:
    path = tmp_path / "step=0" / "experience.parquet"
    _, table = run(PPO(kl_coef=0.1), STEP)
    assert Assembler().write(str(path), table).size == path.stat().st_size
    assert Experience.read(path).table.equals(table)
