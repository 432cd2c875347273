"""The rows of a file, one at a time, each with its line number; a line that cannot be read becomes a Problem.

A file that is broken as a whole (a torn gzip, no Parquet, another schema) is refused, because nobody could count what
it lost. Blank lines hold no row.

    .jsonl           one object a line
    .json            the same, or one array of objects, counted from 1; it is read only if all of it is JSON
    .csv             RFC 4180 with commas and a first line of names; an empty cell is null; a row is known by
                     the line where it begins
    .parquet         rows are counted from 1

Left out: CSV with other separators, which would have to be guessed.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.metadata import Unreadable
from pipeline.data.problems import Problem
from pipeline.data.sources import File
from pipeline.tasks.task import DataError

MAX_LINE = 1 << 26  # bytes: a file without line ends must not fill the memory
_GZIP, _UTF16 = b"\x1f\x8b", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a file. line: counted from 1; in Parquet and in a JSON array, the number of the row."""

    source: str
    line: int
    values: dict[str, Any]


def read(
    file: File, wanted: Sequence[Sequence[str]], structured: Collection[str], max_rows: int = 0
) -> Iterator[Row | Problem]:
    """The rows of a file and the problems of its lines, in order; at most `max_rows` of both, if that is not 0.

    wanted: alternatives, each the columns that make a row. Parquet and CSV name their columns once, so they must hold
    one of them; of JSON each row is asked for itself. structured: columns that hold lists or numbers, which CSV writes
    as JSON. Raises DataError naming the file when it is empty or broken as a whole.
    """
    name = file.path.removesuffix(".gz")
    if name.endswith(".parquet"):
        rows = _parquet(file, wanted)
    elif name.endswith(".csv"):
        rows = _csv(file, wanted, structured)
    else:
        rows = _json_array(file) if name.endswith(".json") and _begins_an_array(file) else _json_lines(file)
    empty = True
    for row in islice(rows, max_rows or None):
        empty = False
        yield row
    if empty:
        raise DataError(f"{file.name}: must have at least one row, got an empty file")


def _json_lines(file: File) -> Iterator[Row | Problem]:
    for number, line in _lines(file):
        if line.isspace():
            continue
        if len(line) > MAX_LINE:
            yield Problem(source=file.name, line=number, kind="line too long", detail=f"more than {MAX_LINE} bytes")
            continue
        try:
            values = json.loads(line.decode("utf-8").rstrip())
        except UnicodeDecodeError as error:
            yield Problem(
                source=file.name,
                line=number,
                kind="not UTF-8",
                detail=f"byte {error.start + 1} of the line is {line[error.start]:#04x}",
            )
        except (ValueError, RecursionError) as error:
            if number == 1 and line.lstrip().startswith(b"["):
                raise DataError(
                    f"{file.name}: must have one JSON object a line, got a list over several lines; write each of its "
                    "entries on a line, or call it .json"
                ) from error
            yield Problem(source=file.name, line=number, kind="broken JSON", detail=_json_fault(error))
        else:
            if isinstance(values, dict):
                yield Row(source=file.name, line=number, values=values)
            else:
                yield Problem(source=file.name, line=number, kind="not an object", detail=f"a {type(values).__name__}")


def _lines(file: File, limit: int = 0) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every line, its end included; a line longer than the limit is cut to one byte more than it.

    limit: in bytes; 0: MAX_LINE. Raises DataError for a file in UTF-16, and for a gzip that is torn or none.
    """
    number = 0
    try:
        with file.open() as raw:
            start = raw.read(2)
            raw.seek(0)
            if start in _UTF16:
                raise DataError(
                    f"{file.name}: must be UTF-8, got UTF-16; convert it, such as by `iconv -f utf-16 -t utf-8`"
                )
            packed = start == _GZIP
            if file.path.endswith(".gz") and not packed:
                raise DataError(
                    f"{file.name}: must be gzip, as its name says, but does not begin as one; take .gz off its name if "
                    "it is plain"
                )
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            while line := _line(stream, limit or MAX_LINE):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line:
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file.name}: must be a whole gzip file, but it breaks off or is damaged after line {number} ({error}); "
            "fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read after line {number}: {error}") from error


def _line(stream: Any, limit: int) -> bytes:
    """The next line; one that is longer than the limit is cut to limit + 1 bytes."""
    line: bytes = stream.readline(limit + 1)
    rest = line
    while len(rest) > limit and not rest.endswith(b"\n"):
        rest = stream.readline(limit + 1)
    return line


def _begins_an_array(file: File) -> bool:
    start = next((line.lstrip() for _, line in _lines(file) if not line.isspace()), b"")
    return start.startswith(b"[")


def _json_array(file: File) -> Iterator[Row | Problem]:
    """The rows of a file that is one list of objects; all of it is read at once."""
    try:
        entries = json.loads(b"".join(line for _, line in _lines(file, sys.maxsize - 1)).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name}: must be UTF-8, but byte {error.start + 1} is {error.object[error.start]:#04x}; convert it"
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}: {error.msg}"
        raise DataError(
            f"{file.name}: must be one list of JSON objects, or one object a line, but breaks off or is damaged at "
            f"{place}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file.name}: must be one list of JSON objects, or one object a line, but is {_json_fault(error)}"
        ) from error
    for number, values in enumerate(entries, 1):
        if isinstance(values, dict):
            yield Row(source=file.name, line=number, values=values)
        else:
            yield Problem(source=file.name, line=number, kind="not an object", detail=f"a {type(values).__name__}")


def _csv(file: File, wanted: Sequence[Sequence[str]], structured: Collection[str]) -> Iterator[Row | Problem]:
    csv.field_size_limit(MAX_LINE)
    lines = csv.reader((line.decode("utf-8", "surrogateescape") for _, line in _lines(file)), strict=True)
    names: list[str] | None = None
    while True:
        number = lines.line_num + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield Problem(source=file.name, line=number, kind="broken CSV", detail=_short(str(error)))
            continue
        if not cells or (len(cells) == 1 and names is not None and len(names) > 1 and not cells[0].strip()):
            continue
        if names is None:
            names = _header(file, cells, wanted)
        elif len(cells) != len(names):
            yield Problem(
                source=file.name,
                line=number,
                kind="broken CSV",
                detail=f"{len(cells)} cells, the first line has {len(names)}",
            )
        elif torn := next((cell for cell in cells if any("\udc80" <= letter <= "\udcff" for letter in cell)), ""):
            yield Problem(
                source=file.name,
                line=number,
                kind="not UTF-8",
                detail=f"in the cell {torn.encode('utf-8', 'replace')!r:.40}",
            )
        else:
            values = {name: _cell(cell, name in structured) for name, cell in zip(names, cells, strict=True)}
            yield Row(source=file.name, line=number, values=values)


def _header(file: File, names: list[str], wanted: Sequence[Sequence[str]]) -> list[str]:
    if len(set(names)) < len(names):
        raise DataError(f"{file.name}: must have a first line of different names, got {names}"[:400])
    _check_columns(file, names, wanted)
    return names


def _cell(cell: str, is_structured: bool) -> Any:
    if not cell:
        return None
    if is_structured:
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell  # the reader of the row refuses it if it needs a list or a number
    return cell


def _check_columns(file: File, found: list[str], wanted: Sequence[Sequence[str]]) -> None:
    if not any(set(names) <= set(found) for names in wanted):
        choices = " or ".join(" and ".join(map(repr, names)) for names in wanted)
        raise DataError(
            f"{file.name}: must have the columns {choices}, got {found}; map their names under data.columns"
        )


def _parquet(file: File, wanted: Sequence[Sequence[str]]) -> Iterator[Row | Problem]:
    number = 0
    try:
        with file.open() as raw:
            table = pq.ParquetFile(raw)
            _check_columns(file, table.schema_arrow.names, wanted)
            needed = {name for names in wanted for name in names}
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in range(batch.num_rows):
                    number += 1
                    yield _row(file, number, batch.slice(row, 1), needed)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.name}: must be a whole Parquet file, but cannot be read after row {number}: {_short(str(error))}; "
            "fetch it again"
        ) from error


def _row(file: File, number: int, row: pa.RecordBatch, needed: Collection[str]) -> Row | Problem:
    values: dict[str, Any] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:  # Arrow does not check the text of a file
            if name in needed:
                return Problem(source=file.name, line=number, kind="not UTF-8", detail=_short(str(error)))
            values[name] = Unreadable()
        except (ValueError, OverflowError, pa.ArrowException):  # a time that Python has no name for
            values[name] = Unreadable()
    return Row(source=file.name, line=number, values=values)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1} of the line"
    return "nested too deeply" if isinstance(error, RecursionError) else _short(str(error))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."
