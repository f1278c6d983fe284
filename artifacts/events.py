"""What a run is doing, as one JSON object a line, and as progress that someone may be watching."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..editing.errors import RequestError
from .files.forms import Form, validated
from .files.opened import Telling, Unreadable
from .files.parsed import parsed_object, read_lines


class Watcher(Protocol):
    """Someone who is shown progress, such as a terminal."""

    def start(self, stage: str, total: int | None) -> None: ...
    def advance(self, steps: int, metrics: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class _Line(Form):
    stage: str
    step: int
    metrics: dict[str, Any]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file, without lines that a kill cut or that hold something else.

    Raises:
        RequestError: It is no text file.
    """
    events = []
    with Telling(RequestError, "remove it; only times and progress are lost").about(path):
        lines = list(read_lines(path))
    for _, line in lines:
        try:
            event = parsed_object(line)
            validated(_Line, event)
        except Unreadable:
            continue
        events.append(event)
    return events


class Stage:
    """One part of a run; ``advance`` counts its steps."""

    def __init__(self, events: "Events", name: str):
        self.events, self.name, self.step = events, name, 0

    def advance(self, steps: int = 1, **metrics: Any) -> None:
        self.step += steps
        if self.events.watcher:
            self.events.watcher.advance(steps, metrics)
        if metrics:
            self.events.write(self.name, self.step, metrics)


class Events:
    """Appends to ``events.jsonl`` (time, stage, step, metrics) and tells a watcher."""

    def __init__(self, path: Path | None = None, watcher: Watcher | None = None):
        self.path, self.watcher = path, watcher

    def write(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = {"time": round(time.time(), 3), "stage": stage, "step": step, "metrics": metrics}
        # Opened and closed for each line, so that a killed run keeps all lines that it wrote.
        with self.path.open("ab+") as file:
            if file.tell():
                # A kill may have cut the last line; the next one must not be joined to it.
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")

    def note(self, sentence: str) -> None:
        """Tell the watcher one sentence about the run, between two stages; the file gets it as a stage of no length."""
        with self.stage(sentence):
            pass

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Announce a part of the run, in ``total`` steps if that is known."""
        started = time.monotonic()
        stage = Stage(self, name)
        self.write(name, 0, {"total": total})
        if self.watcher:
            self.watcher.start(name, total)
        try:
            yield stage
        finally:
            if self.watcher:
                self.watcher.stop()
        # Not in ``finally``, so that a stage that failed gets no line that says how long it took.
        self.write(name, stage.step, {"seconds": round(time.monotonic() - started, 2)})
