"""What all pages share: the folder of runs, and the frame of a page."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...artifacts.runs import Run, find_runs

LOOK = """
.nicegui-link, .run-link { color: #2456a6; text-decoration: underline; }
.body--dark .nicegui-link, .body--dark .run-link { color: #8db4f2; }
.card-text table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; display: block; overflow-x: auto; }
.card-text th, .card-text td {
  border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: left; white-space: nowrap;
}
.card-text h2 { font-size: 1.35rem; font-weight: 700; line-height: 1.3; }
.card-text h3 { font-size: 1.1rem; font-weight: 700; margin-top: 1.2rem; line-height: 1.4; }
.card-text ul { list-style: disc; padding-left: 1.4rem; }
.card-text pre { overflow-x: auto; background: #8882; padding: .6rem; }
.card-text img { max-width: 100%; background: #fff; }
"""


@dataclass(frozen=True)
class Audit:
    """A running audit, in a separate process."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    """Its stderr."""


@dataclass
class Workbench:
    """The folder of runs, the device to compute on, and the audits in progress."""

    folder: Path
    device: str
    dtype: str
    audits: dict[str, "Audit"] = field(default_factory=dict)
    """Audits started from this page, by the name of their folder."""

    def runs(self) -> list[Run]:
        return find_runs(self.folder)

    def run(self, name: str) -> Run | None:
        return next((run for run in self.runs() if run.name == name), None)


def known(bench: Workbench, name: str) -> Run | None:
    """A run by name; if there is none, show a page that says so and return None."""
    run = bench.run(name)
    if run is None:
        with frame("Not found"):
            say(f"There is no run called {name} in {bench.folder.name}.")
    return run


@contextmanager
def frame(title: str) -> Iterator[None]:
    """The frame of every page: a link back to all runs, and one heading."""
    from nicegui import ui

    ui.page_title(f"{title} · excise")
    ui.colors(primary="#2456a6")
    ui.add_css(LOOK)
    with ui.column().classes("w-full max-w-6xl mx-auto gap-4"):
        with ui.element("nav").props('aria-label="Pages"'):
            ui.link("All runs", "/")
        with ui.element("h1").classes("text-2xl font-bold break-words"):
            say(title)
        yield
        # Makes scrollable tables reachable by keyboard; the library does not.
        ui.run_javascript("document.querySelectorAll('.q-table__middle').forEach(part => part.tabIndex = 0)")


def say(text: str) -> Any:
    """Show plain text, with its line breaks."""
    from nicegui import ui

    return ui.label(text).classes("break-words whitespace-pre-wrap")


def base_of(run: Run) -> str:
    """Reference of a run's base: with its commit if it came from the Hub, the folder's name if it is local."""
    base = run.content.get("base", {})
    if base.get("kind") == "hub" and base.get("revision"):
        return f"{base['name']}@{base['revision']}"
    return str(base.get("name", ""))
