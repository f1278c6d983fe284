"""A source of rows by its name: a file, a folder or a data set on the Hub, with what must be recorded of it."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...editing.errors import ConceptError, RequestError, counted, one_line
from ..files.opened import Unreadable, located, sha256_of
from .hub_sets import HUB, HubSet, open_hub_set
from .tables import READERS, SourceRow, document_of, rows_of

MOST = 4000
"""Rows that are drawn of one source, unless told otherwise."""
IN_FOLDER = (".txt", ".md", ".jsonl")
"""Files of a folder that are read: texts, each one document, and lines of rows."""

Keep = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Source:
    """Rows that were drawn of a source, and where they came from."""

    name: str
    """Its name in publications: a file's name without its path, or the Hub id with configuration, split and commit."""
    rows: tuple[SourceRow, ...]
    total: int
    """Rows that it holds, of which those were drawn."""
    license: str | None = None
    """What the Hub says of it; None for files."""
    sha256: str | None = None
    """SHA-256 of a file, or of the files of a folder; None for a data set on the Hub, whose name has its commit."""
    notes: tuple[str, ...] = ()
    """What was left out and why, in words."""

    @property
    def shown(self) -> str:
        """Its name without the commit, as messages tell it."""
        return self.name.partition("@")[0] if self.name.startswith(HUB) else self.name


def read_source(
    ref: str,
    most: int = MOST,
    *,
    keep: Keep | None = None,
    advance: Callable[[], None] | None = None,
) -> Source:
    """Rows of a source, drawn evenly from all of it where it holds more than ``most``; the same draw every time.

    Args:
        ref: A .jsonl, .json, .csv, .tsv, .parquet, .txt or .md file, a folder of .txt, .md and .jsonl files, or
            ``hub:ORG/NAME[:CONFIGURATION][:SPLIT][@REVISION]``.
        keep: Which rows count; all where none is given.
        advance: Called for every row that is read.

    Raises:
        RequestError: Nothing has that name, or the Hub refuses it.
        ConceptError: It cannot be read, or holds no row; the message names the line where there is one.

    Example:
        >>> read_source("texts.txt").rows[0].columns
        {'text': 'The first line.'}
    """
    if ref.startswith(HUB):
        return _of_hub(open_hub_set(ref), most, keep, advance)
    path = Path(ref)
    if path.is_dir():
        return _of_folder(path, most, keep, advance)
    if not path.is_file():
        raise RequestError(
            f"{ref} is neither a file nor a folder; give one, or a data set as hub:ORG/NAME[:CONFIGURATION][:SPLIT]"
        )
    if path.suffix.lower() not in READERS:
        raise RequestError(f"{path.name} ends in {path.suffix or 'nothing'}; files in {', '.join(READERS)} are read")
    rows, total = _drawn(path.name, _located(path, rows_of(path)), most, keep, advance)
    return Source(path.name, rows, total, sha256=sha256_of(path))


def _of_folder(folder: Path, most: int, keep: Keep | None, advance: Callable[[], None] | None) -> Source:
    # A broken link is listed too, and told when it is opened.
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    read = [path for path in visible if path.suffix.lower() in IN_FOLDER]
    if not read:
        raise RequestError(f"{folder} holds no file in {', '.join(IN_FOLDER)}; put some there, or name a file")
    name = f"{folder.resolve().name}/"
    rows, total = _drawn(name, _of_files(folder, read), most, keep, advance)
    digest = hashlib.sha256("".join(f"{path.relative_to(folder)} {sha256_of(path)}\n" for path in read).encode())
    left = len(visible) - len(read)
    others = counted(left, "other file was not read", "other files were not read")
    notes = (f"{name}: {others}, because only {', '.join(IN_FOLDER)} are",) if left else ()
    return Source(name, rows, total, sha256=digest.hexdigest(), notes=notes)


def _of_files(folder: Path, files: list[Path]) -> Iterator[SourceRow]:
    number = 0
    for path in files:
        named = path.relative_to(folder).as_posix()
        found = rows_of(path) if path.suffix.lower() == ".jsonl" else iter((path,))
        for row in _located(path, (document_of(one) if isinstance(one, Path) else one for one in found)):
            yield SourceRow(row.place, number, row.columns, named if row.document else None)
            number += 1


def _of_hub(found: HubSet, most: int, keep: Keep | None, advance: Callable[[], None] | None) -> Source:
    rows = (SourceRow(f"{found.name} row {n + 1}", n, row) for n, row in enumerate(found.rows()))
    drawn, total = _drawn(found.name, rows, most, keep, advance)
    return Source(found.name, drawn, total, license=found.license)


def _located(path: Path, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """The rows; what is wrong with the file is an error that names it.

    Raises:
        ConceptError: It cannot be read.
    """
    try:
        yield from rows
    except Unreadable as error:
        raise ConceptError(f"{located(path.name, error)}; correct it or give another file") from error
    except OSError as error:
        raise ConceptError(f"{path.name} cannot be read ({error.strerror or one_line(error)})") from error


def _drawn(
    name: str, rows: Iterable[SourceRow], most: int, keep: Keep | None, advance: Callable[[], None] | None
) -> tuple[tuple[SourceRow, ...], int]:
    """At most so many rows, each with the same chance, in their order, and how many there were.

    Source:
        Vitter 1985, algorithm R: one pass, and memory for what is drawn.
    """
    rng, drawn, total = random.Random(f"excise rows {name}"), list[SourceRow](), 0
    for row in rows:
        if advance:
            advance()
        if keep is not None and not keep(row.columns):
            continue
        total += 1
        if len(drawn) < most:
            drawn.append(row)
        elif (place := rng.randrange(total)) < most:
            drawn[place] = row
    if not total:
        raise ConceptError(f"{name} holds no row; give another source")
    return tuple(sorted(drawn, key=lambda row: row.number)), total
