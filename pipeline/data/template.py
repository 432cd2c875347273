"""Turns to the text that the model reads: in a chat model's own template, with the recipe's role strings, or as plain text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pipeline.data import messages
from pipeline.data.config import TemplateConfig
from pipeline.data.exchange import Form
from pipeline.data.problems import DataError, RowError
from pipeline.data.turns import Turn, Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """kind: chat, roles or plain. tokenizer: of a chat template."""

    kind: str
    template: TemplateConfig
    tokenizer: Any = field(default=None, repr=False)

    def prompt(self, turns: Turns) -> str:
        """The prompt's text, up to where the reply begins. Raises RowError when the chat template refuses the turns."""
        if self.kind == "plain":
            return turns[-1].text
        if self.kind == "chat":
            return self._chat(turns)
        template = self.template
        before = {"system": template.system, "user": template.user, "assistant": template.assistant}
        return "".join(f"{before[turn.role]}{turn.text}{template.end}" for turn in turns) + template.assistant.rstrip(" ")

    def reply(self, text: str) -> str:
        """The reply's text: with the spaces before it that the prompt's end left out."""
        return self.template.assistant[len(self.template.assistant.rstrip(" ")) :] + text if self.kind == "roles" else text

    def _chat(self, turns: Turns) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages.dump(turns), tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise RowError("refused by template", str(error)) from error


def layout_of(template: TemplateConfig, forms: Collection[Form], model: str) -> Layout:
    """How rows of these forms are laid out for a model.

    model: folder or hub name whose tokenizer may have a chat template; "" for one that is still to be made, which has none.
    Raises DataError when the recipe asks for a chat template and there is none, or for plain text where rows are conversations.
    """
    kind, dialogue = template.kind, any(form != "columns" for form in forms)
    if kind == "plain" and dialogue:
        raise DataError("data.template.kind: must be chat or roles for transcripts and messages, got plain; it has no place for whose turn it is")
    if kind == "plain" or (kind == "auto" and not dialogue):
        return Layout(kind="plain", template=template)
    if kind != "roles" and model:
        from actors.model import load_tokenizer

        tokenizer = load_tokenizer(model)
        if tokenizer.chat_template:
            return Layout(kind="chat", template=template, tokenizer=tokenizer)
    if kind == "chat":
        got = f"{model!r}, whose tokenizer has none" if model else "no model.path"
        raise DataError(f"data.template.kind: must be roles where the model has no chat template, got chat with {got}; roles uses data.template's strings")
    return Layout(kind="roles", template=template)


def typed(line: str) -> Turns:
    """What a person typed, as a conversation that begins with it."""
    return (Turn("user", line),)


def shorter(turns: Turns) -> Turns | None:
    """The prompt without its oldest exchange; a system message stays. None when only the last turn is left."""
    system = turns[:1] if turns[0].role == "system" else ()
    rest = turns[len(system) :]
    later = next((number for number, turn in enumerate(rest) if number and turn.role == "user"), None)
    return None if later is None else (*system, *rest[later:])
