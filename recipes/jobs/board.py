"""The state of many jobs: one table that stays in its place on a terminal, else a line for each event."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from .status import Row

STATES = ("finished", "running", "waiting", "stopped", "failed")
SILENCE_SHOWN = 120.0
"""Seconds without an event from which on they are shown."""


class Board(Protocol):
    """Shows rows until it is left."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...
    def show(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None: ...
    def say(self, sentence: str) -> None: ...


def board(stream: TextIO | None = None, *, stages: bool = False) -> Board:
    """For stderr, or another stream; without a terminal, ``stages`` also gives a line to each new stage."""
    stream = stream or sys.stderr
    return TableBoard(stream) if stream.isatty() else LineBoard(stream, stages=stages)


class LineBoard:
    """One line for each change of a job's state, and for each note."""

    def __init__(self, stream: TextIO, *, stages: bool = False):
        """``stages``: also a line for each new stage."""
        self.stream, self.stages = stream, stages
        self.began = time.monotonic()
        self.seen: dict[str, tuple[str, ...]] = {}
        self.noted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def show(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        for note in notes[self.noted :]:
            self.say(note)
        self.noted = len(notes)
        for row in rows:
            now = (row.state, row.stage if self.stages else "")
            if self.seen.get(row.name, ("waiting", "")) != now:
                self.seen[row.name] = now
                self.say(_event(row))

    def say(self, sentence: str) -> None:
        self.stream.write(f"{clock(time.monotonic() - self.began)}  {sentence}\n")
        self.stream.flush()


class TableBoard:
    """A table that is drawn again in its place, and stays when it is left; failures and notes stand above it."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=stream)
        self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
        self.failed: set[str] = set()
        self.noted = 0

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.live.stop()

    def show(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        for note in notes[self.noted :]:
            self.say(note)
        self.noted = len(notes)
        for row in rows:
            if row.state == "failed" and row.name not in self.failed:
                self.failed.add(row.name)
                self.say(_event(row))
        self.live.update(_table(rows, self.console.height - 4), refresh=True)

    def say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, markup=False)


def counts(rows: Sequence[Row]) -> str:
    """How many jobs are in which state."""
    each = {state: sum(row.state == state for row in rows) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in each.items() if count)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def progress(row: Row) -> str:
    """Step and stage of a row that runs, and how long it says nothing; the step first, because a narrow terminal cuts the end."""
    text = row.stage
    if row.total and row.step is not None and row.total < 1_000_000:
        text = f"{min(row.step, row.total)}/{row.total} {text}"
    if row.state == "running" and row.silent > SILENCE_SHOWN:
        text += f" (no news for {clock(row.silent)})"
    return text or row.more


def _event(row: Row) -> str:
    more = f", {row.more}" if row.more else ""
    if row.state == "failed":
        return f"{row.name}: failed: {row.error}" + (f"; log: {row.log}" if row.log else "")
    if row.state == "running":
        return f"{row.name}: {progress(row)}"
    if row.state == "finished":
        return f"{row.name}: finished" + (f" after {clock(row.seconds)}" if row.seconds else "") + more
    return f"{row.name}: {row.state}{more}"


def _table(rows: Sequence[Row], most: int) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Those at work first where not all fit.
    places = {"running": 0, "stopped": 1, "failed": 2, "waiting": 3, "finished": 4}
    shown = rows if len(rows) <= most else sorted(rows, key=lambda row: places[row.state])[: max(1, most)]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold", min_width=12)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    # Only what may wrap gives way, the widest first; so the column may, and its texts do not.
    table.add_column()
    for row in shown:
        seconds = clock(row.seconds) if row.seconds else ""
        text = row.error if row.state == "failed" else progress(row)
        table.add_row(row.name, row.state, seconds, Text(text, no_wrap=True, overflow="ellipsis"))
    left = len(rows) - len(shown)
    return Group(table, f"{len(rows)} jobs: {counts(rows)}" + (f"; {left} not shown" if left else ""))
