"""An environment of tools: the policy calls functions in its replies, reads their results, and then answers.

    reply      <tool>add(2, b=3)</tool>
    turn       5
    reply      It is 5.                       no call: the conversation ends, and the judge reads this

A call is written as in Python, with literals only. It is parsed and never evaluated, so only the tools can be called.
If the policy makes a mistake (no such tool, wrong arguments, a `ToolError`), it gets an error text, so that it can
learn. Any other exception is the tool's own fault: the conversation fails and has no reward.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.environments.environment import Turn
from pipeline.environments.lockstep import Lockstep
from pipeline.environments.partner import Judge
from pipeline.tasks.task import PromptText

BEGIN, END = "<tool>", "</tool>"


class ToolError(ValueError):
    """A call is refused, such as a division by zero; the policy reads the error's text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """The call in a reply: the tool's name and the arguments."""

    name: str
    positional: tuple[Any, ...] = ()
    keywords: Mapping[str, Any]


def parse_call(reply: str) -> ToolCall | None:
    """The first call in a reply, or None if there is none. Raises ToolError for a malformed call."""
    _, begun, rest = reply.partition(BEGIN)
    if not begun:
        return None
    text, ended, _ = rest.partition(END)
    if not ended:
        raise ToolError(f"a call must end with {END}")
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ToolError("a call must be name(arguments)")
        positional = tuple(ast.literal_eval(value) for value in call.args)
        if any(keyword.arg is None for keyword in call.keywords):
            raise ToolError("a call must name its arguments, not unpack them")
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ToolError("a call must be name(arguments)") from error
    except ToolError:
        raise
    except (TypeError, ValueError) as error:  # a list as the key of a dict, or a name
        raise ToolError("arguments must be numbers, strings, lists or dicts") from error
    return ToolCall(name=call.func.id, positional=positional, keywords=keywords)


class Tools:
    """The tools: functions by name."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        """Raises ValueError when two functions have the same name."""
        self._functions = {function.__name__: function for function in functions}
        if len(self._functions) < len(functions):
            names = [function.__name__ for function in functions]
            raise ValueError(f"tools: must have different names, got {', '.join(names)}; rename one")

    def describe(self) -> str:
        """One line for each tool, to be put in a prompt: its name, its arguments and its docstring's first line."""
        return "\n".join(
            f"{name}{inspect.signature(function)}: {(inspect.getdoc(function) or '').partition(chr(10))[0]}"
            for name, function in self._functions.items()
        )

    def call(self, call: ToolCall) -> str:
        """Call the tool and return its result as text: a string as it is, anything else as JSON.

        Raises ToolError for a mistake of the policy: an unknown tool, wrong arguments, or a call that the tool refuses.
        """
        function = self._functions.get(call.name)
        if function is None:
            raise ToolError(f"no tool {call.name}; there are {', '.join(self._functions)}")
        try:
            inspect.signature(function).bind(*call.positional, **call.keywords)
        except TypeError as error:
            raise ToolError(f"{call.name}: {error}") from error
        result = function(*call.positional, **call.keywords)
        return result if isinstance(result, str) else json.dumps(result)


class ToolConversation:
    """One conversation with at most `max_calls` calls of tools; after the last one it is truncated."""

    def __init__(self, tools: Tools, judge: Judge, max_calls: int = 8) -> None:
        """judge: rewards the final reply; it gets the prompt followed by all calls and results, one to a line."""
        self._tools, self._judge, self._max_calls = tools, judge, max_calls
        self._lines: list[str] = []

    def begin(self, prompt: PromptText, seed: int) -> Turn:
        """An empty turn: the prompt must describe the tools itself, such as by `Tools.describe`."""
        self._prompt = prompt
        return Turn()

    def answer(self, reply: str) -> Turn:
        """The result of the called tool; without a call, the end of the conversation and its reward."""
        try:
            call = parse_call(reply)
            if call is None:
                said = "\n".join([self._prompt.text, *self._lines])
                [score] = self._judge([said], [reply], [self._prompt.metadata])
                return Turn(reward=float(score), terminated=True)
            result, fault = self._tools.call(call), False
        except ToolError as error:
            result, fault = f"error: {error}", True
        self._lines += [reply, result]
        info = {"tool_fault": fault}
        return Turn(text=result, truncated=len(self._lines) // 2 >= self._max_calls, info=info)

    def close(self) -> None:
        """It holds nothing."""


def tool_environment(
    functions: Sequence[Callable[..., Any]], judge: Judge, max_calls: int = 8, timeout_s: float | None = None
) -> Lockstep:
    """An environment with these functions as tools. timeout_s: seconds that a call may take; None sets no deadline."""
    if max_calls < 1:
        raise ValueError(f"max_calls: must be >= 1, got {max_calls}")
    tools = Tools(functions)
    return Lockstep(lambda: ToolConversation(tools, judge, max_calls), timeout_s)
