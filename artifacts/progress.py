"""Progress on the terminal's error stream."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Terminal:
    """A ``Watcher`` that draws one bar a stage and leaves nothing behind but a line with its time."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.total: int | None = None

    def start(self, stage: str, total: int | None) -> None:
        counted = [BarColumn(bar_width=28), MofNCompleteColumn()] if total and total < 1_000_000 else []
        if total and not counted:
            counted = [BarColumn(bar_width=28)]
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"), console=self.console, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task(stage, total=total, note="")
        self.progress.start()

    def advance(self, steps: int, metrics: dict[str, Any]) -> None:
        assert self.progress is not None
        note = " ".join(f"{key} {value:.4g}" for key, value in list(metrics.items())[:2] if isinstance(value, float))
        if note:
            self.progress.update(self.task, note=note)
        self.progress.advance(self.task, steps)

    def stop(self) -> None:
        if self.progress is None:
            return
        task = self.progress.tasks[0]
        self.progress.stop()
        self.console.print(f"  {task.description} [dim]{task.elapsed or 0:.1f} s[/dim]", highlight=False)
        self.progress = None
