"""Following runs from another terminal or another host, by what they write; nothing of them is touched."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...editing.errors import RequestError
from .board import Board
from .status import Row, rows_of

POLL_SECONDS = 2.0
PATIENCE = 5
"""Looks in a row that may fail: an audit that ends removes its working folder while it is read."""


def watch(folder: Path, board: Board) -> list[Row]:
    """Show how far the runs in a folder are until all have ended.

    Raises:
        RequestError: The folder holds no run.
    """
    rows: list[Row] = []
    with board:
        for rows in looks(folder):
            board.show(rows)
    return rows


def watch_as_json(folder: Path, say: Callable[[str], None]) -> list[Row]:
    """Say each change of a run as one line of JSON.

    Raises:
        RequestError: The folder holds no run.
    """
    before: dict[str, tuple[object, ...]] = {}
    rows: Sequence[Row] = []
    for rows in looks(folder):
        for row in rows:
            now = (row.state, row.stage, row.step)
            if before.get(row.name) != now:
                before[row.name] = now
                say(json.dumps({"time": round(time.time(), 3), **row.describe()}))
    return list(rows)


def looks(folder: Path) -> Iterator[list[Row]]:
    """The rows again and again, until all have ended."""
    failures = 0
    rows = rows_of(folder)
    while True:
        yield rows
        if all(row.has_ended for row in rows):
            return
        time.sleep(POLL_SECONDS)
        try:
            rows, failures = rows_of(folder), 0
        except RequestError:
            failures += 1
            if failures > PATIENCE:
                raise
