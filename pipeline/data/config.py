"""Settings of data from files: where rows are, what their columns are called, how they are laid out. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Config

Kind = Literal["comparisons", "demonstrations", "prompts"]
Format = Literal["auto", "transcript", "columns", "messages"]


class ColumnsConfig(Config):
    """What the columns are called. A column that a source does not need may be absent there."""

    prompt: str = "prompt"
    """What the model is given: text, a transcript, or a list of messages. Transcripts and messages may hold it in the replies' columns instead."""

    response: str = "response"
    """How the prompt was answered; of demonstrations."""

    messages: str = "messages"
    """A whole conversation as a list of {role, content}, its last message the response; of demonstrations in place of prompt and response."""

    chosen: str = "chosen"
    """The better of two replies, or the conversation that ends with it."""

    rejected: str = "rejected"
    """The worse of two replies, or the conversation that ends with it."""

    ranking: str = "ranking"
    """A list of two or more replies, the best first; in place of chosen and rejected."""

    margin: str = "margin"
    """By how much the best reply is better, a number >= 0; a row without it has 0."""


class TemplateConfig(Config):
    """How turns become the text that the model reads."""

    kind: Literal["auto", "chat", "roles", "plain"] = "auto"
    """chat: the chat template of the model's tokenizer. roles: the strings below. plain: a prompt as it is, a reply right behind it.
    auto: plain where every source has plain columns, else chat where model.path has a chat template, else roles."""

    system: str = "\n\nSystem: "
    """What stands before a system message."""

    user: str = "\n\nHuman: "
    """What stands before a person's turn."""

    assistant: str = "\n\nAssistant: "
    """What stands before the model's turn. A prompt ends with it, without its last spaces: the reply begins with those, as tokenizers learned words."""

    end: str = ""
    """What stands after each turn of a prompt. A reply that is trained on ends with the end-of-text token."""


class DataConfig(Config):
    """Files of preferences, for task = "files". A source is a path (.parquet, .jsonl, .jsonl.gz, .json.gz; several by * and ?), a URL that fsspec knows, or
    the name of a Hugging Face data set, `owner/name` or `owner/name:config/split`."""

    comparisons: str = ""
    """Source of prompts with a better and a worse reply, or with a ranking of replies."""

    demonstrations: str = ""
    """Source of prompts with the reply to imitate. Empty: the best reply of each comparison."""

    prompts: str = ""
    """Source of what the policy is asked. Empty: the prompts of the comparisons, or if there are none, of the demonstrations."""

    format: Format = "auto"
    """How rows are read. transcript: `\\n\\nHuman: ...\\n\\nAssistant: ...`, as Anthropic's HH. messages: lists of {role, content}. columns: plain text.
    auto: by a look at the first rows of each source."""

    columns: ColumnsConfig = ColumnsConfig()
    template: TemplateConfig = TemplateConfig()

    heldout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the conversations that is held out, by a hash of their first turn: all that begins alike is on one side."""

    max_rows: int = Field(default=0, ge=0)
    """Rows read from each file, from its beginning; 0 reads all."""

    max_characters: int = Field(default=100_000, ge=1)
    """Longest prompt or reply, in characters; a row with a longer one is left out and counted."""

    max_excluded: float = Field(default=0.1, ge=0, le=1)
    """Share of a source's rows that may be left out as faulty before the run stops; duplicates are left out, too, but are no fault."""

    too_long: Literal["shorten", "exclude"] = "shorten"
    """A prompt with too many tokens loses its oldest turns, then (in training on replies) its oldest tokens; or its row is left out. Counted either way."""
