"""The task that is read from files: comparisons, demonstrations and prompts as `data` in the recipe names them, checked, split and laid out as text.

What a recipe does not give is derived: to imitate, the best reply of each comparison; to ask, the prompts of the comparisons or demonstrations.
Files are read when something is first asked of the task, and held as text in memory. It has no reward of its own: the recipe names one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.data.config import DataConfig, Kind
from pipeline.data.exchange import Exchange
from pipeline.data.load import Loaded, check_share, load
from pipeline.data.problems import DataError, Problem, RowError
from pipeline.data.sources import named
from pipeline.data.split import split_of
from pipeline.data.template import Layout, layout_of, shorter, typed
from pipeline.data.turns import Turns
from pipeline.tasks.task import Comparison, Demonstration, PromptText, Split

KINDS: tuple[Kind, ...] = ("comparisons", "demonstrations", "prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """A checked row as text the model reads."""

    exchange: Exchange
    split: Split
    prompt: str
    replies: tuple[str, ...]

    @property
    def origin(self) -> dict[str, object]:
        """Where the row stands, as JSON."""
        return {"source": self.exchange.source, "line": self.exchange.line}


class Files:
    """The task; see the module."""

    name = "files"
    reward = ""

    def __init__(self, data: DataConfig, model: str = "") -> None:
        """model: folder or hub name of the model, whose tokenizer may have a chat template; "" for one that is still to be made. Reads nothing yet."""
        self.data = data
        self._model = model

    def comparisons(self, split: Split) -> list[Comparison]:
        """The comparisons of a split, in the order of the files. Raises DataError for data that cannot be used, or a split without any."""
        return [Comparison(prompt=row.prompt, replies=row.replies, margin=row.exchange.margin) for row in self.rows("comparisons", split)]

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """What there is to imitate, given or derived. Raises as `comparisons` does."""
        return [Demonstration(prompt=row.prompt, response=row.replies[0]) for row in self.rows("demonstrations", split)]

    def prompts(self, split: Split) -> list[PromptText]:
        """The distinct prompts, given or derived, each with the source and line where it first stands. Raises as `comparisons` does."""
        return [PromptText(text=row.prompt, metadata=row.origin) for row in self.rows("prompts", split)]

    def layout(self, line: str) -> str:
        """What a person typed, as the beginning of a conversation."""
        return self._layout.prompt(typed(line))

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """A byte-level BPE of what there is to imitate in training."""
        from pipeline.tasks.tokenizers import train_byte_bpe

        train_byte_bpe((text for row in self.rows("demonstrations", "train") for text in (row.prompt, row.replies[0])), folder, vocab_size=vocabulary)

    def shorter(self, prompt: str) -> Iterator[str]:
        """The prompt without its oldest exchange, without its two oldest, and so on: ever shorter. Nothing for data.too_long = "exclude"."""
        turns = self._turns.get(prompt) if self.data.too_long == "shorten" else None
        while turns and (turns := shorter(turns)):
            yield self._layout.prompt(turns)

    def all_rows(self, kind: Kind) -> list[Laid]:
        """The rows of a kind of both splits, in the order of the files; none where there is nothing to make them of."""
        return self._rows[kind]

    @property
    def layout_kind(self) -> str:
        """How turns become text: chat, roles or plain."""
        return self._layout.kind

    def rows(self, kind: Kind, split: Split) -> list[Laid]:
        """The rows behind `comparisons`, `demonstrations` or `prompts`, in the same order. Raises DataError when there are none."""
        if not (rows := self.all_rows(kind)):
            raise DataError(f"data.{kind}: must name a source, got none, and there is nothing to derive it from; give it, or data.comparisons")
        found = [row for row in rows if row.split == split]
        if not found:
            firsts = len({row.exchange.prompt[0] for row in rows})
            raise DataError(
                f"data.heldout: must leave {kind} on both sides, got none of {len(rows)} for {split} with {self.data.heldout:g}; their conversations begin in "
                f"{firsts} ways, and those that begin alike are on one side: {'raise' if split == 'heldout' else 'lower'} it, or give more rows"
            )
        return found

    @property
    def loaded(self) -> dict[Kind, Loaded]:
        """Each source that the recipe names: its rows as they were read, and what was left out."""
        return self._texts[0]

    @cached_property
    def _sources(self) -> dict[Kind, Loaded]:
        return {kind: load(kind, source, self.data) for kind, source in named(self.data).items()}

    @cached_property
    def _layout(self) -> Layout:
        return layout_of(self.data.template, [source.form for source in self._sources.values()], self._model)

    @cached_property
    def _texts(self) -> tuple[dict[Kind, Loaded], dict[Kind, list[Laid]]]:
        """The sources laid out. What a chat template refuses is a problem like any other."""
        loaded: dict[Kind, Loaded] = {}
        laid: dict[Kind, list[Laid]] = {}
        for kind, source in self._sources.items():
            rows, refused = [], []
            for exchange in source.exchanges:
                try:
                    rows.append(self._laid(exchange))
                except RowError as error:
                    refused.append(Problem(source=exchange.source, line=exchange.line, kind=error.kind, detail=error.detail))
            kept = tuple(row.exchange for row in rows)
            loaded[kind], laid[kind] = replace(source, exchanges=kept, problems=(*source.problems, *refused)), rows
            check_share(named(self.data)[kind], loaded[kind], self.data.max_excluded)
        return loaded, laid

    def _laid(self, exchange: Exchange) -> Laid:
        replies = tuple(self._layout.reply(reply) for reply in exchange.replies)
        return Laid(exchange=exchange, split=split_of(exchange.prompt, self.data.heldout), prompt=self._layout.prompt(exchange.prompt), replies=replies)

    @cached_property
    def _rows(self) -> dict[Kind, list[Laid]]:
        """Every kind, given or derived; derived rows that repeat each other are one."""
        given = self._texts[1]
        comparisons = given.get("comparisons", [])
        demonstrations = given.get("demonstrations") or _distinct([replace(row, replies=row.replies[:1]) for row in comparisons])
        prompts = _distinct([replace(row, replies=()) for row in given.get("prompts") or comparisons or demonstrations])
        return {"comparisons": comparisons, "demonstrations": demonstrations, "prompts": prompts}

    @cached_property
    def _turns(self) -> dict[str, Turns]:
        return {row.prompt: row.exchange.prompt for rows in self._rows.values() for row in rows}


def _distinct(rows: list[Laid]) -> list[Laid]:
    first: dict[tuple[str, tuple[str, ...]], Laid] = {}
    for row in rows:
        first.setdefault((row.prompt, row.replies), row)
    return list(first.values())
