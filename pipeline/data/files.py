"""The task `files`: comparisons, demonstrations and prompts from the sources that a recipe names under `data`.

Rows are checked, split and laid out as text. A kind that the recipe does not name is derived: demonstrations are the
best replies of the comparisons; prompts are those of the comparisons or demonstrations. Files are read when the task is
first asked for something, and held as text in memory. The task has no reward of its own: the recipe names one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.data.config import DataConfig, Kind
from pipeline.data.exchange import Exchange
from pipeline.data.load import LoadedSource, check_share, load
from pipeline.data.problems import NoRowsError, Problem, RowError
from pipeline.data.sources import sources_of
from pipeline.data.split import split_of
from pipeline.data.template import Layout, layout_of, shorter, typed
from pipeline.data.turns import Turns
from pipeline.tasks.task import Comparison, Demonstration, PromptText, Split

KINDS: tuple[Kind, ...] = ("comparisons", "demonstrations", "prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """A checked row as text the model reads."""

    exchange: Exchange
    split: Split
    prompt: str
    replies: tuple[str, ...]

    @property
    def origin(self) -> dict[str, object]:
        """Source and line of the row, as JSON values."""
        return {"source": self.exchange.source, "line": self.exchange.line}


class Files:
    """The task; see the module."""

    name = "files"
    reward = ""

    def __init__(self, data: DataConfig, model: str = "") -> None:
        """model: folder or hub name, whose tokenizer may have a chat template; "" for a new model."""
        self.data = data
        self._model = model

    def comparisons(self, split: Split) -> list[Comparison]:
        """The comparisons of a split, in the order of the files.

        Raises DataError for data that cannot be used, or a split without any.
        """
        return [
            Comparison(prompt=row.prompt, replies=row.replies, margin=row.exchange.margin)
            for row in self.rows("comparisons", split)
        ]

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """The demonstrations of a split, given or derived. Raises as `comparisons` does."""
        return [Demonstration(prompt=row.prompt, response=row.replies[0]) for row in self.rows("demonstrations", split)]

    def prompts(self, split: Split) -> list[PromptText]:
        """The distinct prompts of a split, given or derived. Raises as `comparisons` does.

        metadata: the other columns of the first row with that prompt, and its `source` and `line`, unless the row has
        columns of these names.
        """
        return [
            PromptText(text=row.prompt, metadata=row.origin | json.loads(row.exchange.metadata))
            for row in self.rows("prompts", split)
        ]

    def layout(self, line: str) -> str:
        """Prompt text for a line that a person typed, as the beginning of a conversation."""
        return self._layout.prompt(typed(line))

    @property
    def continuation(self) -> Callable[[str], str]:
        """The function that gives the text after a reply when the other side says a line; it holds no data."""
        return self._layout.continuation

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Write a byte-level BPE of the training demonstrations."""
        from pipeline.tasks.tokenizers import train_byte_bpe

        train_byte_bpe(
            (text for row in self.rows("demonstrations", "train") for text in (row.prompt, row.replies[0])),
            folder,
            vocab_size=vocabulary,
        )

    def shorter(self, prompt: str) -> Iterator[str]:
        """The prompt without its oldest exchange, without its two oldest, and so on; nothing if it may not be cut."""
        turns = self._turns.get(prompt) if self.data.too_long == "shorten" else None
        while turns and (turns := shorter(turns)):
            yield self._layout.prompt(turns)

    def all_rows(self, kind: Kind) -> list[TextRow]:
        """The rows of a kind of both splits, in the order of the files; empty if there is no source for them."""
        return self._rows[kind]

    @property
    def layout_kind(self) -> str:
        """The layout in use: chat, roles or plain."""
        return self._layout.kind

    def rows(self, kind: Kind, split: Split) -> list[TextRow]:
        """The rows of `comparisons`, `demonstrations` or `prompts`, in order. Raises NoRowsError if there are none."""
        if not (rows := self.all_rows(kind)):
            raise NoRowsError(
                f"data.{kind}: must name a source, got none, and there is nothing to derive it from; give it, or "
                "data.comparisons"
            )
        found = [row for row in rows if row.split == split]
        if not found:
            firsts = len({row.exchange.prompt[0] for row in rows})
            raise NoRowsError(
                f"data.heldout: must leave {kind} on both sides, got none of {len(rows)} for {split} with "
                f"{self.data.heldout:g}; their conversations begin in "
                f"{firsts} ways, and those that begin alike are on one side: "
                f"{'raise' if split == 'heldout' else 'lower'} it, or give more rows"
            )
        return found

    @property
    def loaded(self) -> dict[Kind, LoadedSource]:
        """Each source that the recipe names: its rows, and the problems of those that were left out."""
        return self._texts[0]

    @cached_property
    def _sources(self) -> dict[Kind, LoadedSource]:
        return {kind: load(kind, source, self.data) for kind, source in sources_of(self.data).items()}

    @cached_property
    def _layout(self) -> Layout:
        return layout_of(self.data.template, [source.form for source in self._sources.values()], self._model)

    @cached_property
    def _texts(self) -> tuple[dict[Kind, LoadedSource], dict[Kind, list[TextRow]]]:
        """The sources, and their rows as text. A row that the chat template refuses becomes a problem."""
        loaded: dict[Kind, LoadedSource] = {}
        laid: dict[Kind, list[TextRow]] = {}
        for kind, source in self._sources.items():
            rows, refused = [], []
            for exchange in source.exchanges:
                try:
                    rows.append(self._laid(exchange))
                except RowError as error:
                    refused.append(
                        Problem(source=exchange.source, line=exchange.line, kind=error.kind, detail=error.detail)
                    )
            kept = tuple(row.exchange for row in rows)
            loaded[kind], laid[kind] = replace(source, exchanges=kept, problems=(*source.problems, *refused)), rows
            check_share(sources_of(self.data)[kind], loaded[kind], self.data.max_excluded)
        return loaded, laid

    def _laid(self, exchange: Exchange) -> TextRow:
        replies = tuple(self._layout.reply(reply) for reply in exchange.replies)
        return TextRow(
            exchange=exchange,
            split=split_of(exchange.prompt, self.data.heldout),
            prompt=self._layout.prompt(exchange.prompt),
            replies=replies,
        )

    @cached_property
    def _rows(self) -> dict[Kind, list[TextRow]]:
        """The rows of every kind, given or derived; equal derived rows are one."""
        given = self._texts[1]
        comparisons = given.get("comparisons", [])
        demonstrations = given.get("demonstrations") or _distinct(
            [replace(row, replies=row.replies[:1]) for row in comparisons]
        )
        prompts = _distinct([replace(row, replies=()) for row in given.get("prompts") or comparisons or demonstrations])
        return {"comparisons": comparisons, "demonstrations": demonstrations, "prompts": prompts}

    @cached_property
    def _turns(self) -> dict[str, Turns]:
        return {row.prompt: row.exchange.prompt for rows in self._rows.values() for row in rows}


def _distinct(rows: list[TextRow]) -> list[TextRow]:
    first: dict[tuple[str, tuple[str, ...]], TextRow] = {}
    for row in rows:
        first.setdefault((row.prompt, row.replies), row)
    return list(first.values())
