"""Settings of data from files: sources, names of columns, layout as text. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.config import PathOrName
from cluster.config import Config

Kind = Literal["comparisons", "demonstrations", "prompts"]
Format = Literal["auto", "transcript", "columns", "messages"]


class ColumnsConfig(Config):
    """Names of the columns. A column that a source does not need may be absent there."""

    prompt: str = "prompt"
    """Column of the prompt: text, a transcript, or a list of messages.

    Transcripts and messages may have the prompt in the columns of the replies instead.
    """

    response: str = "response"
    """Column of the reply in demonstrations."""

    text: str = "text"
    """Column of running text, in place of prompt and response: its first data.prompt_words words are the prompt."""

    messages: str = "messages"
    """Column of a whole conversation in demonstrations, in place of prompt and response.

    A list of {role, content}, or ShareGPT's {from, value} under `conversations`; its last message is the response.
    """

    chosen: str = "chosen"
    """Column of the better of two replies, or of the conversation that ends with it."""

    rejected: str = "rejected"
    """Column of the worse of two replies, or of the conversation that ends with it."""

    ranking: str = "ranking"
    """Column of a list of two or more replies, the best first; in place of chosen and rejected."""

    metadata: str = "metadata"
    """Column of an object whose entries the reward function receives beside the row's other columns."""

    margin: str = "margin"
    """Column of the margin of the best reply, a number from 0 to 1,000,000; a row without it has 0."""


class TemplateConfig(Config):
    """How turns become the text that the model reads."""

    kind: Literal["auto", "chat", "roles", "plain"] = "auto"
    """How turns are laid out: as chat, roles, plain, or auto.

    chat: the chat template of the model's tokenizer. roles: the strings below. plain: a prompt as it is, a reply right
    behind it. auto: plain where every source has plain columns, else chat where model.path has a chat template, else
    roles.
    """

    system: str = "\n\nSystem: "
    """Text before a system message."""

    user: str = "\n\nHuman: "
    """Text before a person's turn."""

    assistant: str = "\n\nAssistant: "
    """Text before the model's turn.

    A prompt ends with it, without its last spaces. The reply begins with them, because tokenizers learn words with
    their space in front.
    """

    end: str = ""
    """Text after each turn of a prompt. A reply that is trained on ends with the end-of-text token."""


class DataConfig(Config):
    """Files of preferences, for task = "files".

    A source is a path (.parquet, .jsonl, .json, .csv, the last three also with .gz; several by * and ?), a URL that
    fsspec knows, or the name of a Hugging Face data set, `owner/name` or `owner/name:config/split`.
    """

    comparisons: PathOrName = ""
    """Source of prompts with a better and a worse reply, or with a ranking of replies."""

    demonstrations: PathOrName = ""
    """Source of prompts with the reply to imitate. Empty: the best reply of each comparison."""

    prompts: PathOrName = ""
    """Source of the prompts. Empty: those of the comparisons or, without any, of the demonstrations."""

    format: Format = "auto"
    """The form of the rows: transcript, messages, columns, or auto.

    transcript: `\\n\\nHuman: ...\\n\\nAssistant: ...`, as in Anthropic's HH. messages: lists of {role, content}.
    columns: plain text. auto: the form of most of a source's first rows.
    """

    columns: ColumnsConfig = ColumnsConfig()
    template: TemplateConfig = TemplateConfig()

    prompt_words: int = Field(default=8, ge=1)
    """Number of words of a running text that are its prompt."""

    heldout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the conversations that is held out, by a hash of the words of their first turn."""

    max_rows: int = Field(default=0, ge=0)
    """Rows read from each file, from its beginning; 0 reads all."""

    max_characters: int = Field(default=100_000, ge=1)
    """Longest prompt or reply, in characters; a row with a longer one is left out and counted."""

    max_excluded: float = Field(default=0.1, ge=0, le=1)
    """Share of a source's rows that may be faulty before the run stops.

    Duplicates, tool calls and images are left out, too, but are no fault.
    """

    too_long: Literal["shorten", "exclude"] = "shorten"
    """What happens to a prompt with too many tokens: shorten or exclude; both are counted.

    shorten: it loses its oldest turns, then (in training on replies) its oldest tokens. exclude: its row is left out.
    """
