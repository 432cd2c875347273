"""How long a run may take: operations over speed, and the calls of small models.

The exact numbers are counted by hand.
"""

from __future__ import annotations

import pytest

from actors.config import CriticConfig, LearnerConfig, ReferenceConfig, RolloutConfig, SamplingConfig
from actors.device import matrix_speed
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.reinforce import Reinforce
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig, EvaluationConfig, FinetuneConfig, ModelConfig, RewardModelConfig
from pipeline.plan.duration import START_S, Size, seconds, step

P = 100_000_000
SPEED = {"float32": 1e11, "bfloat16": 4e11}
SIZE = Size(parameters=P, layers=6, prompts=100, heldout=10, demonstrations=1000, comparisons=50, row_tokens=40.0)
CALL = 0.010  # 4 ms and one for each of six layers


def recipe(**sections: object) -> RunConfig:
    batch = BatchConfig(prompts=32, epochs=2, max_prompt_tokens=24)
    return RunConfig(
        task="walks",
        steps=10,
        batch=batch,
        sampling=SamplingConfig(max_new_tokens=40),
        algorithm=Reinforce(),
        **sections,
    )  # type: ignore[arg-type]


def test_a_step_is_2_p_a_token_to_sample_and_6_p_to_learn() -> None:
    """32 rollouts of 64 tokens: 2,048 tokens, in one slotful of 40 calls; learnt from twice, in 4
    micro-batches of 16.
    """
    found = step(recipe(), SIZE, SPEED)
    assert found["rollout"] == pytest.approx(2 * P * 2048 / 1e11 + 40 * CALL)
    assert found["learn"] == pytest.approx(6 * P * 2 * 2048 / 1e11 + 4 * 3 * CALL)
    assert found["evaluate"] == 0


def test_a_critic_doubles_learning_and_reads_once_as_the_reference_does() -> None:
    plain, both = (
        step(recipe(), SIZE, SPEED),
        step(recipe().model_copy(update={"algorithm": PPO(kl_coef=0.1)}), SIZE, SPEED),
    )
    assert both["learn"] == pytest.approx(2 * plain["learn"])
    assert both["evaluate"] == pytest.approx(2 * (2 * P * 2048 / 1e11 + CALL))


def test_each_role_computes_at_the_speed_of_its_dtype() -> None:
    config = recipe(
        rollout=RolloutConfig(dtype="bfloat16"),
        critic=CriticConfig(),
        reference=ReferenceConfig(),
        policy=LearnerConfig(dtype="bfloat16"),
    )
    found = step(config, SIZE, SPEED)
    assert found["rollout"] == pytest.approx(2 * P * 2048 / 4e11 + 40 * CALL)
    assert found["learn"] == pytest.approx(6 * P * 2 * 2048 / 4e11 + 4 * 3 * CALL)


def test_a_run_is_its_stages_each_with_its_start() -> None:
    """Three epochs of 1,000 demonstrations of 40 tokens; 50 comparisons of two replies."""
    model = ModelConfig(layers=6, context=64)
    config = recipe(
        model=model,
        finetune=FinetuneConfig(epochs=3),
        reward_model=RewardModelConfig(epochs=1),
        evaluation=EvaluationConfig(samples=2, best_of=4),
    )
    found = seconds(config, SIZE, SPEED)
    assert list(found) == ["sft", "reward", "rl", "evaluate"]
    assert found["sft"] == pytest.approx(START_S + 6 * P * 3000 * 40 / 1e11 + 188 * 3 * CALL)
    assert found["reward"] == pytest.approx(START_S + 6 * P * 100 * 40 / 1e11 + 7 * 3 * CALL)
    assert found["rl"] == pytest.approx(START_S + 10 * sum(step(config, SIZE, SPEED).values()))
    replies, rows = 10 * (2 + 4), 20
    likely = 2 * P * 2000 * 40 / 1e11 + 63 * CALL
    assert found["evaluate"] == pytest.approx(START_S + 2 * P * (replies + rows) * 64 / 1e11 + (40 + 1) * CALL + likely)


def test_the_speed_of_this_machine_is_a_number_of_operations() -> None:
    """A core of any machine of this century makes a hundred million a second, and no machine of a kind that runs tests
    10^15.
    """
    assert 1e8 < matrix_speed("float32") < 1e15
