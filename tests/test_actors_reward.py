"""The reward actor: every sample ends as a number or as a status of its own, whatever the reward function does."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.config import RewardConfig
from actors.experience import Rollouts, Scores
from actors.reward.worker import ClassifierReward, RewardReport, RewardWorker, flat_groups, load_function, load_reward
from cluster.faults import ContractError

CALLS: list[list[str]] = []


def length(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    CALLS.append(responses)
    return [float(len(response)) for response in responses]


def bonus(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [row["bonus"] + len(prompt) for prompt, row in zip(prompts, metadata, strict=True)]


def touchy(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
    """Does to a batch what its responses say."""
    for response in responses:
        if response == "raise":
            raise RuntimeError("no such\nword")
        if response == "hang":
            hang_and_swallow()
    return [
        float("nan") if r == "nan" else 1e39 if r == "huge" else None if r == "none" else float(len(r))
        for r in responses
    ]


def hang_and_swallow() -> None:
    """What a careless checker does."""
    with suppress(Exception):
        time.sleep(30)


def hang_in_the_main_thread(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    if "hang" in responses:
        hang_and_swallow()
    return whose_thread(prompts, responses, metadata)


def whose_thread(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(threading.current_thread() is threading.main_thread()) for _ in responses]


RETURNS: dict[str, Any] = {
    "one for all": [1.0],
    "one too few": [1.0, 2.0],
    "one too many": [1.0] * 4,
    "a number": 1.0,
    "nothing": None,
    "a column": np.ones((3, 1)),
    "a generator": (1.0 for _ in range(3)),
}


def wrong_length(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
    CALLS.append(responses)
    return RETURNS[responses[0]]


def verifier(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """As those of mathematics are: an alarm of its own for each answer, and whatever happens is a wrong answer."""
    values = []
    for response in responses:
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, 20)
        try:
            if response == "hang":
                time.sleep(30)
            elif response == "own alarm":
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                time.sleep(30)
            elif response == "regex":
                re.match(r"(a+)+$", "a" * 40 + "b")  # minutes, holding the interpreter
            values.append(float(len(response)))
        except:  # noqa: E722 - that is the point
            values.append(0.0)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return values


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError


def dead(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A server that takes connections and does not answer; one with "late" in it answers when it is asked for that
    alone.
    """
    CALLS.append(responses)
    if responses != ["late"]:
        time.sleep(30)
    return [1.0] * len(responses)


not_callable = 3


@pytest.fixture
def worker(tiny_model: Path) -> Callable[..., RewardWorker]:
    def make(function: str, **settings: Any) -> RewardWorker:
        return RewardWorker(
            config=RewardConfig(function=f"test_actors_reward:{function}", **settings), tokenizer_path=str(tiny_model)
        )

    return make


def rollouts(worker: RewardWorker, texts: list[tuple[str, str]], *, finish: str = "stop", metadata: str = "{}") -> Any:
    """A rollout a (prompt, response), which ends in end-of-text."""
    end = worker.tokenizer.eos_token_id
    prompts = [worker.tokenizer.encode(prompt) for prompt, _ in texts]
    responses = [[*worker.tokenizer.encode(response), end] for _, response in texts]
    return rollouts_of_tokens(list(zip(prompts, responses, strict=True)), finish=finish, metadata=metadata)


def rollouts_of_tokens(pairs: list[tuple[list[int], list[int]]], *, finish: str = "stop", metadata: str = "{}") -> Any:
    tokens = [prompt + response for prompt, response in pairs]
    columns = {
        "sample_id": [100 + row for row in range(len(pairs))],
        "group_id": list(range(len(pairs))),
        "tokens": tokens,
        "action_mask": [[False] * len(prompt) + [True] * len(response) for prompt, response in pairs],
        "logprobs": [[0.0] * len(row) for row in tokens],
        "versions": [[0] * len(row) for row in tokens],
        "turn_starts": [[len(prompt)] for prompt, _ in pairs],
        "option": [[] for _ in pairs],
        "option_logprobs": [[] for _ in pairs],
        "finish": [finish] * len(pairs),
        "metadata": [metadata] * len(pairs),
    }
    return Rollouts.of(columns).table


def score(worker: RewardWorker, responses: list[str]) -> tuple[RewardReport, dict[str, list[Any]]]:
    report, table = worker.score(rollouts(worker, [("p", response) for response in responses]), 7, 2)
    return report, Scores(table).table.to_pydict()


def test_scores_every_rollout_in_order_and_in_batches(worker: Callable[..., RewardWorker]) -> None:
    CALLS.clear()
    report, scores = score(worker("length", batch_size=2), ["a", "bb", "ccc"])
    assert CALLS == [["a", "bb"], ["ccc"]]
    assert scores == {
        "sample_id": [100, 101, 102],
        "reward": [1.0, 2.0, 3.0],
        "turn_rewards": [[], [], []],
        "status": ["ok"] * 3,
        "detail": [""] * 3,
    }
    assert (report.chunk, report.attempt, report.samples, report.ok, report.failed, report.mean, report.failures) == (
        7,
        2,
        3,
        3,
        0,
        2.0,
        {},
    )


@pytest.mark.parametrize(
    ("groups", "rewards", "flat"),
    [
        ([3, 3, 5, 5, 7], [1.0, 1.0, 0.5, 0.75, 2.0], (3, 7)),
        ([1, 2, 1, 2], [0.0, 1.0, 0.0, 2.0], (1,)),  # in any order
        ([1, 1, 2, 2], [math.nan, math.nan, 1.0, math.nan], ()),  # a failure is equal to nothing
        ([], [], ()),
    ],
)
def test_groups_whose_scores_are_all_the_same(groups: list[int], rewards: list[float], flat: tuple[int, ...]) -> None:
    assert flat_groups(groups, rewards) == flat


def test_the_report_names_groups_without_variance(worker: Callable[..., RewardWorker]) -> None:
    actor = worker("length")
    table = rollouts(actor, [("p", response) for response in ["aa", "bb", "c", "dd"]])
    table = table.set_column(1, table.schema.field("group_id"), pa.array([6, 6, 9, 9]))
    assert actor.score(table, 0, 0)[0].flat_groups == (6,)


def test_function_gets_prompt_text_and_metadata(worker: Callable[..., RewardWorker]) -> None:
    actor = worker("bonus")
    _, table = actor.score(rollouts(actor, [("four", "x")], metadata='{"bonus": 0.5}'), 0, 1)
    assert table["reward"].to_pylist() == [4.5]


def test_special_tokens_stay_in_the_prompt_and_leave_the_response(worker: Callable[..., RewardWorker]) -> None:
    actor = worker("length")
    prompts, responses = actor.texts(rollouts(actor, [("<|endoftext|>ask", " é!")]))
    assert (prompts, responses) == (["<|endoftext|>ask"], [" é!"])


def test_id_unknown_to_the_tokenizer_is_no_text(worker: Callable[..., RewardWorker]) -> None:
    actor = worker("length")
    a = actor.tokenizer.encode("a")
    _, table = actor.score(rollouts_of_tokens([(a, [*a, 261, len(actor.tokenizer), *a]), (a, [263])]), 0, 1)
    assert table["status"].to_pylist() == ["ok", "ok"]
    assert table["reward"].to_pylist() == [2.0, 0.0]


def test_only_action_tokens_after_the_first_are_the_response(worker: Callable[..., RewardWorker]) -> None:
    actor = worker("length")
    table = rollouts(actor, [("p", "axb")])
    masked = Rollouts.of({**table.to_pydict(), "action_mask": [[False, True, False, True, True]]})
    assert actor.texts(masked.table) == (["p"], ["ab"])


@pytest.mark.parametrize(
    ("poison", "status", "reason"),
    [
        ("raise", "error", "RuntimeError: no such"),
        ("hang", "timeout", "took longer than reward.timeout_s = 1 s"),
        ("nan", "error", "must return finite numbers, got nan"),
        ("huge", "error", "must return finite numbers, got 1e+39"),
        ("none", "error", "must return finite numbers, got nan"),
    ],
)
def test_one_poisoned_sample_is_charged_alone(
    worker: Callable[..., RewardWorker], poison: str, status: str, reason: str
) -> None:
    report, scores = score(worker("touchy", timeout_s=1), ["a", poison, "ccc"])
    assert scores["status"] == ["ok", status, "ok"]
    assert scores["reward"][0] == 1.0 and scores["reward"][2] == 3.0
    assert math.isnan(scores["reward"][1]), "a failure must never be a reward that counts"
    assert reason in scores["detail"][1]
    assert (report.ok, report.failed, report.mean) == (2, 1, 2.0)
    assert list(report.failures) == [101]
    assert report.failures[101].startswith(f"{status}: ")
    assert reason in report.failures[101]


@pytest.mark.parametrize("case", RETURNS)
@pytest.mark.parametrize("batch", [3, 4])
def test_another_number_of_values_is_an_error_of_the_function_at_once(
    worker: Callable[..., RewardWorker], case: str, batch: int
) -> None:
    """Not of a sample: it is called once, and not again sample by sample, where one value for one response would be
    right.
    """
    CALLS.clear()
    with pytest.raises(
        ContractError,
        match=r"^reward\.function: 'test_actors_reward:wrong_length' must return one number a response, got .* for 3 "
        r"responses",
    ):
        score(worker("wrong_length", batch_size=batch), [case, "b", "c"])
    assert [[case, "b", "c"]] == CALLS


def test_one_value_for_a_single_response_is_right(worker: Callable[..., RewardWorker]) -> None:
    assert score(worker("wrong_length"), ["one for all"])[1]["reward"] == [1.0]
    with pytest.raises(ContractError, match="got float for 1 responses"):
        score(worker("wrong_length"), ["a number"])


@pytest.mark.parametrize("poison", ["hang", "regex"])
def test_the_limit_holds_where_the_function_has_an_alarm_of_its_own(
    worker: Callable[..., RewardWorker], poison: str
) -> None:
    """And swallows the interruption: what it says after that is not a reward."""
    began = time.monotonic()
    _, scores = score(worker("verifier", timeout_s=1), ["a", poison, "own alarm"])
    assert time.monotonic() - began < 25, "it would hang for 30 s"
    assert scores["status"] == ["ok", "timeout", "ok"]
    assert scores["reward"][0] == 1.0 and math.isnan(scores["reward"][1]) and scores["reward"][2] == 0.0, (
        "its own alarm works"
    )
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 or signal.getsignal(signal.SIGALRM) is not _too_long


def test_a_function_that_nothing_can_interrupt_makes_the_process_fall_silent(
    worker: Callable[..., RewardWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds after its limit; whoever returns takes it back."""
    moments: list[float] = []
    monkeypatch.setattr(
        "actors.reward.time_limit.silent_from", lambda moment: moments.append(moment - time.monotonic())
    )
    score(worker("length", timeout_s=5), ["a"])
    assert moments == [pytest.approx(15, abs=3), math.inf]


LIMIT_S = 0.125  # a sum of such numbers is exact


@pytest.fixture
def punctual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two calls the clock says that each took exactly its limit, however late the machine ended it."""
    clock = SimpleNamespace(monotonic=lambda: LIMIT_S * len(CALLS))
    monkeypatch.setattr("actors.reward.scoring.time", clock)
    monkeypatch.setattr("actors.reward.worker.time", clock)


def test_a_function_that_never_answers_is_not_asked_about_every_sample(
    worker: Callable[..., RewardWorker], punctual: None
) -> None:
    """Once for the batch, then four times its limit; from all over the batch, and nobody waits for the call's own
    deadline.
    """
    CALLS.clear()
    texts = [f"{row:02d}" for row in range(64)]
    began = time.monotonic()
    report, scores = score(worker("dead", timeout_s=LIMIT_S), texts)
    assert time.monotonic() - began < 20, "each of them would sleep 30 s"
    assert CALLS[0] == texts
    assert CALLS[1:] == [["00"], ["32"], ["16"], ["48"]]
    assert set(scores["status"]) == {"timeout"}
    assert "was not tried alone" in scores["detail"][1] and "was not tried alone" not in scores["detail"][32]
    assert (report.failed, report.batches_split) == (64, 1)
    assert report.why_split == "a batch took longer than reward.timeout_s = 0.125 s"


def test_while_it_answers_now_and_then_it_is_asked_as_long_as_there_is_time(
    worker: Callable[..., RewardWorker], punctual: None
) -> None:
    actor = worker("dead", timeout_s=LIMIT_S)
    report, _ = score(actor, ["late", *"abcdefghi"])
    assert (report.ok, len(report.failures)) == (1, 9)
    CALLS.clear()
    began = time.monotonic()
    report, table = actor.score(
        rollouts(actor, [("p", "late"), *(("p", letter) for letter in "abcdefghi")]), 0, 1, within_s=1.0
    )
    assert time.monotonic() - began < 20
    assert len(CALLS) == 1 + 5, "the batch, and calls until half of the time is over"
    assert table["status"].to_pylist() == ["ok"] + ["timeout"] * 9


def test_a_call_returns_before_its_own_deadline_whatever_the_number_of_batches(
    worker: Callable[..., RewardWorker],
) -> None:
    actor = worker("dead", timeout_s=0.5, batch_size=1)
    letters = "abcdefghijklmnopqrstuvwxyz"  # 13 s of waiting, if nothing ended it
    began = time.monotonic()
    report, table = actor.score(rollouts(actor, [("p", letter) for letter in letters]), 0, 1, within_s=1.0)
    assert 0.9 < time.monotonic() - began < 10
    assert report.failed == 26
    assert table["detail"].to_pylist()[-1] == "was not tried: 1 s of scoring its chunk were over"


def test_samples_are_left_out_on_request_and_are_no_failures(worker: Callable[..., RewardWorker]) -> None:
    CALLS.clear()
    actor = worker("length")
    report, table = actor.score(
        rollouts(actor, [("p", response) for response in ["a", "bb", "ccc"]]), 0, 1, without={101}
    )
    assert CALLS == [["a", "ccc"]]
    assert table["status"].to_pylist() == ["ok", "error", "ok"]
    assert math.isnan(table["reward"].to_pylist()[1])
    assert report.failures == {}


def test_failed_rollout_never_reaches_the_function(worker: Callable[..., RewardWorker]) -> None:
    CALLS.clear()
    actor = worker("length")
    report, table = actor.score(rollouts(actor, [("p", "x")], finish="error"), 0, 1)
    assert CALLS == []
    assert table["status"].to_pylist() == ["error"]
    assert report.ok == 0 and math.isnan(report.mean)


def test_no_rollouts_make_no_scores(worker: Callable[..., RewardWorker]) -> None:
    report, table = worker("length").score(Rollouts.schema.empty_table(), 0, 1)
    assert (report.samples, table.num_rows) == (0, 0)


def test_time_limit_leaves_the_alarm_of_others_running(worker: Callable[..., RewardWorker]) -> None:
    actor, fired = worker("length", timeout_s=5), []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(True))
    previous = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        score(actor, ["a"])
        time.sleep(0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *previous)
        signal.signal(signal.SIGALRM, before)
    assert fired == [True]


def test_outside_the_main_thread_the_function_runs_without_a_limit(worker: Callable[..., RewardWorker]) -> None:
    actor, found = worker("whose_thread"), []
    thread = threading.Thread(target=lambda: found.append(score(actor, ["a"])[1]))
    thread.start()
    thread.join(60)
    assert found[0]["reward"] == [0.0] and found[0]["status"] == ["ok"]


@pytest.mark.slow
def test_ray_runs_actor_methods_in_the_main_thread_where_a_hang_can_be_ended(
    ray_session: object, tiny_model: Path
) -> None:
    import ray

    config = RewardConfig(function="test_actors_reward:hang_in_the_main_thread", timeout_s=0.5)
    local = RewardWorker(config=config, tokenizer_path=str(tiny_model))
    actor: Any = ray.remote(RewardWorker).options(num_cpus=0).remote(config=config, tokenizer_path=str(tiny_model))
    report, scores = ray.get(actor.score.remote(rollouts(local, [("p", "a"), ("p", "hang")]), 0, 1), timeout=600)
    ray.kill(actor)
    assert scores["status"].to_pylist() == ["ok", "timeout"]
    assert scores["reward"].to_pylist()[0] == 1.0, "the main thread"
    assert report.seconds < 25


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("length", "must be package.module:name"),
        ("no_such_package.rewards:f", "No module named 'no_such_package'"),
        ("test_actors_reward:nothing", "no such name in the module"),
        ("test_actors_reward:not_callable", "must be callable, got 'test_actors_reward:not_callable': of type int"),
    ],
)
def test_function_that_cannot_be_had_is_named(path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r"reward\.function: must be") as raised:
        load_function(path)
    assert problem in str(raised.value)
    assert path in str(raised.value)


def test_config_must_name_exactly_one_source() -> None:
    assert load_reward(RewardConfig(function="test_actors_reward:length")) is length
    with pytest.raises(ValueError, match="must name a function or a model, got neither"):
        load_reward(RewardConfig())
    with pytest.raises(ValueError, match="got both"):
        load_reward(RewardConfig(function="a:b", model="c"))


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random sequence classifier with the tiny model's tokenizer."""

    def make(labels: int = 1, *, pad: bool = True) -> Path:
        import torch
        from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("classifier")
        config = GPT2Config(vocab_size=264, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)
        config.num_labels = labels
        GPT2ForSequenceClassification(config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        if not pad:
            tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("pad", [True, False], ids=["pad token", "no pad token"])
def test_classifier_scores_prompt_and_response_whatever_their_company(
    tiny_model: Path, classifier: Callable[..., Path], pad: bool
) -> None:
    import torch

    folder = classifier(pad=pad)
    reward = ClassifierReward(str(folder))
    alone = [reward(["ab"], [text], [{}])[0] for text in ("c", "defghi", "")]
    together = reward(["ab"] * 3, ["c", "defghi", ""], [{}] * 3)
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    ids = torch.tensor([reward.tokenizer.encode("abdefghi")])
    with torch.inference_mode():
        hidden = reward.model.transformer(ids).last_hidden_state[0, -1]
        np.testing.assert_allclose(alone[1], reward.model.score(hidden).item(), rtol=1e-4)
    worker = RewardWorker(config=RewardConfig(model=str(folder), batch_size=2), tokenizer_path=str(tiny_model))
    _, table = worker.score(rollouts(worker, [("ab", "c"), ("ab", "defghi"), ("ab", "")]), 0, 1)
    np.testing.assert_allclose(table["reward"].to_numpy(), alone, rtol=1e-4)


def test_classifier_reads_the_end_of_a_text_longer_than_its_context(classifier: Callable[..., Path]) -> None:
    reward = ClassifierReward(str(classifier()))
    text = "abcdefghijklmnopqrstuvwxyz"
    assert reward([text], ["!"], [{}]) == pytest.approx(reward([""], [(text + "!")[-16:]], [{}]), rel=1e-5)


def test_classifier_with_several_labels_or_none_at_all_is_refused(
    classifier: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"reward\.model: must have one output, got 3 labels"):
        ClassifierReward(str(classifier(3)))
    with pytest.raises(ValueError, match=r"reward\.model: must be a folder or hub name of a sequence classifier"):
        ClassifierReward(str(tmp_path))


def test_one_of_several_outputs_is_the_reward_where_it_is_named(
    classifier: Callable[..., Path], tiny_model: Path
) -> None:
    import torch

    folder = str(classifier(3))
    reward = ClassifierReward(folder, label=2)
    ids = reward.tokenizer("abc", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = reward.model(input_ids=ids).logits[0].tolist()
    assert reward(["ab"], ["c"], [{}]) == pytest.approx([logits[2]], rel=1e-5)
    assert len(set(logits)) == 3
    worker = RewardWorker(config=RewardConfig(model=folder, label=2), tokenizer_path=str(tiny_model))
    assert worker.function(["ab"], ["c"], [{}]) == pytest.approx([logits[2]], rel=1e-5)
    with pytest.raises(ValueError, match=r"reward\.label: must be below the number of outputs of .*, 3, got 3"):
        ClassifierReward(folder, label=3)


@pytest.fixture
def bert(tmp_path: Path) -> Callable[..., Path]:
    """A one-label BERT with a tokenizer that knows only those special tokens that it is given."""

    def make(**special: str) -> Path:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
        )
        config.num_labels = 1
        BertForSequenceClassification(config).save_pretrained(tmp_path)
        tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(tmp_path)
        return tmp_path

    return make


def test_classifier_needs_no_end_of_text(bert: Callable[..., Path]) -> None:
    reward = ClassifierReward(str(bert(pad_token="[PAD]")))
    assert reward.tokenizer.eos_token is None
    good, bad = reward(["good "], ["good"], [{}])[0], reward([""], ["bad"], [{}])[0]
    assert good != bad
    np.testing.assert_allclose(reward(["good ", ""], ["good", "bad"], [{}] * 2), [good, bad], rtol=1e-4)


def test_classifier_that_cannot_pad_is_refused(bert: Callable[..., Path]) -> None:
    with pytest.raises(
        ValueError,
        match=r"reward\.model: must have a tokenizer with a padding token, got none in .*; set pad_token in its "
        r"tokenizer_config",
    ):
        ClassifierReward(str(bert()))


def test_classifier_without_a_tokenizer_is_refused(bert: Callable[..., Path]) -> None:
    folder = bert()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"reward\.model: must have its tokenizer beside it, got "):
        ClassifierReward(str(folder))


def test_classifier_gets_the_device_of_its_role(bert: Callable[..., Path]) -> None:
    import torch

    folder = str(bert(pad_token="[PAD]"))
    reward = load_reward(RewardConfig(model=folder))
    assert isinstance(reward, ClassifierReward) and reward.model.device.type == "cpu"
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"gpus: must be 0 where torch sees no GPU, got 0\.5"):
        load_reward(RewardConfig(model=folder, gpus=0.5))
