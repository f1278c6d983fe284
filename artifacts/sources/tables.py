"""Rows of a file, by the ending of its name: each an object of columns, with its place for messages."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...editing.errors import counted, one_line
from ..files.opened import MAX_LINE, Unreadable, read_text, regular_file, text_lines
from ..files.parsed import parse_json

MAX_WHOLE = 1 << 28
"""Bytes of the largest file that is read as one JSON value."""
MAX_DOCUMENT = 1 << 26
"""Bytes of the largest text that is one document."""
BATCH = 256
"""Rows of a parquet file that are read at once."""
TEXT = "text"
"""Column of what has no columns: the lines of a .txt file, and lists of texts."""


@dataclass(frozen=True)
class SourceRow:
    """One row of a source."""

    place: str
    """Where it stands, as messages tell it: ``texts.jsonl:12``."""
    number: int
    """Its number in the source, from 0."""
    columns: dict[str, Any]
    document: str | None = None
    """The file that it is the whole of."""


Numbered = Iterator[tuple[str, dict[str, Any]]]
"""Rows with the ends of their places: ``:12``, or `` row 12`` where a file has no lines."""


def rows_of(path: Path) -> Iterator[SourceRow]:
    """The rows of a file.

    Raises:
        Unreadable: It cannot be read as what its name says; the message has the line where there is one.
        OSError: It does not exist, or the system refuses it.
    """
    _refuse_archive(path)
    document = path.name if path.suffix.lower() == ".md" else None
    for number, (end, columns) in enumerate(READERS[path.suffix.lower()](path)):
        yield SourceRow(f"{path.name}{end}", number, columns, document)


def document_of(path: Path) -> SourceRow:
    """A text file as one document.

    Raises:
        Unreadable: It is no text in UTF-8, or too large.
        OSError: The system refuses it.
    """
    text = read_text(path, MAX_DOCUMENT).removeprefix("\ufeff")
    return SourceRow(path.name, 0, {TEXT: text}, path.name)


def _json_lines(path: Path) -> Numbered:
    first: type | None = None
    for number, line in text_lines(path):
        if line.strip():
            try:
                value = parse_json(line.strip())
            except Unreadable as error:
                raise Unreadable(f"line {number} {error}") from error
            first = first or type(value)
            yield f":{number}", _columns(value, first, f"line {number}")


def _json(path: Path) -> Numbered:
    rows = _listed(parse_json(read_text(path, MAX_WHOLE).removeprefix("\ufeff")))
    for number, row in enumerate(rows, start=1):
        yield f" row {number}", _columns(row, type(rows[0]), f"row {number}")


def _listed(value: Any) -> list[Any]:
    """The rows of a JSON value: a list, an object with one list in it, or an object of columns."""
    if isinstance(value, list):
        return value
    lists = {key: item for key, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    if len(lists) == 1:
        return next(iter(lists.values()))
    if len(lists) > 1 and len(lists) == len(value) and len({len(item) for item in lists.values()}) == 1:
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    keys = f" with the keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else ""
    raise Unreadable(
        f"it holds one value{keys}, not a list of rows; a list of objects, or an object of one list, is read"
    )


def _columns(row: Any, first: type, where: str) -> dict[str, Any]:
    """A row's columns; a list may be one of texts, but not of texts and objects."""
    if not isinstance(row, str | dict):
        raise Unreadable(f"{where} is neither an object nor a text")
    if not isinstance(row, first):
        raise Unreadable(f"{where} is {'a text' if isinstance(row, str) else 'an object'}, unlike the rows before it")
    return {TEXT: row} if isinstance(row, str) else row


def _separated(separator: str) -> Callable[[Path], Numbered]:
    def read(path: Path) -> Numbered:
        lines = text_lines(path)
        first = next(lines, None)
        if first is None:
            return
        # Spreadsheets of half the world write semicolons, because their numbers have commas.
        mark = ";" if separator == "," and "," not in first[1] and ";" in first[1] else separator
        texts = (line for pair in ((first,), lines) for _, line in pair)
        with _long_fields():
            reader = csv.reader(texts, delimiter=mark, strict=True)
            try:
                header = next(reader)
                if len(set(header)) != len(header):
                    raise Unreadable("line 1 names a column twice")
                for row in reader:
                    if row and len(row) != len(header):
                        raise Unreadable(
                            f"line {reader.line_num} has {counted(len(row), 'value', 'values')} for the {counted(len(header), 'column', 'columns')} of line 1"
                        )
                    if row:
                        yield f":{reader.line_num}", dict(zip(header, row, strict=True))
            except csv.Error as error:
                raise Unreadable(f"line {reader.line_num} is not as a table is written: {one_line(error)}") from error

    return read


@contextmanager
def _long_fields() -> Iterator[None]:
    """The library reads 131,072 characters a field unless told otherwise; papers are longer."""
    before = csv.field_size_limit(MAX_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    with regular_file(path) as file:
        try:
            number = 0
            for batch in parquet.ParquetFile(file).iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f" row {number}", row
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise Unreadable(f"not a whole parquet file: {one_line(error, 120)}") from error


def _text(path: Path) -> Numbered:
    for number, line in text_lines(path):
        if line.strip():
            yield f":{number}", {TEXT: line.strip()}


def _document(path: Path) -> Numbered:
    yield "", document_of(path).columns


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _document,
}
"""A .txt file has one text a line; a .md file is one document."""
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive", b"\x28\xb5\x2f\xfd": "a zstd archive"}


def _refuse_archive(path: Path) -> None:
    with regular_file(path) as file:
        start = file.read(4)
    for magic, name in ARCHIVES.items():
        if start.startswith(magic):
            raise Unreadable(f"it is {name}; unpack it")
