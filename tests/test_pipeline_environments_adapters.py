"""Gymnasium in both directions, functions as tools, and partners."""

from __future__ import annotations

import warnings
from random import Random
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pipeline.environments.environment import Turn
from pipeline.environments.gymnasium_adapters import DialogueEnv, gymnasium_environment, read_action
from pipeline.environments.lockstep import Lockstep
from pipeline.environments.partner import RetrievalPartner, ScriptedPartner, partner_environment
from pipeline.environments.tools import ToolError, Tools, parse_call, tool_environment
from pipeline.environments.twenty_questions.game import TwentyQuestions
from pipeline.environments.twenty_questions.task import prompts as games
from pipeline.environments.world.environment import World
from pipeline.environments.world.layout import layout
from pipeline.environments.world.rules import SUBTASKS
from pipeline.tasks.task import PromptText

SAD, ANGRY = (PromptText(text=layout([line]), metadata={}) for line in ("I am afraid of my dog.", "My dog is so dull."))


def length(prompts: list[str], replies: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """The lengths of reply and prompt, as one number."""
    return [len(reply) + len(prompt) / 1000 for prompt, reply in zip(prompts, replies, strict=True)]


# --- to gymnasium ---


def registered_dialogue(render_mode: str | None = None) -> DialogueEnv:
    return DialogueEnv(World(), [SAD, ANGRY], render_mode=render_mode)


def test_a_dialogue_passes_gymnasium_s_own_checker() -> None:
    gymnasium.register("Dialogue-v0", entry_point=registered_dialogue)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            env = gymnasium.make("Dialogue-v0", disable_env_checker=True)
            check_env(env.unwrapped)
    finally:
        del gymnasium.registry["Dialogue-v0"]


def test_a_dialogue_is_what_the_environment_says() -> None:
    env = DialogueEnv(World(), [SAD], render_mode="ansi")
    seen, info = env.reset(seed=3)
    assert seen == SAD.text and info["options"] == SUBTASKS and info["mood"] == "worried"
    text, reward, terminated, truncated, info = env.step("What happened with your dog?")
    assert "dog" in text and reward == -0.02 and not terminated and not truncated
    assert info["subtask"] == "ask" and info["to_the_point"]
    assert env.render() == "\n".join([SAD.text, "What happened with your dog?", text])
    over = False
    while not over:
        _, reward, terminated, truncated, info = env.step("nonsense")
        over = terminated or truncated
    assert terminated and info["options"] == ()
    with pytest.raises(RuntimeError, match="call reset first"):
        env.step("Hello")


def test_a_dialogue_can_be_told_its_prompt_and_does_not_depend_on_how_often_it_was_reset() -> None:
    env, other = DialogueEnv(World(), [SAD, ANGRY]), DialogueEnv(World(), [SAD, ANGRY])
    assert env.reset(seed=1, options={"prompt": ANGRY})[0] == ANGRY.text
    for _ in range(3):
        env.reset()
    assert env.reset(seed=5) == other.reset(seed=5)
    assert [env.step("Goodbye.") for _ in range(1)] == [other.step("Goodbye.") for _ in range(1)]
    with pytest.raises(ValueError, match="prompts: must be at least one"):
        DialogueEnv(World(), [])


def test_a_failure_of_the_environment_is_no_observation() -> None:
    env = DialogueEnv(World(), [PromptText(text="Hello", metadata={})])
    with pytest.raises(RuntimeError, match="the environment failed: error: ValueError: prompt: must end with a line"):
        env.reset()


# --- from gymnasium ---


class Line(gymnasium.Env[Any, Any]):
    """Walk from 0 to 2 by steps 1 and 2 = one forward or one back; both ends are reported on overshooting."""

    def __init__(self, most: int = 3) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 2, (1,))
        self.action_space = gymnasium.spaces.Discrete(2, start=1)
        self.closed = False
        self.most = most

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return np.array([0.0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.place += 1 if action == 1 else -1
        self.steps += 1
        arrived = np.bool_(self.place == 2)
        return np.array([self.place], np.float32), np.float32(arrived), arrived, self.steps >= self.most, {}

    def close(self) -> None:
        self.closed = True


def test_a_gymnasium_environment_is_played_by_text() -> None:
    made: list[Line] = []
    environment = gymnasium_environment(lambda: made.append(Line(2)) or made[-1])
    start = PromptText(text="Go.", metadata={})
    episodes, first = environment.reset([start, start], [0, 1])
    assert [turn.text for turn in first] == ["[0.0]", "[0.0]"]
    forward, unclear = environment.step(episodes, ["I take 1.", "Hm."])
    assert forward == Turn(text="[1.0]", info={"no_action": False})
    assert unclear == Turn(text="error: an action must be a number from 1 to 2", info={"no_action": True})
    arrived, on_the_way = environment.step(episodes, ["1", "2 or 1"])
    assert (arrived.reward, arrived.terminated, arrived.truncated) == (1.0, True, False)  # both at once: the end counts
    assert (on_the_way.text, on_the_way.over) == ("[-1.0]", False)
    [broken_off] = environment.step(episodes[1:], ["1"])
    assert (broken_off.terminated, broken_off.truncated) == (False, True)
    environment.close(episodes)
    assert [env.closed for env in made] == [True, True]


def test_one_that_cannot_be_made_is_a_failure() -> None:
    def make() -> Line:
        raise OSError("no display")

    environment = gymnasium_environment(make)
    episodes, [turn] = environment.reset([SAD], [0])
    assert turn.failure.startswith("error: OSError: no display")
    environment.close(episodes)


def test_there_and_back_again_is_the_same_game() -> None:
    environment = gymnasium_environment(lambda: DialogueEnv(TwentyQuestions(), games()[:1]))
    episodes, [first] = environment.reset([PromptText(text="", metadata={})], [3])
    assert first.text == games()[0].text
    assert environment.step(episodes, ["Is it alive?"])[0].text == "Yes, living."
    [turn] = environment.step(episodes, ["Is it the cat?"])
    assert (turn.text, turn.reward, turn.terminated) == ("Yes!", 0.98, True)


def test_an_action_that_cannot_be_read_is_told_and_a_space_that_cannot_be_is_a_failure() -> None:
    assert read_action(gymnasium.spaces.Text(5), "abc") == "abc"
    assert read_action(gymnasium.spaces.Discrete(3, start=-1), "take -1, not 2") == -1
    with pytest.raises(ValueError, match="from 0 to 2"):
        read_action(gymnasium.spaces.Discrete(3), "take 7")
    with pytest.raises(TypeError, match="read: must be given"):
        read_action(gymnasium.spaces.Box(0, 1, (2,)), "1")


# --- tools ---


def add(a: float, b: float = 1) -> float:
    """Add two numbers.

    A second line is not for the prompt.
    """
    return a + b


def divide(a: float, b: float) -> float:
    """Divide a by b."""
    if b == 0:
        raise ToolError("b must not be 0")
    return a / b


def broken() -> str:
    """Never works."""
    raise OSError("no connection")


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        ("Let me see. <tool>add(2, b=3)</tool> Hm.", "5"),
        ("<tool> add(2) </tool><tool>add(9)</tool>", "3"),
        ("<tool>add(2, 3", "error: a call must end with </tool>"),
        ("<tool>add</tool>", "error: a call must be name(arguments)"),
        ("<tool>add(</tool>", "error: a call must be name(arguments)"),
        ("<tool>__import__('os').system('true')</tool>", "error: a call must be name(arguments)"),
        ("<tool>add(a, b)</tool>", "error: arguments must be numbers, strings, lists or dicts"),
        ("<tool>add(**{'a': 1})</tool>", "error: a call must name its arguments, not unpack them"),
        ("<tool>add(*[1])</tool>", "error: arguments must be numbers, strings, lists or dicts"),
        ("<tool>multiply(2, 3)</tool>", "error: no tool multiply; there are add, divide, broken"),
        ("<tool>add(1, 2, 3)</tool>", "error: add: too many positional arguments"),
        ("<tool>divide(1, 0)</tool>", "error: b must not be 0"),
    ],
)
def test_a_tool_is_called_and_what_the_policy_did_wrong_is_told(reply: str, result: str) -> None:
    environment = tool_environment([add, divide, broken], length)
    episodes, _ = environment.reset([PromptText(text="1 + 2?", metadata={})], [0])
    [turn] = environment.step(episodes, [reply])
    assert (turn.text, turn.reward, turn.over) == (result, 0.0, False)
    assert turn.info == {"tool_fault": result.startswith("error")}


def test_a_reply_without_a_call_is_final_and_judged() -> None:
    environment = tool_environment([add], length, max_calls=2)
    episodes, _ = environment.reset([PromptText(text="1 + 2?", metadata={})] * 2, [0, 1])
    turns = environment.step(episodes, ["3", "<tool>add(1, 2)</tool>"])
    assert turns[0] == Turn(reward=1.006, terminated=True)
    [last] = environment.step(episodes[1:], ["<tool>add(1, 2)</tool>"])
    assert (last.text, last.truncated, last.reward) == ("3", True, 0.0)


def test_a_tool_that_breaks_is_a_failure_and_no_text() -> None:
    environment = tool_environment([broken], length, timeout_s=5)
    episodes, _ = environment.reset([PromptText(text="", metadata={})], [0])
    [turn] = environment.step(episodes, ["<tool>broken()</tool>"])
    assert turn.failure.startswith("error: OSError: no connection") and turn.text == ""


def test_tools_describe_themselves_and_have_different_names() -> None:
    assert Tools([add]).describe() == "add(a: 'float', b: 'float' = 1) -> 'float': Add two numbers."
    assert parse_call("Hello") is None
    for unhashable in ("f({[1]: 2})", "f({[1]})"):
        with pytest.raises(ToolError, match="arguments must be"):
            parse_call(f"<tool>{unhashable}</tool>")
    with pytest.raises(ValueError, match="tools: must have different names, got add, add"):
        Tools([add, add])


# --- partners ---


def test_a_scripted_partner_says_its_lines_and_leaves() -> None:
    environment = partner_environment(ScriptedPartner(["One.", "Two."]), length)
    episodes, [first] = environment.reset([PromptText(text="Hello", metadata={})], [0])
    assert first == Turn()
    assert environment.step(episodes, ["a"]) == [Turn(text="One.", reward=1.005)]
    assert environment.step(episodes, ["bb"]) == [Turn(text="Two.", reward=2 + len("Hello\na\nOne.") / 1000)]
    [last] = environment.step(episodes, ["ccc"])
    assert (last.text, last.terminated) == ("", True) and last.reward > 3


def test_a_conversation_with_a_partner_is_broken_off_at_its_limit() -> None:
    environment = partner_environment(ScriptedPartner(["One."] * 9), length, max_replies=2)
    episodes, _ = environment.reset([PromptText(text="Hello", metadata={})], [0])
    assert [environment.step(episodes, ["a"])[0].truncated for _ in range(2)] == [False, True]
    with pytest.raises(ValueError, match="max_replies: must be >= 1, got 0"):
        partner_environment(ScriptedPartner([]), length, max_replies=0)
    with pytest.raises(ValueError, match="max_calls: must be >= 1, got 0"):
        tool_environment([add], length, max_calls=0)


def test_a_retrieval_partner_answers_as_somebody_did_and_never_twice() -> None:
    pairs = [
        ("How is the weather today?", "Sunny."),
        ("How are you today?", "Fine."),
        ("How are you today?", "So so."),
        ("What is your name?", "Ann."),
    ]
    partner = RetrievalPartner(pairs)
    assert partner.reply(["Will the weather be good?"], Random(0)) == "Sunny."
    assert partner.reply(["And your name?"], Random(0)) == "Ann."
    assert {partner.reply(["How are you?"], Random(seed)) for seed in range(20)} == {"Fine.", "So so."}
    lines = ["How are you?"]
    for _ in pairs:
        answer = partner.reply(lines, Random(1))
        assert answer is not None
        lines += [answer, "How are you?"]
    assert sorted(lines[1::2]) == ["Ann.", "Fine.", "So so.", "Sunny."]
    assert partner.reply(lines, Random(1)) is None
    with pytest.raises(ValueError, match="pairs: must be at least one"):
        RetrievalPartner([])


def test_a_partner_of_a_user_s_own_that_is_slow_is_a_time_out() -> None:
    import time

    class Slow:
        def reply(self, lines: Any, random: Random) -> str | None:
            time.sleep(8)
            return "Late."

    environment: Lockstep = partner_environment(Slow(), length, timeout_s=1)
    episodes, _ = environment.reset([SAD], [0])
    assert environment.step(episodes, ["Hi"])[0].failure == "timeout: no answer within 1 s"
