"""What must hold of every update of a step."""

from __future__ import annotations

from typing import Any

import pytest

from actors.config import LearnerConfig
from actors.learner.learner import UpdateReport
from cluster.faults import RunError
from driver_setup import config
from pipeline.config.run_config import RunConfig
from pipeline.loop.phases import Update
from pipeline.samples.buffer import Batch


def report(**changes: Any) -> UpdateReport:
    values: dict[str, Any] = {
        "samples": 1,
        "updates": 1,
        "skipped": 0,
        "loss": 0.0,
        "grad_norm": 1.0,
        "grad_norm_max": 1.0,
        "learning_rate": 0.1,
        "statistics": {},
        "ratio_deviation": 1e-5,
        "logprob_gap": 1e-6,
        "logprob_gap_max": 1e-5,
        "action_tokens": 1,
        "seconds": 1.0,
    }
    return UpdateReport(**values | changes)


def check(run: RunConfig, policy: UpdateReport, critic: UpdateReport | None = None) -> None:
    batch = Batch(step=3, chunks=(), rollouts=(), scores=(), sample_ids=(), emptied=(), staleness=0)
    Update(batch=batch, summary=None, policy=policy, critic=critic).check(run.policy, run.rollout)  # type: ignore[arg-type]


def test_a_good_update_passes() -> None:
    check(config(), report(skipped=1), report())


@pytest.mark.parametrize("changes", [{"ratio_deviation": 0.02}, {"logprob_gap_max": 0.02}])
def test_sampler_and_learner_that_disagree_stop_the_run_in_float32_only(changes: dict[str, float]) -> None:
    """The gap alone tells where the ratio is to the learner's own log-probs, and so 1 whatever the sampler said."""
    with pytest.raises(
        RunError, match=r"policy failed during 'learning from step 3': before any update its ratio .* off by 0.02"
    ):
        check(config(), report(**changes))
    check(config().model_copy(update={"policy": LearnerConfig(dtype="bfloat16")}), report(**changes))


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_step_whose_every_gradient_was_dropped_stops_the_run(role: str) -> None:
    dropped = report(updates=0, skipped=4)
    with pytest.raises(
        RunError, match=rf"{role} failed .*every gradient of the step was not finite \(4 updates skipped\)"
    ):
        check(config(), dropped if role == "policy" else report(), dropped)
