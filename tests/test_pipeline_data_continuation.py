"""What follows a reply in a conversation: by role strings, and by a model's chat template as it stands."""

from __future__ import annotations

from typing import Any

import pytest

import tiny_models
from pipeline.data.config import TemplateConfig
from pipeline.data.template import Layout
from pipeline.data.turns import Turn
from pipeline.tasks.task import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# drops what was thought before the last question, as templates of reasoning models do
FORGETFUL = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}",
)


def chat(template: str) -> Layout:
    tokenizer: Any = tiny_models.byte_tokenizer()
    tokenizer.chat_template = template
    return Layout(kind="chat", template=TemplateConfig(), tokenizer=tokenizer)


def test_a_chat_template_goes_on_where_the_reply_ended() -> None:
    layout = chat(CHATML)
    said = layout.continuation("And you?")
    assert said == "<|im_end|>\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "And you?"))
    assert layout.prompt(turns[:1]) + "Hello." + said == layout.prompt(turns)


def test_a_chat_template_that_writes_earlier_turns_anew_is_refused() -> None:
    with pytest.raises(
        DataError, match="must be roles for conversations with this model, got chat; its template does not"
    ):
        chat(FORGETFUL).continuation("And you?")


def test_role_strings_and_plain_text_go_on_as_prompts_are_laid_out() -> None:
    roles = Layout(kind="roles", template=TemplateConfig())
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "And you?"))
    begin = roles.prompt(turns[:1])
    assert begin + roles.reply("Hello.") + roles.continuation("And you?") == roles.prompt(turns)
    assert Layout(kind="plain", template=TemplateConfig()).continuation("And you?") == "And you?"
