"""Progress on the error stream: bars on a terminal, plain lines in a file or a pipe."""

import sys
import threading
import time
from typing import Any, TextIO

SAY_AGAIN = 60.0
"""Seconds between two lines about the same stage, where there is no terminal."""
NO_LENGTH = 0.05
"""Seconds below which a stage is a note, which took no time worth telling."""
COUNTED_BELOW = 1_000_000
"""Totals from here on are bytes, which are shown as a share."""


class Terminal:
    """A ``Watcher`` that draws one bar a stage and leaves nothing behind but a line with its time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.console = Console(stderr=True)
        self.progress: Progress | None = None

    def start(self, stage: str, total: int | None) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        counted: list[ProgressColumn] = [BarColumn(bar_width=20)] if total else []
        if total and total < COUNTED_BELOW:
            counted.append(MofNCompleteColumn())
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *counted,
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task(stage, total=total, note="")
        self.progress.start()

    def advance(self, steps: int, metrics: dict[str, Any]) -> None:
        assert self.progress is not None
        if note := _note(metrics):
            self.progress.update(self.task, note=note)
        self.progress.advance(self.task, steps)

    def stop(self) -> None:
        if self.progress is None:
            return
        task = self.progress.tasks[0]
        self.progress.stop()
        elapsed = f" [dim]{task.elapsed:.1f} s[/dim]" if (task.elapsed or 0) >= NO_LENGTH else ""
        self.console.print(f"  {task.description}{elapsed}", highlight=False)
        self.progress = None


class PlainLines:
    """A ``Watcher`` for batch jobs: one line when a stage starts, and one a minute while it lasts."""

    def __init__(self, stream: TextIO | None = None, seconds: float = SAY_AGAIN) -> None:
        self.stream, self.seconds = stream or sys.stderr, seconds
        self.began = time.monotonic()
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.stage, self.total, self.done, self.note = "", 0, 0, ""

    def start(self, stage: str, total: int | None) -> None:
        self.stage, self.total, self.done, self.note = stage, total or 0, 0, ""
        self._say("")
        # A new event, because that of the stage before is set.
        self.ended = threading.Event()
        # A stage may take long between two steps, so the lines do not wait for one.
        self.thread = threading.Thread(target=self._say_again, args=(self.ended,), daemon=True)
        self.thread.start()

    def advance(self, steps: int, metrics: dict[str, Any]) -> None:
        self.done += steps
        self.note = _note(metrics) or self.note

    def stop(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def _say_again(self, ended: threading.Event) -> None:
        while not ended.wait(self.seconds):
            share = f": {self.done} of {self.total}" if 0 < self.total < COUNTED_BELOW else ""
            if self.total >= COUNTED_BELOW:
                share = f": {self.done / self.total:.0%}"
            self._say(share + (f", {self.note}" if self.note else ""))

    def _say(self, more: str) -> None:
        seconds = int(time.monotonic() - self.began)
        clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        self.stream.write(f"{clock}  {self.stage}{more}\n")
        self.stream.flush()


def _note(metrics: dict[str, Any]) -> str:
    return " ".join(f"{key} {value:.4g}" for key, value in list(metrics.items())[:2] if isinstance(value, float))
