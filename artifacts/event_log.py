"""Reading what runs told, which another host may still be writing; apart from ``events``, which every command imports."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..editing.errors import RequestError
from .files.forms import Form, validated
from .files.opened import Telling, Unreadable, lines_at_ends
from .files.parsed import parsed_object, read_lines
from .files.written import write_whole

ENDS = 1 << 16
"""Bytes at a file's beginning and at its end in which the first and the last events are looked for."""


class _Line(Form):
    stage: str
    step: int
    metrics: dict[str, Any]


class _TimedLine(_Line):
    time: float


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file, without lines that a kill cut or that hold something else.

    Raises:
        RequestError: It is no text file.
    """
    with Telling(RequestError, "remove it; only times and progress are lost").about(path):
        lines = list(read_lines(path))
    return _events(line for _, line in lines)


def _events(lines: Iterable[str], form: type[_Line] = _Line) -> list[dict[str, Any]]:
    events = []
    for line in lines:
        try:
            event = parsed_object(line)
            validated(form, event)
        except Unreadable:
            continue
        events.append(event)
    return events


@dataclass(frozen=True)
class LastStage:
    """Where a run is, from the last of its events."""

    name: str
    step: int
    total: int | None
    time: float
    """Of the last event, in seconds since 1970."""
    elapsed: float
    """Seconds from the first event to the last."""


def last_stage(path: Path) -> LastStage | None:
    """The stage that a file of events ends in, read from its end alone; None where it holds none.

    Another host may be writing it: lines that are cut, on either side, are left out.

    Raises:
        RequestError: It is no file, or no text.
    """
    if not path.exists():
        return None
    with Telling(RequestError, "remove it; only times and progress are lost").about(path):
        events = _events(lines_at_ends(path, ENDS), _TimedLine)
    if not events:
        return None
    last = events[-1]
    # A stage begins with its total; its further events tell figures of their own.
    begun = [event["metrics"]["total"] for event in events if event["stage"] == last["stage"] and _begins(event)]
    total = begun[-1] if begun and isinstance(begun[-1], int) else None
    elapsed = max(0.0, last["time"] - events[0]["time"])
    return LastStage(last["stage"], last["step"], total, float(last["time"]), elapsed)


def _begins(event: dict[str, Any]) -> bool:
    return event["step"] == 0 and "total" in event["metrics"]


def gather_events(parts: Sequence[Path], path: Path) -> None:
    """Write the events of several files, those that exist, into one, in the order of their times."""
    events = [event for part in parts if part.is_file() for event in read_events(part)]
    in_order = sorted(events, key=lambda event: event.get("time", 0.0))
    write_whole(path, "".join(json.dumps(event) + "\n" for event in in_order))
