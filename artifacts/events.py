"""What a run is doing, as one JSON object a line, and as progress that someone may be watching."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol


class Watcher(Protocol):
    """Someone who is shown progress, such as a terminal."""

    def start(self, stage: str, total: int | None) -> None: ...
    def advance(self, steps: int, metrics: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


TELL_SECONDS = 10.0
"""Between two events that tell nothing but a step."""


class Stage:
    """One part of a run; ``advance`` counts its steps."""

    def __init__(self, events: "Events", name: str):
        self.events, self.name, self.step = events, name, 0
        self.written = time.monotonic()
        self.counts: dict[tuple[str, str], Any] = {}
        """By what is counted and the device that counts it."""

    def advance(self, steps: int = 1, **metrics: Any) -> None:
        self.step += steps
        if self.events.watcher:
            self.events.watcher.advance(steps, metrics)
        # Steps without figures are told now and then, to whoever watches from elsewhere.
        if metrics or time.monotonic() - self.written > TELL_SECONDS:
            self.written = time.monotonic()
            self.events.write(self.name, self.step, metrics)

    def counted(self) -> dict[str, int]:
        """What ``count`` was told while the stage lasted, by name."""
        sums: dict[str, int] = {}
        for (name, _), number in self.counts.items():
            sums[name] = sums.get(name, 0) + int(number)
        return sums


def count(name: str, number: Any) -> None:
    """Add to what the stage in progress counts, if there is one; its last event tells the sums.

    Args:
        number: An integer, or a tensor that holds one: it is read once, at the stage's end.
    """
    stage = _STAGE.get()
    if stage is not None:
        key = name, str(getattr(number, "device", ""))
        stage.counts[key] = stage.counts.get(key, 0) + number


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
        token, outer = _BUSY.set(self.watcher is not None), _STAGE.set(stage)
        try:
            yield stage
        finally:
            _STAGE.reset(outer)
            _BUSY.reset(token)
            if self.watcher:
                self.watcher.stop()
        # Not in ``finally``, so that a stage that failed gets no line that says how long it took.
        self.write(name, stage.step, {"seconds": round(time.monotonic() - started, 2), **stage.counted()})


SHOWN_AFTER = 2.0
"""Seconds after which a late stage is announced."""
_WAITING: ContextVar[Callable[[], Watcher] | None] = ContextVar("_WAITING", default=None)
"""Makes a watcher for what takes long before there are events."""
_STAGE: ContextVar[Stage | None] = ContextVar("_STAGE", default=None)
"""The stage in progress, the innermost of several."""
_BUSY: ContextVar[bool] = ContextVar("_BUSY", default=False)
"""Whether a stage is shown already."""


@contextmanager
def waited_for(watcher: Callable[[], Watcher] | None) -> Iterator[None]:
    """Within this context, late stages are shown by a watcher that is made when one is needed."""
    token = _WAITING.set(watcher)
    try:
        yield
    finally:
        _WAITING.reset(token)


@contextmanager
def late_stage(name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A part of the work that is mostly too short to be announced; it is, once it has lasted two seconds.

    Args:
        name: What is done.
        total: Its steps, if they are known.

    Returns:
        A function that counts steps. Nothing is shown outside of ``waited_for``, or where another stage is shown.
    """
    watcher = _WAITING.get()
    if watcher is None or _BUSY.get():
        yield lambda _: None
        return
    late = _Late(name, total, watcher)
    try:
        yield late.advance
    finally:
        late.end()


class _Late:
    """Counts from the beginning, and tells a watcher once its time has come."""

    def __init__(self, name: str, total: int | None, make: Callable[[], Watcher]):
        self.name, self.total, self.make = name, total, make
        self.watcher: Watcher | None = None
        self.done, self.ended = 0, False
        # The timer calls from another thread.
        self.lock = threading.Lock()
        self.timer = threading.Timer(SHOWN_AFTER, self.show)
        self.timer.daemon = True
        self.timer.start()

    def show(self) -> None:
        with self.lock:
            if not self.ended:
                self.watcher = self.make()
                self.watcher.start(self.name, self.total)
                self.watcher.advance(self.done, {})

    def advance(self, steps: int) -> None:
        with self.lock:
            self.done += steps
            if self.watcher:
                self.watcher.advance(steps, {})

    def end(self) -> None:
        self.timer.cancel()
        with self.lock:
            self.ended = True
            if self.watcher:
                self.watcher.stop()
