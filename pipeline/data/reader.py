"""The rows of a file, one at a time, each with its line number; a line that cannot be read becomes a Problem and the next one is read.

A file that is broken as a whole (a torn gzip, no Parquet, another schema) is refused: what it lost cannot be counted. Blank lines of JSON lines hold
no row. Left out: CSV, whose quoting differs from writer to writer.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.problems import DataError, Problem
from pipeline.data.sources import File

MAX_LINE = 1 << 26  # bytes: a file without line ends must not fill the memory
_GZIP, _BOM, _UTF16 = b"\x1f\x8b", b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """line: counted from 1; of Parquet, the row's number."""

    source: str
    line: int
    values: dict[str, Any]


def read(file: File, wanted: Sequence[Sequence[str]], columns: Sequence[str], max_rows: int = 0) -> Iterator[Row | Problem]:
    """The rows of a file and the problems of its lines, in order; at most `max_rows` of both, if that is not 0.

    wanted: alternatives, each the columns that make a row. Parquet has a schema, so it must hold one of them; of JSON each row is asked for itself.
    columns: those that are read, as far as they are there.
    Raises DataError naming the file when it is empty or broken as a whole.
    """
    rows = _parquet(file, wanted, columns) if file.path.endswith(".parquet") else _json_lines(file)
    empty = True
    for row in islice(rows, max_rows or None):
        empty = False
        yield row
    if empty:
        raise DataError(f"{file.name}: must have at least one row, got an empty file")


def _json_lines(file: File) -> Iterator[Row | Problem]:
    for number, line in _lines(file):
        if len(line) > MAX_LINE:
            yield Problem(source=file.name, line=number, kind="line too long", detail=f"more than {MAX_LINE} bytes")
            continue
        try:
            values = json.loads(line.decode("utf-8").rstrip())
        except UnicodeDecodeError as error:
            yield Problem(source=file.name, line=number, kind="not UTF-8", detail=f"byte {error.start + 1} of the line is {line[error.start]:#04x}")
        except (ValueError, RecursionError) as error:
            if number == 1 and line.lstrip().startswith(b"["):
                raise DataError(f"{file.name}: must have one JSON object a line, got a list over several lines; write each of its entries on a line") from error
            yield Problem(source=file.name, line=number, kind="broken JSON", detail=_json_fault(error))
        else:
            if isinstance(values, dict):
                yield Row(source=file.name, line=number, values=values)
            else:
                yield Problem(source=file.name, line=number, kind="not an object", detail=f"a {type(values).__name__}")


def _lines(file: File) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every line that is not blank. Raises DataError for what is no text, or a gzip that is torn or none."""
    number = 0
    try:
        with file.open() as raw:
            start = raw.read(2)
            raw.seek(0)
            if start in _UTF16:
                raise DataError(f"{file.name}: must be UTF-8, got UTF-16; convert it, such as by `iconv -f utf-16 -t utf-8`")
            packed = start == _GZIP
            if file.path.endswith(".gz") and not packed:
                raise DataError(f"{file.name}: must be gzip, as its name says, but does not begin as one; take .gz off its name if it is plain")
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            while line := _line(stream):
                number += 1
                if number == 1:
                    line = line.removeprefix(_BOM)
                if not line.isspace() and line:
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.name}: must be a whole gzip file, but it breaks off or is damaged after line {number} ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read after line {number}: {error}") from error


def _line(stream: Any) -> bytes:
    """The next line; of one with more than MAX_LINE bytes the first of them, one more than MAX_LINE."""
    line: bytes = stream.readline(MAX_LINE + 1)
    rest = line
    while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_LINE + 1)
    return line


def _parquet(file: File, wanted: Sequence[Sequence[str]], columns: Sequence[str]) -> Iterator[Row | Problem]:
    number = 0
    try:
        with file.open() as raw:
            table = pq.ParquetFile(raw)
            found = table.schema_arrow.names
            if not any(set(names) <= set(found) for names in wanted):
                choices = " or ".join(" and ".join(map(repr, names)) for names in wanted)
                raise DataError(f"{file.name}: must have the columns {choices}, got {found}; map their names under data.columns")
            for batch in table.iter_batches(batch_size=_BATCH, columns=[name for name in columns if name in found]):
                for row in range(batch.num_rows):
                    number += 1
                    yield _row(file, number, batch.slice(row, 1))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: must be a whole Parquet file, but cannot be read after row {number}: {_short(str(error))}; fetch it again") from error


def _row(file: File, number: int, row: pa.RecordBatch) -> Row | Problem:
    try:
        return Row(source=file.name, line=number, values=row.to_pylist()[0])
    except UnicodeDecodeError as error:  # Arrow does not look into text that others wrote
        return Problem(source=file.name, line=number, kind="not UTF-8", detail=_short(str(error)))


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1} of the line"
    return "nested too deeply" if isinstance(error, RecursionError) else _short(str(error))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."
