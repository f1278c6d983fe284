"""What all pages share: the folder that is looked at, and a page's frame."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...artifacts.runs import Run, find_runs

LOOK = """
.nicegui-link, .run-link { color: #2456a6; text-decoration: underline; } .body--dark .nicegui-link, .body--dark .run-link { color: #8db4f2; }
.card-text table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; display: block; overflow-x: auto; }
.card-text th, .card-text td { border-bottom: 1px solid #8884; padding: .25rem .5rem; text-align: left; white-space: nowrap; }
.card-text h2 { font-size: 1.35rem; font-weight: 700; line-height: 1.3; } .card-text h3 { font-size: 1.1rem; font-weight: 700; margin-top: 1.2rem; line-height: 1.4; }
.card-text ul { list-style: disc; padding-left: 1.4rem; } .card-text pre { overflow-x: auto; background: #8882; padding: .6rem; }
.card-text img { max-width: 100%; background: #fff; }
"""


@dataclass(frozen=True)
class Audit:
    """An audit at work, in a process of its own."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]
    """What it writes to stderr."""


@dataclass
class Workbench:
    """What the pages share."""

    folder: Path
    device: str
    dtype: str
    audits: dict[str, "Audit"] = field(default_factory=dict)
    """Started from here, by the name of the folder they write."""

    def runs(self) -> list[Run]:
        return find_runs(self.folder)

    def run(self, name: str) -> Run | None:
        return next((run for run in self.runs() if run.name == name), None)


def known(bench: Workbench, name: str) -> Run | None:
    """A run by name; where there is none, a page that says so."""
    found = bench.run(name)
    if found is None:
        with frame("Not here"):
            say(f"There is no run called {name} in {bench.folder.name}.")
    return found


@contextmanager
def frame(title: str) -> Iterator[None]:
    """What every page has: a way back and one heading."""
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
        # What the library lets scroll can be reached by keyboard too.
        ui.run_javascript("document.querySelectorAll('.q-table__middle').forEach(part => part.tabIndex = 0)")


def say(text: str) -> Any:
    """A text as it is, with its line breaks."""
    from nicegui import ui

    return ui.label(text).classes("break-words whitespace-pre-wrap")


def base_of(run: Run) -> str:
    """How to name a run's base, at its commit if it came from the Hub; a local one by its last part."""
    base = run.content.get("base", {})
    if base.get("kind") == "hub" and base.get("revision"):
        return f"{base['name']}@{base['revision']}"
    return str(base.get("name", ""))
