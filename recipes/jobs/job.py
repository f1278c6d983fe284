"""One job of many: an excise command, and the record of how far it came, which any host can read."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ...artifacts.files.forms import Form, validated
from ...artifacts.files.locks import Lock
from ...artifacts.files.opened import Telling, lines_at_ends
from ...artifacts.files.parsed import read_object
from ...artifacts.files.written import write_whole
from ...editing.errors import RequestError
from ..common.run_folder import STARTED, WORK

JOBS = "jobs"
"""Folder with a record, a log and a lock of each job."""
LOCK = ".lock"
"""Of the folder: held by the command that runs its jobs."""
State = Literal["waiting", "running", "finished", "failed", "stopped"]


@dataclass(frozen=True)
class Job:
    """An excise command in a folder of its own, or one of several workers that share a folder.

    Example:
        >>> Job("seed-0", ("run", "elm", "--seed", "0"), Path("runs/seed-0"))
        Job(name='seed-0', command=('run', 'elm', '--seed', '0'), out=..., own_folder=True, events=None)
    """

    name: str
    """Tells it from the others, and names its log."""
    command: tuple[str, ...]
    """The arguments of ``excise``. With ``own_folder``, without ``--out`` and ``--resume``, which are added."""
    out: Path
    """The folder that it writes."""
    own_folder: bool = True
    """Whether nobody else writes ``out``. Otherwise a command that was cut short is started again as it is."""
    events: Path | None = None
    """Where it tells its progress; by default ``events.jsonl`` in ``out``."""

    def arguments(self) -> list[str]:
        """What to start now: the command from its beginning, or the rest of what is unfinished in its folder."""
        if not self.own_folder:
            return [*self.command]
        begun = (self.out / WORK / STARTED).is_file() or self.out.with_name(f".{self.out.name}.staging").is_dir()
        return [*self.command, "--out", str(self.out), *(["--resume"] if begun else [])]

    def is_complete(self) -> bool:
        """Whether its folder holds a whole run or audit, whoever made it."""
        if not self.own_folder or (self.out / WORK).exists():
            return False
        return (self.out / "checkpoint").is_dir() or (self.out / "audit.json").is_file()

    def clear_rests(self) -> None:
        """Remove what a kill left of a start before anything was written, so that the command starts afresh."""
        if not self.own_folder or not self.out.is_dir() or (self.out / WORK / STARTED).is_file():
            return
        if {path.name for path in self.out.iterdir()} <= {WORK}:
            shutil.rmtree(self.out)


Name = Annotated[str, Field(pattern=r"^[^/\x00]+$")]
PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]


class Record(Form):
    """What is known of a job."""

    name: Name
    command: list[str]
    out: PathText
    state: State
    events: PathText = ""
    own_folder: bool = True
    attempts: int = 0
    """How often it was started."""
    started: float = 0.0
    """When it was last started, in seconds since 1970."""
    ended: float = 0.0
    host: str = ""
    process: int = 0
    slurm: str = ""
    """SLURM's number of the job, while it is submitted."""
    exit_code: int | None = None
    error: str = ""
    """The line that it failed with."""
    more: str = ""
    """What is worth saying beside the state."""

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "failed")

    @property
    def seconds(self) -> float:
        """How long the last attempt took; 0 of what was never started or has not ended."""
        return max(0.0, self.ended - self.started) if self.started and self.ended else 0.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    state: Literal["finished", "failed"]
    error: str
    """The one line that it failed with; empty if it did not."""
    log: Path
    attempts: int
    seconds: float
    """Of its last attempt."""

    @property
    def failed(self) -> bool:
        return self.state == "failed"


class JobFolder:
    """The records of jobs in one folder, on a file system that all their hosts share."""

    def __init__(self, folder: Path):
        self.folder = folder / JOBS

    @property
    def place(self) -> Path:
        """The folder as users know it; an audit keeps its jobs in its working folder."""
        folder = self.folder.parent
        return folder.parent if folder.name == WORK else folder

    def log(self, name: str) -> Path:
        """Everything that a job printed, of all its attempts."""
        return self.folder / f"{name}.log"

    def names(self) -> list[str]:
        """Jobs in the order in which they were given."""
        if not (self.folder / "order.json").is_file():
            return []
        with _told(self.folder / "order.json"):
            return list(validated(_Order, read_object(self.folder / "order.json")).names)

    def is_finished(self, name: str) -> bool:
        """Whether a job of this name was run here and ended well."""
        return self._path(name).is_file() and self.read(name).state == "finished"

    def register(self, jobs: Sequence[Job]) -> None:
        """Begin a record of each new job; those that are there already must be of the same commands.

        Raises:
            RequestError: Two jobs share a name, or the folder holds jobs of another request.
        """
        names = [job.name for job in jobs]
        if doubled := sorted({name for name in names if names.count(name) > 1 or "/" in name}):
            raise RequestError(f"the job {doubled[0]!r} exists twice, or its name holds a '/'; give each its own name")
        self.folder.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            before = self.read(job.name) if self._path(job.name).is_file() else None
            if before is None:
                self.write(_new(job))
            elif before.command != [*job.command] or before.out != str(job.out):
                raise RequestError(
                    f"{self.place} holds a job {job.name} of another command"
                    f" (excise {' '.join(before.command)}); give another --out, or remove the folder first"
                )
        write_whole(self.folder / "order.json", json.dumps({"names": names}))

    def read(self, name: str) -> Record:
        """The record of a job.

        Raises:
            RequestError: It is damaged.
        """
        with _told(self._path(name)):
            return validated(Record, read_object(self._path(name)))

    def write(self, record: Record) -> None:
        """Replace a record, completely or not at all."""
        write_whole(self._path(record.name), record.model_dump_json())

    def update(self, name: str, **changes: object) -> Record:
        """Change some fields of a record."""
        record = self.read(name).model_copy(update=changes)
        self.write(record)
        return record

    def outcome(self, job: Job) -> Outcome:
        """How a job ended that is over."""
        record = self.read(job.name)
        state: Literal["finished", "failed"] = "finished" if record.state == "finished" else "failed"
        return Outcome(job, state, record.error, self.log(job.name), record.attempts, record.seconds)

    @contextmanager
    def claimed(self, name: str, while_waiting: Callable[[], bool]) -> Iterator[int | None]:
        """Hold a job's lock, also against other hosts; yields its descriptor.

        A child that inherits the descriptor keeps the lock as long as it lives, whatever becomes of its parent. So nobody
        starts a job a second time beside what an earlier command, or a lost node, left running.

        Args:
            while_waiting: Called every second while another process holds the lock; once it is False, None is yielded.
        """
        while (lock := Lock.take(self.folder / f"{name}.lock")) is None:
            if not while_waiting():
                yield None
                return
            time.sleep(1.0)
        try:
            yield lock.descriptor
        finally:
            lock.release()

    def begin(self, job: Job, slurm: str = "") -> Record:
        """Record that a job starts on this host."""
        record = self.read(job.name)
        changes = {"state": "running", "attempts": record.attempts + 1, "started": time.time(), "ended": 0.0}
        changes |= {"host": socket.gethostname(), "process": os.getpid(), "error": "", "exit_code": None, "more": ""}
        return self.update(job.name, **changes, **({"slurm": slurm} if slurm else {}))

    def end(self, job: Job, code: int) -> Record:
        """Record how its process ended."""
        error = "" if code == 0 else self._error_line(job.name, code)
        changes = {"state": state_of(code), "ended": time.time(), "exit_code": code, "error": error}
        return self.update(job.name, **changes)

    def _error_line(self, name: str, code: int) -> str:
        """The line with which excise ends, from the end of the log."""
        log = self.log(name)
        lines = [line for line in lines_at_ends(log, 1 << 16) if line.startswith("excise: ")] if log.is_file() else []
        if lines and code > 0:
            return lines[-1].removeprefix("excise: ")
        return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code} and no message"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class _Order(Form):
    names: list[Name]


def state_of(code: int) -> State:
    """What an exit code says: an error of excise's own would come again; anything else is worth another start."""
    return "finished" if code == 0 else "failed" if code in (1, 2) else "stopped"


def _new(job: Job) -> Record:
    return Record(
        name=job.name,
        command=[*job.command],
        out=str(job.out),
        state="waiting",
        events=str(job.events or job.out / "events.jsonl"),
        own_folder=job.own_folder,
    )


def _told(path: Path) -> AbstractContextManager[None]:
    return Telling(RequestError, "remove this file; the job then starts again").about(path)
