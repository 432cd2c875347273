"""The layout of turns as text: by the model's chat template, by the recipe's role strings, or as plain text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pipeline.data import messages
from pipeline.data.config import TemplateConfig
from pipeline.data.exchange import Form
from pipeline.data.problems import RowError
from pipeline.data.turns import Turn, Turns
from pipeline.tasks.task import DataError

# a question and its reply, to see how a chat template goes on
_SAID = ("Hello, who is there?", "<think>\nA voice.\n</think>\n\nIt is me.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout of turns as text. kind: chat, roles or plain. tokenizer: the one with the chat template."""

    kind: str
    template: TemplateConfig
    tokenizer: Any = field(default=None, repr=False)

    def prompt(self, turns: Turns) -> str:
        """The text of a prompt, up to where the reply begins. Raises RowError if the chat template refuses it."""
        if self.kind == "plain":
            return turns[-1].text
        if self.kind == "chat":
            return self._chat(turns)
        template = self.template
        before = {"system": template.system, "user": template.user, "assistant": template.assistant}
        return "".join(f"{before[turn.role]}{turn.text}{template.end}" for turn in turns) + template.assistant.rstrip(
            " "
        )

    def reply(self, text: str) -> str:
        """The text of a reply, with the spaces before it that the end of the prompt left out."""
        return (
            self.template.assistant[len(self.template.assistant.rstrip(" ")) :] + text if self.kind == "roles" else text
        )

    def continuation(self, line: str) -> str:
        """The text that follows a reply when the user says this line, up to where the next reply begins.

        It begins with what ends a reply, if anything does; a reply that ended so already needs it no more. Raises
        DataError where the chat template writes what was said in another way, now or as the conversation goes on.
        """
        if self.kind == "plain":
            return line
        if self.kind == "roles":
            return self.template.end + self.prompt(typed(line))
        talk = (Turn("user", _SAID[0]), Turn("assistant", _SAID[1]))
        before = self._chat(talk[:1])
        whole = self._chat((*talk, Turn("user", line)))
        later = self._chat((*talk, Turn("user", line), Turn("assistant", _SAID[1]), Turn("user", line)))
        head = f"{before}{_SAID[1]}"
        if not (whole.startswith(head) and later.startswith(whole)):
            raise DataError(
                "data.template.kind: must be roles for conversations with this model, got chat; its template does not "
                "keep what was said as it was said (spaces, or thoughts that it drops later)"
            )
        return whole[len(head) :]

    def _chat(self, turns: Turns) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(messages.dump(turns), tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:
            raise RowError("refused by template", str(error)) from error


def layout_of(template: TemplateConfig, forms: Collection[Form], model: str) -> Layout:
    """The layout of rows of these forms for a model.

    model: folder or hub name whose tokenizer may have a chat template; "" for a new model, which has none. Raises
    DataError when the recipe asks for a chat template and there is none, or for plain text and rows are conversations.
    """
    kind, dialogue = template.kind, any(form != "columns" for form in forms)
    if kind == "plain" and dialogue:
        raise DataError(
            "data.template.kind: must be chat or roles for transcripts and messages, got plain; it has no place for "
            "whose turn it is"
        )
    if kind == "plain" or (kind == "auto" and not dialogue):
        return Layout(kind="plain", template=template)
    if kind != "roles" and model:
        from actors.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model)
        if tokenizer.chat_template:
            return Layout(kind="chat", template=template, tokenizer=tokenizer)
    if kind == "chat":
        got = f"{model!r}, whose tokenizer has none" if model else "no model.path"
        raise DataError(
            f"data.template.kind: must be roles where the model has no chat template, got chat with {got}; roles uses "
            "data.template's strings"
        )
    return Layout(kind="roles", template=template)


def typed(line: str) -> Turns:
    """A conversation of one line that a person typed."""
    return (Turn("user", line),)


def shorter(turns: Turns) -> Turns | None:
    """The prompt without its oldest exchange; a system message stays. None when only the last turn is left."""
    system = turns[:1] if turns[0].role == "system" else ()
    rest = turns[len(system) :]
    later = next((number for number, turn in enumerate(rest) if number and turn.role == "user"), None)
    return None if later is None else (*system, *rest[later:])
