"""How far runs and jobs are, read from what they wrote, on any host that sees their folder."""

import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...artifacts.event_log import LastStage, last_stage
from ...artifacts.files.locks import is_held
from ...artifacts.runs import run_in
from ...editing.errors import RequestError
from ..common.run_folder import LOCK as WRITTEN
from ..common.run_folder import WORK
from .job import JOBS, LOCK, JobFolder, Record, State
from .local import is_alive
from .slurm import queued_numbers, read_numbers

SILENT = 600.0
"""Seconds without an event after which a run counts as stopped where no lock can tell."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    state: State
    stage: str = ""
    step: int | None = None
    total: int | None = None
    seconds: float = 0.0
    """Since it was started, or how long it took."""
    silent: float = 0.0
    """Seconds since its last event."""
    error: str = ""
    log: str = ""
    more: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state not in ("waiting", "running")

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {key: round(value, 1) if isinstance(value, float) else value for key, value in asdict(self).items()}


def rows_of(folder: Path) -> list[Row]:
    """The rows of a run, an audit, a folder of jobs, or a folder of any of these.

    Raises:
        RequestError: The folder is none of them.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; give the folder of a run, an audit, a sweep, or of several runs")
    rows = _rows_in(folder)
    if not rows:
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        rows = [row for path in inner for row in _rows_in(path, f"{path.name}/")]
    if not rows:
        raise RequestError(
            f"{folder} holds no run: no {WORK}, events.jsonl, checkpoint or jobs in it or in its folders; give the"
            " folder of a run, an audit, a sweep, or of several runs"
        )
    return rows


def rows_of_jobs(records: JobFolder) -> list[Row]:
    """One row for each job; of one that runs, its stage."""
    return [_row(records, records.read(name)) for name in records.names()]


def _rows_in(folder: Path, prefix: str = "") -> list[Row]:
    for place in (folder, folder / WORK):
        if (place / JOBS / "order.json").is_file():
            records = JobFolder(place)
            rows = _without_dead(records, [(row, records.read(row.name)) for row in rows_of_jobs(records)])
            return [_named(row, prefix + row.name) for row in rows]
    row = _row_of_run(folder)
    return [row if not prefix else _named(row, prefix.removesuffix("/"))] if row else []


def _named(row: Row, name: str) -> Row:
    return Row(**{**row.__dict__, "name": name})


def _row(records: JobFolder, record: Record) -> Row:
    log, now = str(records.log(record.name)), time.time()
    if record.state != "running":
        return Row(record.name, record.state, seconds=record.seconds, error=record.error, log=log, more=record.more)
    stage = last_stage(Path(record.events))
    # Events of an earlier attempt say nothing of this one.
    fresh = stage if stage and stage.time >= record.started - 1 else None
    return Row(record.name, "running", *_progress(fresh), now - record.started, now - _heard(fresh, record), log=log)


def _progress(stage: LastStage | None) -> tuple[str, int | None, int | None]:
    return ("starts", None, None) if stage is None else (stage.name, stage.step, stage.total)


def _heard(stage: LastStage | None, record: Record) -> float:
    return stage.time if stage else record.started


def _without_dead(records: JobFolder, rows: Sequence[tuple[Row, Record]]) -> list[Row]:
    """Jobs that say that they run or wait, but that nobody runs any more, are stopped."""
    runs = is_held(records.folder / LOCK) is not False
    numbers = {record.slurm for _, record in rows if record.slurm and record.state == "running"}
    queued = queued_numbers(numbers) if not runs else None
    checked = []
    for row, record in rows:
        gone = row.state == "running" and _is_dead(record, queued)
        gone |= row.state == "waiting" and not runs and not _waits_in_queue(records)
        checked.append(Row(row.name, "stopped", seconds=row.seconds, log=row.log) if gone else row)
    return checked


def _is_dead(record: Record, queued: set[str] | None) -> bool:
    if record.slurm:
        return queued is not None and record.slurm not in queued
    return record.host == socket.gethostname() and not is_alive(record.process)


def _waits_in_queue(records: JobFolder) -> bool:
    numbers = set(read_numbers(records).values())
    return bool(numbers & (queued_numbers(numbers) or set()))


def _row_of_run(folder: Path) -> Row | None:
    """A run or an audit without a job's record."""
    known = run_in(folder)
    events = folder / "events.jsonl"
    stage = last_stage(events) if events.is_file() else None
    if known is None and stage is None:
        return None
    name = folder.resolve().name
    if known is not None and known.state == "finished":
        return Row(name, "finished", seconds=stage.elapsed if stage else 0.0)
    silent = time.time() - stage.time if stage else 0.0
    held = is_held(folder / WORK / WRITTEN)
    # Without locks only silence tells that nobody is at work.
    if held is False or (held is None and silent > SILENT):
        return Row(name, "stopped", seconds=stage.elapsed if stage else 0.0)
    since = (stage.elapsed if stage else 0.0) + silent
    return Row(name, "running", *_progress(stage), since, silent)
