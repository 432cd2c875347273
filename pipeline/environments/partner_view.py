"""A conversation as a language model reads it that is the partner, up to where its next line begins.

    transcript   <|user|> Hello<|bot|> Who is it?<|user|>       the policy's own text; the partner goes on behind it
    chat         user: ...  assistant: Hello  user: Who is it?  the partner's chat template, with the roles swapped

A chat is used where the partner's tokenizer has a template. Templates want a user's message first, so it begins with an
instruction. A system message of the policy is not shown to such a partner.

The text is laid out anew for each line, since nothing here is trained on. Names of the partner's special tokens are
taken out of what the policy says, so that it cannot speak for anybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.tasks.task import PromptText, Task, continuation_of

INSTRUCTION = (
    "Let us have a conversation. You speak first, as a person who wants something of me. Stay that person, and say "
    "only your own next turn."
)
INSTRUCTED = "partner"  # entry of a prompt's metadata that takes the place of INSTRUCTION
_PROBE = "Hello there."


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What stands around a line of the partner in the policy's text; all empty where nothing says whose turn it is.

    first: before the first line of a conversation. before: between a reply and a line. after: between a line and the
    next reply.
    """

    first: str = ""
    before: str = ""
    after: str = ""

    @classmethod
    def of(cls, task: Task) -> Marks:
        """The marks by which a task lays lines out. Raises ValueError where it does not put a line between marks."""
        framed, opening = continuation_of(task)(_PROBE), task.layout(_PROBE)
        before, found, after = framed.partition(_PROBE)
        if not found:
            raise ValueError(
                f"task: must lay out a line as it is, between marks, for a model as partner, got {framed!r:.80} for "
                f"{_PROBE!r} of task {task.name!r}; mend its continuation(line) or layout(line)"
            )
        return cls(first=opening.partition(_PROBE)[0], before=before, after=after)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings at which a line of the partner ends, because somebody else's turn begins."""
        return tuple(stop for mark in (self.after, self.before) if (stop := mark.rstrip()).strip())

    def line(self, said: str) -> str:
        """A line without the space around it, which the marks bring; unchanged where there are none."""
        return said.strip() if self.stops else said

    def lines(self, prompt: str) -> list[str]:
        """The lines of a prompt, alternately the partner's and the policy's, the partner's first and last.

        What stands before the first line is left out. A prompt without marks is one line.
        """
        if not (self.after.strip() and self.before.strip()):
            return [prompt]
        beginning, *exchanges = prompt.removesuffix(self.after).split(self.after)
        ends = (self.before[start:] for start in range(len(self.before)))
        own_mark = next((end for end in ends if self.first.endswith(end)), self.before)
        lines = [beginning.rpartition(own_mark)[2]]
        for exchange in exchanges:
            reply, _, line = exchange.partition(self.before)
            lines += [reply, line]
        return [line.strip() for line in lines]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartnerView:
    """What the partner reads. tokenizer: the partner's. clean: takes the names of its special tokens out of a text."""

    marks: Marks
    tokenizer: Any
    clean: Callable[[str], str]

    def text(self, prompt: PromptText, lines: Sequence[str]) -> str:
        """The conversation up to where the partner's next line begins.

        lines: since the prompt, alternately the policy's and the partner's; the first and the last are the policy's.
        Raises jinja2.TemplateError where the chat template refuses the conversation.
        """
        said = [self.clean(line) for line in lines]
        return self._chat(prompt, said) if self.tokenizer.chat_template else self._transcript(prompt.text, said)

    def _transcript(self, prompt: str, lines: Sequence[str]) -> str:
        before, after = self.marks.before, self.marks.after
        parts = [line + (after if place % 2 else before) for place, line in enumerate(lines)]
        return (prompt + "".join(parts)).rstrip(" ")  # tokenizers learn words with the space before them

    def _chat(self, prompt: PromptText, lines: Sequence[str]) -> str:
        instruction = prompt.metadata.get(INSTRUCTED)
        before = [self.clean(line) for line in self.marks.lines(prompt.text)]
        contents = [instruction if isinstance(instruction, str) else INSTRUCTION, *before, *lines]
        messages = [
            {"role": "assistant" if place % 2 else "user", "content": content.strip()}
            for place, content in enumerate(contents)
        ]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
