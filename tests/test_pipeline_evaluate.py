"""`raylign evaluate`: the examiner in this process, and two tiny models compared through the real entry point."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from actors import ragged
from actors.config import ReferenceConfig, RewardConfig, RolloutConfig, SamplingConfig
from actors.experience import Prompts, Rollouts, Scores, TokenLogprobs
from actors.manager.option_head import save_head
from cluster.config import ClusterConfig
from cluster.session import Session
from data_files import write
from fakes import DeadlyExaminer
from pipeline.arguments.parsing import parse
from pipeline.cli import main
from pipeline.config.recipe import load, recipe_path
from pipeline.config.sections import EvaluationConfig
from pipeline.data.config import DataConfig
from pipeline.data.files import Files
from pipeline.data.registry import load_task
from pipeline.evaluation.evaluate import (
    MODEL,
    RULE,
    ask,
    check_judges,
    check_questions,
    evaluate,
    heldout_groups,
    judges_of,
)
from pipeline.evaluation.examiner import Examiner
from pipeline.evaluation.results import Answers, Evaluation, Measurements, assess
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.observe.progress import Progress
from pipeline.plan.comparison import Comparison
from pipeline.plan.preflight import check_heads, check_models
from pipeline.tasks.task import Demonstration, Split, Task
from pipeline.tasks.walks import RandomWalks
from run_helpers import ROOT, command, environment
from tiny_models import byte_tokenizer, save_gpt2

HERE, TESTS = Path(__file__).stem, ROOT / "tests"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that differ in their weights, and a reward model, in the folders `policy`, `baseline`, `judge`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("baseline", "policy")):
        save_gpt2(folder / name, seed=seed)
    save_judge(folder / "judge")
    return folder


def save_judge(folder: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from tiny_models import WORDS, byte_tokenizer

    torch.manual_seed(5)
    shape = GPT2Config(vocab_size=WORDS, n_positions=96, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=256)
    GPT2ForSequenceClassification(shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


class Letters(RandomWalks):
    """Prompts and demonstrations in letters that a byte tokenizer knows; few, so that examining them is quick."""

    reward = f"{HERE}:vowels"
    measures: ClassVar[dict[str, str]] = {"short replies": f"{HERE}:short"}

    def demonstrations(self, split: Split) -> list[Demonstration]:
        return super().demonstrations(split)[:20]


class Wordless(RandomWalks):
    """A task that has nothing to imitate."""

    def demonstrations(self, split: Split) -> list[Demonstration]:
        return []


def vowels(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [sum(letter in "aeiou" for letter in response.lower()) / max(len(response), 1) for response in responses]


def short(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(len(response) < 8) for response in responses]


# ---- the examiner, a plain class ----


def examiner(temperature: float = 1.0) -> Examiner:
    sampling = SamplingConfig(max_new_tokens=6, temperature=temperature)
    return Examiner(rollout=RolloutConfig(slots=8), reference=ReferenceConfig(batch_size=4), sampling=sampling, seed=0)


def prompts(*texts: str) -> pa.Table:
    return Prompts.of(
        {
            "group_id": range(100, 100 + len(texts)),
            "tokens": [list(t.encode()) for t in texts],
            "metadata": ["{}"] * len(texts),
        }
    ).table


def test_the_examiner_is_sampler_reference_and_judge_in_one(models: Path) -> None:
    """Its log-probs are those of a plain forward pass, whichever model it held before."""
    one, policy, baseline = examiner(), str(models / "policy"), str(models / "baseline")
    rows, replies = one.reply(policy, prompts("ab", "c"), 3)
    assert rows == 6
    for model in (baseline, policy):
        _, found = one.logprobs(model, replies, 1.0)
        causal = AutoModelForCausalLM.from_pretrained(model)
        for row, got in zip(replies.to_pylist(), TokenLogprobs(found).table["logprobs"].to_pylist(), strict=True):
            with torch.no_grad():
                forward = torch.log_softmax(causal(torch.tensor([row["tokens"]])).logits[0, :-1], -1)
            expected = forward.gather(-1, torch.tensor(row["tokens"])[1:, None]).squeeze(-1).numpy()
            acted = np.array(row["action_mask"])[1:]
            assert np.array(got)[1:][acted] == pytest.approx(expected[acted], abs=1e-4)
    sampled, recomputed = (ragged.flat(table["logprobs"])[0] for table in (replies, found))
    assert sampled == pytest.approx(recomputed, abs=1e-4), "the policy's own, as it sampled them"
    for judge in (RewardConfig(function=f"{HERE}:vowels"), RewardConfig(model=str(models / "judge"))):
        _, scores = one.score(judge, baseline, replies)
        assert np.isfinite(Scores(scores).table["reward"].to_numpy()).all()


def test_what_an_examiner_did_before_changes_nothing(models: Path) -> None:
    policy, baseline = str(models / "policy"), str(models / "baseline")
    one = examiner()
    for model in (baseline, policy, baseline):
        one.reply(model, prompts("x"), 1)
    assert one.reply(policy, prompts("ab", "c"), 2)[1].equals(examiner().reply(policy, prompts("ab", "c"), 2)[1])
    both = one.reply(policy, prompts("ab", "c"), 2)[1]
    assert Rollouts(both.slice(0, 2)).table.equals(examiner().reply(policy, prompts("ab"), 2)[1]), (
        "nor does how prompts are cut into chunks"
    )


@pytest.mark.parametrize(
    ("temperature", "samples", "pool"), [(1.0, 3, 3), (0.0, 1, 4)], ids=["the same random numbers", "greedy"]
)
def test_a_model_against_itself_ties_always(models: Path, temperature: float, samples: int, pool: int) -> None:
    one, model = examiner(temperature), str(models / "baseline")
    sides = []
    for count in (samples, pool):
        table = one.reply(model, prompts("ab", "c", "d"), count)[1]
        shape = (3, count)
        rewards = (
            Scores(one.score(RewardConfig(function=f"{HERE}:vowels"), model, table)[1])
            .table["reward"]
            .to_numpy()
            .astype(np.float64)
        )
        lengths = ragged.lengths(table["tokens"]).reshape(shape)
        sides.append(
            Answers(
                texts=["x"] * len(rewards),
                tokens=lengths,
                ended=np.ones(shape, np.bool_),
                rewards={RULE: rewards.reshape(shape)},
            )
        )
    found = assess(
        Measurements(
            prompts=["1", "2", "3"], policy=sides[0], baseline=sides[1], kl=np.zeros((3, samples)), likelihood=None
        ),
        policy="a",
        baseline="a",
        best_of_n=pool,
        seed=0,
    )
    for value, expected in ((found.optimised.gain, 0.0), (found.optimised.win_rate, 0.5)):
        assert (value.low, value.mean, value.high) == pytest.approx((expected,) * 3, abs=1e-12)


def test_what_is_left_out_on_request_changes_nothing_else(models: Path) -> None:
    one, model = examiner(), str(models / "policy")
    whole = one.reply(model, prompts("ab", "c", "d"), 2)[1]
    without_c = Rollouts(whole).without([202, 203]).table
    assert one.reply(model, prompts("ab", "c", "d"), 2, without=[101])[1].equals(without_c)
    assert one.reply(model, prompts("ab"), 2, without=[100])[0] == 0
    assert one.logprobs(model, whole, 1.0, without=whole["sample_id"].to_pylist())[0] == 0
    assert one.logprobs(model, whole[:0], 1.0)[0] == 0
    assert one.score(RewardConfig(function=f"{HERE}:vowels"), model, whole[:0])[0] == 0


# ---- what is asked, and who judges ----


def test_heldout_groups_are_one_pass_beyond_any_run() -> None:
    assert heldout_groups(5, 20)[0] % 20 == 0
    assert heldout_groups(5, 20)[0] >= 1 << 40
    assert len(heldout_groups(99, 20)) == 20


def test_the_reward_model_is_the_first_judge_and_the_rule_the_second() -> None:
    assert list(judges_of(RewardConfig(model="rm"), "tasks:rule")) == [MODEL, RULE]
    assert list(judges_of(RewardConfig(function="my:own"), "tasks:rule").items()) == [
        (RULE, RewardConfig(function="my:own"))
    ]
    assert list(judges_of(RewardConfig(model="rm"), "")) == [MODEL]
    both = judges_of(RewardConfig(function="my:own", model="rm"), "tasks:rule")
    assert (both[MODEL].function, both[MODEL].model, both[RULE].function, both[RULE].model) == ("", "rm", "my:own", "")
    with pytest.raises(
        ValueError,
        match="reward: must name a function or a model where the task brings no reward function, got neither",
    ):
        check_judges(judges_of(RewardConfig(), ""))


def test_demonstrations_are_the_same_ones_every_time_and_need_not_be_there(models: Path) -> None:
    recipe = load(recipe_path("walks"))
    few = recipe.evaluation.model_copy(update={"demonstrations": 7, "prompts": 3})
    settings = EvaluationSettings.of(load_task("walks"), few, recipe)
    found, again = (ask(settings, str(models / "baseline")) for _ in range(2))
    assert (found.demonstrations.num_rows, len(found.prompts), found.excluded) == (7, 3, 0)
    assert found.demonstrations.equals(again.demonstrations)
    assert found.lacking == ""


def prompts_alone(tmp_path: Path) -> Files:
    return Files(
        DataConfig(prompts=write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {number}:"} for number in range(30)]))
    )


class Unprompted(RandomWalks):
    """Demonstrations that answer nothing."""

    def demonstrations(self, split: Split) -> list[Demonstration]:
        return [Demonstration(prompt="", response="a")]


class Torn(RandomWalks):
    def demonstrations(self, split: Split) -> list[Demonstration]:
        return [Demonstration(prompt="a", response=str(1 / 0))]


@pytest.mark.parametrize(
    ("task", "most", "excluded", "lacking"),
    [
        (lambda folder: Wordless(), 7, 0, "there are no held-out demonstrations"),
        (prompts_alone, 7, 0, "there are no held-out demonstrations"),
        (lambda folder: RandomWalks(), 0, 0, "evaluation.demonstrations is 0"),
        (
            lambda folder: Unprompted(),
            7,
            1,
            "none of 1 held-out demonstrations has a prompt and fits the model's context",
        ),
    ],
)
def test_what_there_is_no_perplexity_for_is_said(
    task: Callable[[Path], Task], most: int, excluded: int, lacking: str, models: Path, tmp_path: Path
) -> None:
    recipe = load(recipe_path("walks"))
    batch = recipe.batch.model_copy(update={"max_prompt_tokens": 16})
    evaluation = recipe.evaluation.model_copy(update={"demonstrations": most, "prompts": 2})
    settings = EvaluationSettings.of(task(tmp_path), evaluation, recipe.model_copy(update={"batch": batch}))
    found = ask(settings, str(models / "baseline"))
    assert (found.demonstrations.num_rows, len(found.prompts), found.excluded, found.lacking) == (
        0,
        2,
        excluded,
        lacking,
    )


def test_demonstrations_that_cannot_be_had_are_told_before_anything_is_trained(models: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"task: demonstrations\('heldout'\) of 'walks' must give a list of Demonstration, but it raised "
        r"ZeroDivisionError",
    ):
        check_questions(Torn(), EvaluationConfig(), str(models / "baseline"), byte_tokenizer())


def test_what_is_asked_fits_both_models(models: Path, tmp_path: Path) -> None:
    """A policy of 10 positions: prompts of 1 token and 9 new ones fit, longer demonstrations do not; one of 9 takes no
    prompt.
    """
    recipe, long = load(recipe_path("walks")), str(models / "baseline")
    walks = EvaluationSettings.of(load_task("walks"), recipe.evaluation, recipe)
    short, shorter = (str(save_gpt2(tmp_path / str(context), context=context)) for context in (10, 9))
    both = ask(walks, long, short)
    lengths = [len(row) for row in both.demonstrations["tokens"].to_pylist()]
    assert both.excluded > 0 and max(lengths) <= 10
    assert len(lengths) + both.excluded == ask(walks, long).demonstrations.num_rows
    with pytest.raises(
        ValueError, match=r"prompt 0 must leave room for 9 new tokens in the model's context of 9, got 1 prompt tokens"
    ):
        ask(walks, long, shorter)


# ---- what kills an examiner ----


@pytest.mark.slow
def test_what_kills_its_examiner_is_left_out_on_both_sides_and_said_and_the_rest_is_as_without_it(
    models: Path, ray_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(recipe_path("walks"))
    config = recipe.model_copy(
        update={
            "task": f"{HERE}:Letters",
            "batch": recipe.batch.model_copy(update={"max_prompt_tokens": 4}),
            "sampling": SamplingConfig(max_new_tokens=8),
            "rollout": RolloutConfig(slots=8),
            "evaluation": EvaluationConfig(prompts=12, samples=2, best_of=16),
            "cluster": ClusterConfig(cpus_per_bundle=1, max_attempts=1, max_replacements=1),
        }
    )

    def evaluation(workers: int) -> Evaluation:
        sized = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"workers": workers})})
        with Progress(Console(file=io.StringIO())) as progress:
            return evaluate(
                EvaluationSettings.of(load_task(sized.task), sized.evaluation, sized),
                ray_session,
                tmp_path,
                progress,
                policy=str(models / "policy"),
                baseline=str(models / "baseline"),
                judges=judges_of(RewardConfig(), f"{HERE}:vowels"),
            )

    whole = evaluation(1)
    monkeypatch.setattr("pipeline.evaluation.evaluate.Examiner", DeadlyExaminer)
    assert heldout_groups(12, 20)[0] == DeadlyExaminer.FIRST
    found = evaluation(2)
    assert found.lacking == (
        "2 of 12 held-out prompts (the first killed its worker: replies of the policy)",
        "1 of 20 held-out demonstrations (the first killed its worker: perplexity)",
    )
    kept = [prompt for prompt in range(12) if prompt not in (10, 11)]
    assert found.replies == [whole.replies[prompt] for prompt in kept]
    for side in ("policy", "baseline"):
        assert found.rewards[RULE][side] == [whole.rewards[RULE][side][prompt] for prompt in kept]
    assert (found.demonstrations, whole.demonstrations, found.judges[RULE].failed) == (19, 20, 0)


# ---- the command ----


def comparison(run_dir: Path | None = None, **names: Any) -> Comparison:
    named = {"policy": "", "baseline": "", "reward_model": "", "out": None} | names
    return Comparison.of(load(recipe_path("walks")), run_dir, recipe="walks", **named)


def test_of_a_run_its_own_models_are_compared(tmp_path: Path) -> None:
    for name in ("policy", "finetuned", "reward-model", "evaluation-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "evaluation-1" / "evaluation.json").touch()
    (tmp_path / "evaluation-2" / "log").mkdir(parents=True)  # of one that was stopped
    found = comparison(tmp_path)
    assert (found.policy, found.baseline, found.reward_model) == tuple(
        str(tmp_path / name) for name in ("policy", "finetuned", "reward-model")
    )
    assert found.out == tmp_path / "evaluation-2"
    other = comparison(tmp_path, policy="gpt2", out=tmp_path / "here")
    assert (other.policy, other.baseline, other.out) == ("gpt2", str(tmp_path / "finetuned"), tmp_path / "here")


def refused(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        make()
    assert message in str(caught.value)


def test_what_is_wrong_is_said_before_anything_starts(models: Path, tmp_path: Path) -> None:
    refused(
        "TARGET: `raylign evaluate` needs one, the folder of a run or a recipe",
        lambda: parse(["evaluate", "--policy", "x"]),
    )
    refused(
        f"TARGET: must be the folder of a run or a recipe, got {tmp_path}, a folder without config.toml",
        lambda: parse(["evaluate", str(tmp_path)]),
    )
    refused("--policy: must be given, since a recipe has none", lambda: parse(["evaluate", "walks", "--baseline", "x"]))
    refused(f"--baseline: must be given, since {tmp_path} has none yet", lambda: comparison(tmp_path, policy="x"))
    refused(
        f"--out: must be a new or empty folder, got {models}", lambda: comparison(policy="x", baseline="y", out=models)
    )
    torn = comparison(policy=str(models / "policy"), baseline=str(tmp_path / "none"))
    refused("--baseline: must be a folder or hub name of a causal language model, got", lambda: check_models(torn))
    stranger = tmp_path / "stranger"
    save_gpt2(stranger)
    RandomWalks().build_tokenizer(stranger, 64)
    refused(
        "--policy: must have the tokenizer of --baseline, but those of",
        lambda: check_models(comparison(policy=str(stranger), baseline=str(models / "policy"))),
    )


def test_a_policy_whose_manager_is_lost_is_refused_before_anything_starts(models: Path, tmp_path: Path) -> None:
    config, policy = load(recipe_path("conversation-options")), tmp_path / "policy"
    shutil.copytree(models / "policy", policy)
    named = comparison(policy=str(policy), baseline=str(models / "policy"), out=tmp_path / "out")
    check_heads(config, named)  # neither was trained with a manager
    save_head(policy, {"policy_weight": np.ones((6, 32), np.float32), "policy_bias": np.ones(6, np.float32)})
    check_heads(config, named)
    (policy / "option-head.safetensors").unlink()
    refused(f"{policy}: must be a folder with the manager's head", lambda: check_heads(config, named))
    check_heads(load(recipe_path("conversation")), named)


@pytest.mark.slow
def test_two_models_from_end_to_end_with_one_examiner_and_with_two(
    models: Path, ray_session: Session, tmp_path: Path
) -> None:
    recipe = tmp_path / "letters.toml"
    recipe.write_text(
        f'task = "{HERE}:Letters"\nsteps = 1\nmodel.path = "{models / "baseline"}"\nbatch.max_prompt_tokens = '
        "4\nsampling.max_new_tokens = 8\n"
        "[rollout]\nslots = 8\nchunk_size = 8\n[evaluation]\nprompts = 20\nsamples = 2\nbest_of = 4\nshown = "
        "2\n[cluster]\ncpus_per_bundle = 1\n"
    )
    told = []
    for workers in ("1", "2"):
        out = tmp_path / f"out-{workers}"
        options = (
            "--policy",
            str(models / "policy"),
            "--reward-model",
            str(models / "judge"),
            "--evaluation.workers",
            workers,
            "--out",
            str(out),
        )
        if workers == "1":  # through the real entry point, with a Ray of its own
            done = subprocess.run(
                command("evaluate", str(recipe), *options),
                cwd=TESTS,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
        else:
            assert main(["evaluate", str(recipe), *options]) == 0
        told.append((out / "evaluation.json").read_bytes())
    assert told[0] == told[1]
    found = json.loads(told[0])
    assert list(found["judges"]) == [MODEL, RULE]
    assert found["kl"]["low"] > 0
    assert 0 <= found["judges"][RULE]["win_rate"]["mean"] <= 1
    assert (found["prompts"], found["demonstrations"], len(found["best_of"]["kl"])) == (20, 20, 4)
    assert found["best_of"]["matched"][MODEL]["is_bound"], "two random models are further apart than best-of-4 goes"
    assert found["rewards"][RULE]["policy"] != found["rewards"][MODEL]["policy"]
    shares = found["measures"]["short replies"]
    assert 0 < shares["policy"]["mean"] < 1 and 0 < shares["baseline"]["mean"] < 1
    assert math.isfinite(found["tax"]["mean"])
    report = (out / "report.md").read_text()
    for said in (
        "win rate by the rule",
        "## Best-of-n, the yardstick",
        "![reward against KL](frontier.png)",
        "## Replies",
    ):
        assert said in report
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "frontier.png").stat().st_size < 100_000
    for said in (
        "evaluate 4/4",
        "20 held-out prompts",
        "KL to the baseline",
        "95 % interval",
        f"saved in {tmp_path / 'out-1'}",
    ):
        assert said in done.stdout, done.stdout
