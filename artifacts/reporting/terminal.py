"""Text for the terminal: tables, lists, plans and commands to type next, under one width rule. Imports stay light.

A terminal gets lines that fit its width: 95% intervals give way first, column by column from the left, then long texts
are folded inside their column. A file or a pipe gets every line whole, without blanks at its end.
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

GAP = "  "
INTERVAL = re.compile(r"(?<=\S) \[[^\[\]]*\]$")
NARROWEST = 12
"""Characters below which no column is folded."""


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> str:
    """A table of aligned columns, at most ``width`` wide where that can be had; with an empty header, rows alone.

    >>> print(aligned(["model", "value"], [["a", "0.500 [0.400, 0.600]"]], 14))
    model  value
    a      0.500
    """
    cells = [list(header), *map(list, rows)] if any(header) else [list(row) for row in rows]
    if not cells:
        return ""
    count = len(cells[0])
    if width is not None:
        with_interval = [n for n in range(count) if any(INTERVAL.search(row[n]) for row in cells)]
        for column in with_interval[:-1]:
            if _width(cells) > width:
                _drop_intervals(cells, column)
        texts = [n for n in (0, count - 1) if n not in with_interval]
        if with_interval and width - _room_of_others(cells, texts) < _needed(cells, texts):
            _drop_intervals(cells, with_interval[-1])
        cells = _folded(cells, texts, width, has_header=any(header))
    widths = [max(len(row[n]) for row in cells) for n in range(count)]
    return "\n".join(GAP.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def tabbed(rows: Sequence[Sequence[str]]) -> str:
    """A table for other programs: one line a row, columns apart by one tab."""
    return "\n".join("\t".join(row) for row in rows)


def listed(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> str:
    """A list of names and what they stand for; in a pipe, with a tab between columns."""
    return tabbed(rows) if width is None else aligned(header, rows, width)


def bullets(sentences: Sequence[str], width: int | None, mark: str = "- ") -> str:
    """Sentences as a list; those that a terminal cannot hold on one line hang below their first word."""
    if width is None:
        return "\n".join(mark + sentence for sentence in sentences)
    return "\n".join(
        textwrap.fill(
            sentence,
            max(width, 20),
            initial_indent=mark,
            subsequent_indent=" " * len(mark),
            break_on_hyphens=False,
            break_long_words=False,
        )
        for sentence in sentences
    )


def paths(places: dict[str, Any]) -> str:
    """Where things were written, one line each."""
    longest = max(map(len, places))
    return "\n".join(f"{name:<{longest}}  {place}" for name, place in places.items())


def next_steps(commands: Sequence[str]) -> str:
    """Commands to go on with, each on a line that can be copied whole."""
    return "\n".join(f"{'next:' if place == 0 else '':<5}  {command}" for place, command in enumerate(commands))


def plan(content: dict[str, Any], width: int | None) -> str:
    """What a dry run would touch; bytes as megabytes."""
    rows = []
    for key, value in content.items():
        name = key.replace("_bytes", "").replace("bytes_", "").replace("_", " ")
        rows.append([name, f"{value / 1e6:,.1f} MB" if "bytes" in key else _plain(value)])
    return aligned(["", ""], rows, width)


def _plain(value: Any) -> str:
    """A value of a plan as words: of a model its name, of a list its parts."""
    if isinstance(value, dict):
        return str(value.get("name") or ", ".join(f"{key} {_plain(part)}" for key, part in value.items()))
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return ("; " if any("," in part for part in parts) else ", ").join(parts) or "none"
    return (
        "none"
        if value is None
        else {True: "yes", False: "no"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )


def _width(cells: Sequence[Sequence[str]]) -> int:
    return sum(max(len(row[n]) for row in cells) for n in range(len(cells[0]))) + len(GAP) * (len(cells[0]) - 1)


def _room_of_others(cells: Sequence[Sequence[str]], texts: Sequence[int]) -> int:
    """Width that is taken by everything but the text columns."""
    return _width(cells) - sum(max(len(row[n]) for row in cells) for n in set(texts))


def _needed(cells: Sequence[Sequence[str]], texts: Sequence[int]) -> int:
    """The least that text columns can be folded to."""
    return sum(min(max(len(row[n]) for row in cells), 2 * NARROWEST) for n in set(texts))


def _drop_intervals(cells: list[list[str]], column: int) -> None:
    for row in cells:
        row[column] = INTERVAL.sub("", row[column])


def _folded(cells: list[list[str]], texts: Sequence[int], width: int, *, has_header: bool) -> list[list[str]]:
    """The same cells with text columns, and headings longer than what stands below them, folded into several lines."""
    if _width(cells) <= width:
        return cells
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    for column in reversed(dict.fromkeys(texts)):
        spare = width - (sum(widths) + len(GAP) * (len(widths) - 1))
        widths[column] = max(min(NARROWEST, widths[column]), widths[column] + min(0, spare))
    if has_header and sum(widths) + len(GAP) * (len(widths) - 1) > width:
        for column in set(range(len(widths))) - set(texts):
            widths[column] = max(8, *(len(row[column]) for row in cells[1:]))
    return [line for row in cells for line in _lines(row, widths)]


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[list[str]]:
    parts = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    for number in range(max(map(len, parts))):
        yield [part[number] if number < len(part) else "" for part in parts]
