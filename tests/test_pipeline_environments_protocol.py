"""Environments as such: what they are checked for, how conversations become one, and how they are loaded."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from actors.config import MODEL_PARTNER
from pipeline.environments import lockstep
from pipeline.environments.checks import CheckedEnvironment, check_turn
from pipeline.environments.environment import Environment, Turn
from pipeline.environments.lockstep import Lockstep
from pipeline.environments.model_partner import PartnerSpec
from pipeline.environments.registry import ENVIRONMENTS, load_environment, load_partner
from pipeline.tasks.task import PromptText


def prompt(text: str = "Hello", **metadata: Any) -> PromptText:
    return PromptText(text=text, metadata=metadata)


class Echo:
    """Says every reply again, and a number of its own; over after three replies. Faulty replies name their fault."""

    closed: list[Echo] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replies = 0

    def begin(self, prompt: PromptText, seed: int) -> Turn:
        self.random = Random(seed)
        if prompt.text == "broken":
            raise OSError("no connection")
        return Turn(text=f"{prompt.text} {self.random.random():.6f}")

    def answer(self, reply: str) -> Turn:
        self.replies += 1
        if reply == "raise":
            raise RuntimeError("it broke")
        if reply == "exit":
            sys.exit(3)
        if reply == "wait":
            time.sleep(5.0)
        return Turn(text=f"{reply} {self.random.random():.6f}", reward=float(len(reply)), terminated=self.replies == 3)

    def close(self) -> None:
        Echo.closed.append(self)


class ThreadEcho(Echo):
    """Tells in which thread it answers."""

    def answer(self, reply: str) -> Turn:
        return Turn(text=threading.current_thread().name)


def echoes() -> Lockstep:
    return Lockstep(Echo)


class Answering:
    """An environment that gives back whatever it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def reset(self, prompts: Sequence[PromptText], seeds: Sequence[int]) -> Any:
        return self.answer

    def step(self, episodes: Sequence[Any], replies: Sequence[str]) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self, episodes: Sequence[Any]) -> None: ...


# --- conversations in lockstep ---


def test_a_conversation_is_the_same_alone_among_others_and_in_any_order() -> None:
    together = Lockstep(Echo)
    episodes, turns = together.reset([prompt("a"), prompt("b"), prompt("c")], [1, 2, 3])
    one = together.step(episodes, ["x", "y", "z"])
    two = together.step([episodes[2], episodes[0]], ["z2", "x2"])

    alone = Lockstep(Echo, timeout_s=60)
    alone.reset([prompt("other")], [9])
    [episode], [turn] = alone.reset([prompt("c")], [3])
    assert turn == turns[2]
    assert alone.step([episode], ["z"]) == [one[2]]
    assert alone.step([episode], ["z2"]) == [two[0]]
    assert isinstance(alone, Environment)


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_what_a_conversation_raises_is_its_own_failure(timeout_s: float | None) -> None:
    environment = Lockstep(Echo, timeout_s)
    episodes, first = environment.reset([prompt(), prompt("broken"), prompt(), prompt()], [0] * 4)
    assert [turn.over for turn in first] == [False, True, False, False]
    assert first[1].failure.startswith("error: OSError: no connection")
    left = [episodes[0], episodes[2], episodes[3]]
    turns = environment.step(left, ["raise", "fine", "exit"])
    assert turns[0].failure.startswith("error: RuntimeError: it broke") and turns[0].over
    assert (turns[1].reward, turns[1].over) == (4.0, False)
    assert turns[2].failure.startswith("error: SystemExit: 3")
    with pytest.raises(ValueError, match="must not be over, got one that is at place 0"):
        environment.step([episodes[0]], ["again"])


def test_a_slow_conversation_times_out_and_costs_the_others_nothing() -> None:
    environment = Lockstep(Echo, timeout_s=1)
    Echo.closed.clear()
    episodes, _ = environment.reset([prompt(), prompt()], [0, 0])
    started = time.monotonic()
    slow, quick = environment.step(episodes, ["wait", "now"])
    assert time.monotonic() - started < 4.5
    assert slow.failure == "timeout: no answer within 1 s" and slow.reward == 0
    assert quick.reward == 3.0 and not quick.over
    environment.close(episodes)
    assert Echo.closed == [episodes[1].conversation]  # the other one is busy
    deadline = time.monotonic() + 30
    while len(Echo.closed) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Echo.closed[1:] == [episodes[0].conversation]  # closed once it had answered, and only once


def test_without_a_deadline_there_are_no_threads() -> None:
    environment = Lockstep(ThreadEcho)
    episodes, _ = environment.reset([prompt()], [0])
    assert environment.step(episodes, [""])[0].text == threading.current_thread().name
    with pytest.raises(ValueError, match="timeout_s: must be above 0, got 0"):
        Lockstep(Echo, timeout_s=0)


def test_conversations_are_closed_once_however_they_ended() -> None:
    environment = Lockstep(Echo)
    Echo.closed.clear()
    episodes, _ = environment.reset([prompt()] * 3, [0, 1, 2])
    for _ in range(3):
        assert not environment.step(episodes[:1], ["x"])[0].failure
    environment.step(episodes[1:2], ["raise"])
    environment.close(episodes)
    environment.close(episodes)
    assert Echo.closed == [episode.conversation for episode in episodes]


def test_a_conversation_that_cannot_be_closed_leaves_none_of_the_others_open(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Echo):
        def close(self) -> None:
            super().close()
            raise OSError("the door is stuck")

    environment = Lockstep(Stuck)
    Echo.closed.clear()
    episodes, _ = environment.reset([prompt()] * 3, [0, 1, 2])
    environment.close(episodes)
    assert Echo.closed == [episode.conversation for episode in episodes]
    assert caplog.text.count("a conversation could not be closed: OSError: the door is stuck") == 3


def test_who_is_given_up_before_it_answers_does_not_wait_for_ever() -> None:
    environment = Lockstep(Echo)
    [episode], _ = environment.reset([prompt()], [0])
    environment.close([episode])
    assert episode.take(lambda: Turn(text="late")).failure == "error: given up before it began"


# --- checks ---


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        ("Hello", "must be a Turn, got 'Hello'; make it by Turn\\(text, reward"),
        (Turn(text=b"x"), "text must be a string that UTF-8 can write, got b'x'"),  # type: ignore[arg-type]
        (Turn(reward=math.nan), "reward must be a finite number; .* got nan"),
        (Turn(reward=True), "reward must be a finite number"),
        (Turn(reward=None), "reward must be a finite number"),  # type: ignore[arg-type]
        (Turn(terminated=1), "terminated must be True or False, got 1"),  # type: ignore[arg-type]
        (Turn(terminated=True, truncated=True), "truncated must be False where terminated is True"),
        (Turn(options=["a"]), "options must be a tuple of different names, got \\['a'\\]"),  # type: ignore[arg-type]
        (Turn(options=("a", "a")), "options must be a tuple of different names"),
        (Turn(info={"x": object()}), "info must be a dict of JSON values"),
        (Turn(info={1: 2}), "info must be a dict of JSON values with strings as keys"),  # type: ignore[dict-item]
        (Turn(failure="lost", reward=1.0), "reward must be 0 in a turn that failed, got 1.0"),
    ],
)
def test_a_faulty_turn_is_refused(turn: object, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {fault}"):
        check_turn(turn, "here")


@pytest.mark.parametrize(
    "turn",
    [
        Turn(),
        Turn(text="x", reward=-1.5, terminated=True, options=("a", "b"), info={"a": [1, None, {"b": "c"}]}),
        Turn(failure="lost"),
        Turn(reward=2, truncated=True),
    ],
)
def test_a_proper_turn_passes(turn: Turn) -> None:
    check_turn(turn, "here")


def test_no_reward_and_no_end_before_the_first_reply() -> None:
    with pytest.raises(ValueError, match="reward must be 0 before the first reply, got 1"):
        check_turn(Turn(reward=1.0), "here", first=True)
    with pytest.raises(ValueError, match="terminated must be False before the first reply"):
        check_turn(Turn(truncated=True), "here", first=True)
    check_turn(Turn(failure="lost"), "here", first=True)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (None, "reset must return two lists, episodes and turns, got None"),
        (([1], [Turn(), Turn()]), "reset must return a list of 2 episodes, one a conversation, got 1"),
        (([1, 2], [Turn()]), "reset must return a list of 2 turns, one a conversation, got 1"),
        (([1, 2], [Turn(), "x"]), "turn 1 of reset: must be a Turn, got 'x'"),
    ],
)
def test_reset_must_give_an_episode_and_a_turn_each(answer: object, fault: str) -> None:
    checked = CheckedEnvironment(Answering(answer), "mine")
    with pytest.raises(ValueError, match=f"^environment: mine: {fault}"):
        checked.reset([prompt(), prompt()], [0, 1])


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Turn(), "step must return a list of 1 turns, one a conversation, got Turn"),
        ("x", "step must return a list of 1 turns, one a conversation, got 1"),
        ([], "step must return a list of 1 turns, one a conversation, got 0"),
        ([None], "turn 0 of step: must be a Turn, got None"),
    ],
)
def test_step_must_give_a_turn_each(answer: object, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^environment: mine: {fault}"):
        CheckedEnvironment(Answering(answer), "mine").step([1], ["hello"])


def test_an_exception_is_a_failure_of_every_conversation_of_the_call() -> None:
    checked = CheckedEnvironment(Answering(OSError("gone")), "mine")
    turns = checked.step([1, 2], ["a", "b"])
    assert [turn.failure.startswith("error: OSError: gone") for turn in turns] == [True, True]
    episodes, first = CheckedEnvironment(Lockstep(Echo), "echo").reset([prompt("broken"), prompt()], [0, 1])
    assert [bool(turn.failure) for turn in first] == [True, False] and None not in episodes


def test_what_it_is_given_is_counted() -> None:
    checked = load_environment("world")
    with pytest.raises(ValueError, match="seeds: must be one for each of 1 prompts, got 2"):
        checked.reset([prompt()], [0, 1])
    with pytest.raises(ValueError, match="replies: must be one for each of 0 episodes, got 1"):
        checked.step([], ["a"])


# --- by name or import path ---


def scripted() -> Any:
    from pipeline.environments.partner import ScriptedPartner

    return ScriptedPartner(["Hm."])


def broken() -> Any:
    raise KeyError("no such setting")


def test_an_environment_and_a_partner_are_loaded_by_import_path() -> None:
    episodes, [turn] = load_environment("test_pipeline_environments_protocol:echoes").reset([prompt()], [4])
    assert turn.text == f"Hello {Random(4).random():.6f}" and len(episodes) == 1
    assert load_partner("test_pipeline_environments_protocol:scripted").reply(["Hi"], Random()) == "Hm."


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_those_of_the_package_are_environments(name: str) -> None:
    partner = PartnerSpec(path="nowhere") if name == MODEL_PARTNER else None
    assert isinstance(load_environment(name, partner), Environment)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "word",
            "must be one of world, twenty-questions, model-partner or an import path package.module:name, got 'word'",
        ),
        ("nothing_here:x", "must be importable"),
        ("test_pipeline_environments_protocol:scripted", "without reset, step, close"),
        ("test_pipeline_environments_protocol:broken", "but it raised KeyError: 'no such setting'"),
        ("test_pipeline_environments_protocol:check_turn", "must be a class or function without arguments"),
    ],
)
def test_what_is_no_environment_is_refused_in_one_line(name: str, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^environment: .*{fault}") as raised:
        load_environment(name)
    assert "\n" not in str(raised.value)


def test_the_room_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from pipeline.environments.registry import load_environment as load; load('world');"
        "from pipeline.environments.model_partner import PartnerSpec; load('model-partner', PartnerSpec(path='x'));"
        "load('twenty-questions'); print(sorted({'torch', 'ray', 'gymnasium', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_example_of_the_readme_is_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(lockstep.__file__).with_name("README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_games.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    environment = load_environment("my_games:guess")
    episodes, turns = environment.reset([prompt()] * 2, [0, 0])
    assert [turn.text for turn in turns] == [" I think of a number."] * 2
    for number in range(1, 10):
        [answer] = environment.step(episodes[:1], [f" {number}"])
        if answer.terminated:
            break
        assert answer == Turn(text="No.")
    assert answer == Turn(text="Yes.", reward=1.0, terminated=True)
    environment.close(episodes)
