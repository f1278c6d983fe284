"""Runs and audits in a folder, read from the files that they wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..editing.errors import ExciseError
from ..eval.measurements import label_of, leads
from .reporting.audit_page import AUDIT
from .reporting.results import RESULTS, format_value, read_measurements
from .upgrade import read_json

CURVES = "curves"
"""Folder in which an unfinished audit keeps its curves, in its working folder."""


@dataclass(frozen=True)
class Run:
    """One line of a list."""

    name: str
    """Its folder, relative to the folder that was searched."""
    folder: Path
    kind: Literal["run", "audit"]
    state: Literal["finished", "unfinished", "not readable"]
    content: dict[str, Any]
    """Content of ``eval.json`` or ``audit.json``; empty unless the run is finished."""
    audit: dict[str, Any] | None = None
    """The audit of a run's checkpoint, if there is one."""

    @property
    def checkpoint(self) -> Path:
        """The folder with the run's model."""
        inner = self.folder / "checkpoint"
        return inner if inner.is_dir() else self.folder

    @property
    def main_change(self) -> str:
        """The run's main measurement before and after the edit, or the audit's verdict, as text."""
        if self.kind == "audit":
            return str(self.content.get("verdict", "")).replace("_", " ")
        items = {(m.name, m.split, m.subject): m for m in read_measurements(self.content)} if self.content else {}
        for name, split in leads():
            if edited := items.get((name, split, "edited")):
                base = items.get((name, split, "base"))
                before = f"{base.value:.3f} → " if base else ""
                return f"{label_of(name)}, {split}: {before}{format_value(edited)} (n = {edited.n})"
        return ""


def find_runs(folder: Path) -> list[Run]:
    """Runs and audits in a folder, its folders and theirs, newest first."""
    places = [folder, *_folders(folder), *(below for inner in _folders(folder) for below in _folders(inner))]
    runs = [run for place in places if (run := _read(folder, place))]
    return sorted(runs, key=lambda run: run.folder.stat().st_mtime, reverse=True)


def run_in(folder: Path) -> Run | None:
    """The run or audit in a folder itself; None where there is none."""
    return _read(folder, folder)


def _folders(folder: Path) -> Sequence[Path]:
    return (
        # Hidden folders are still being written.
        [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        if folder.is_dir()
        else []
    )


def _read(folder: Path, place: Path) -> Run | None:
    # They are inside a run and would be listed as runs of their own.
    if place.name in ("checkpoint", "adapter") and place != folder:
        return None
    name = place.relative_to(folder).as_posix() if place != folder else place.resolve().name
    for inner, kind, file in (
        (place / "checkpoint", "run", RESULTS),
        (place, "run", RESULTS),
        (place, "audit", "audit.json"),
    ):
        if (inner / file).is_file():
            try:
                content = read_json(inner / file)
                audit = read_json(inner / AUDIT) if (inner / AUDIT).is_file() else None
            except ExciseError:
                return Run(name, place, kind, "not readable", {})  # type: ignore[arg-type]
            return Run(name, place, kind, "finished", content, audit)  # type: ignore[arg-type]
    if (place / ".work").is_dir():
        audited = (place / ".work" / CURVES).is_dir()
        return Run(name, place, "audit" if audited else "run", "unfinished", {})
    return None
