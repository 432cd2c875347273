"""A source as checked rows: every row that is read is kept, or becomes a problem with its line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

from pipeline.data.config import DataConfig, Kind
from pipeline.data.dialects import other_names, recognise
from pipeline.data.exchange import Exchange, Form, exchange_of, form_of, wanted, with_own_columns
from pipeline.data.problems import DUPLICATE, NO_FAULT, Problem, RowError
from pipeline.data.reader import Row, read
from pipeline.data.sources import find
from pipeline.tasks.task import DataError

LOOK = 64  # first rows, which decide the form of a source
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSource:
    """The rows of a source, in the order of its files.

    read: file -> number of rows and unreadable lines. recognised: the names of another program's columns, in words; ""
    for our own.
    """

    kind: Kind
    form: Form
    exchanges: tuple[Exchange, ...]
    problems: tuple[Problem, ...]
    read: dict[str, int]
    recognised: str = ""


def load(kind: Kind, source: str, data: DataConfig) -> LoadedSource:
    """Read and check a source.

    Raises DataError when it cannot be read, has no usable row, or more faulty ones than data.max_excluded.
    """
    columns = data.columns
    files = find(source, f"data.{kind}")
    rows = chain.from_iterable(
        read(
            file,
            [*wanted(kind, columns), *other_names(kind)],
            (columns.messages, columns.ranking, columns.margin),
            data.max_rows,
        )
        for file in files
    )
    found = (with_own_columns(row, columns) if isinstance(row, Row) else row for row in rows)
    first = list(islice(found, LOOK))
    seen = [row for row in first if isinstance(row, Row)]
    columns, recognised = recognise(seen, kind, columns, source)
    data = data.model_copy(update={"columns": columns})
    form: Form = form_of(seen, kind, columns) if data.format == "auto" else data.format
    counted: Counter[str] = Counter()
    exchanges: list[Exchange] = []
    problems: list[Problem] = []
    for result in _without_duplicates(_checked(chain(first, found), kind, form, data)):
        counted[result.source] += 1
        if isinstance(result, Problem):
            problems.append(result)
        else:
            exchanges.append(result)
    loaded = LoadedSource(
        kind=kind,
        form=form,
        exchanges=tuple(exchanges),
        problems=tuple(problems),
        read=dict(counted),
        recognised=recognised,
    )
    check_share(source, loaded, data.max_excluded)
    return loaded


def _checked(rows: Iterable[Row | Problem], kind: Kind, form: Form, data: DataConfig) -> Iterator[Exchange | Problem]:
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield exchange_of(row, kind, form, data)
        except RowError as error:
            yield Problem(source=row.source, line=row.line, kind=error.kind, detail=error.detail)


def _without_duplicates(found: Iterable[Exchange | Problem]) -> Iterator[Exchange | Problem]:
    """Keep the first of equal rows.

    A row that prefers the same replies the other way round is kept, with a remark: people disagree.
    """
    seen: dict[tuple[object, ...], Exchange] = {}
    for row in found:
        if isinstance(row, Problem):
            yield row
            continue
        before = seen.get((row.prompt, row.replies))
        if before is not None:
            but = "" if row.metadata == before.metadata else ", whose other columns differ from this row's and are used"
            yield Problem(
                source=row.source,
                line=row.line,
                kind=DUPLICATE,
                detail=f"of line {before.line} of {before.source}{but}",
            )
            continue
        seen[row.prompt, row.replies] = row
        if len(row.replies) > 1 and (row.prompt, row.replies[::-1]) in seen:
            row = replace(row, remarks=(*row.remarks, "contradiction"))
        yield row


def check_share(source: str, loaded: LoadedSource, limit: float) -> None:
    """Raises DataError when a source has no usable row, or when more than `limit` of its rows are faulty."""
    faults = [problem for problem in loaded.problems if problem.kind not in NO_FAULT]
    rows = sum(loaded.read.values())
    if loaded.exchanges and len(faults) <= limit * rows:
        return
    listed = faults if loaded.exchanges else loaded.problems
    kinds = Counter(problem.kind for problem in listed)
    found = "; ".join(
        f"{count} x {kind} ({_lines([p for p in listed if p.kind == kind])})" for kind, count in kinds.most_common()
    )
    if not loaded.exchanges:
        raise DataError(
            f"data.{loaded.kind}: {source!r} must have at least one usable row, got none of {rows}: {found}"
        )
    raise DataError(
        f"data.max_excluded: at most {limit:g} of the rows of {source!r} may be faulty, got {len(faults)} of {rows}, "
        f"read as {loaded.form}: {found}; "
        "mend them, map data.columns, or raise the limit"
    )


def _lines(problems: list[Problem]) -> str:
    shown = ", ".join(str(problem.line) for problem in problems[:_SHOWN])
    detail = f": {problems[0].detail}" if problems[0].detail else ""
    return f"line {shown}{', ...' if len(problems) > _SHOWN else ''}{detail}"
