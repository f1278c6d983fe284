"""Jobs on a SLURM cluster, through submitit: an array whose jobs are requeued when they are preempted or out of time."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...artifacts.files.forms import Form, validated
from ...artifacts.files.opened import Telling
from ...artifacts.files.parsed import read_object
from ...artifacts.files.written import write_whole
from ...editing.errors import ExciseError, RequestError, one_line
from .engines import KEYS, Slurm
from .job import Job, JobFolder
from .local import start

REQUEUES = 100
"""How often submitit may requeue a job that is out of time: each time it goes on where it was."""
LOOK_SECONDS = 5.0
"""Between two looks at the queue."""
SEEN_GONE = 2
"""Looks in which a job must be gone before it counts as lost: its last record may still be on its way."""


class Attempt:
    """What submitit runs on a node: the job's process, until it ends or SLURM wants the node back."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self.process: subprocess.Popen[bytes] | None = None
        self.code: int | None = None
        """How the process ended."""

    def __call__(self) -> str:
        """Returns the state in which the job is left."""
        records = JobFolder(self.folder)
        # A node that SLURM believes dead may still work; its process ends or its file system lets go of the lock.
        with records.claimed(self.job.name, lambda: True) as descriptor:
            if records.read(self.job.name).state == "finished":
                return "finished"
            if self.job.is_complete():
                return records.update(self.job.name, state="finished", more="").state
            records.begin(self.job, _number())
            self.process = start(
                self.job, records, os.environ, pass_fds=(descriptor,), preexec_fn=_leave_signal_to_parent
            )
            records.update(self.job.name, process=self.process.pid)
            # In a thread: ``checkpoint`` runs in a signal's handler, where the lock of a wait that it interrupts never
            # comes free.
            threading.Thread(target=self._wait, args=(self.process,), daemon=True).start()
            return records.end(self.job, self._code()).state

    def checkpoint(self) -> Any:
        """Stop the process so that it can be resumed, and ask for another turn."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            os.kill(self.process.pid, signal.SIGTERM)
            self._code()
            JobFolder(self.folder).update(self.job.name, state="waiting", ended=time.time(), more="requeued")
        return DelayedSubmission(Attempt(self.job, self.folder))

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        self.code = process.wait()

    def _code(self) -> int:
        while self.code is None:
            time.sleep(0.1)
        return self.code

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}


FAILED_LAUNCH = "launch failed requeued held"
"""SLURM's words for a job that waits because a node could not start it."""


class SlurmRunner:
    """Submits jobs, and again those that were lost."""

    def __init__(self, folder: JobFolder, engine: Slurm, retries: int, enough: Callable[[], bool] = lambda: False):
        self.folder, self.engine, self.retries, self.enough = folder, engine, retries, enough
        self.jobs: dict[str, Job] = {}
        self.numbers = read_numbers(folder)
        """SLURM's number of each job that was submitted, also by an earlier command."""
        self.gone: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self.looked = 0.0
        self.notes: list[str] = []
        """What the user should be told."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand jobs to SLURM, except for those that it has already.

        Raises:
            ExciseError: SLURM takes none.
        """
        self.jobs |= {job.name: job for job in jobs}
        queued = queued_numbers(self.numbers.values()) or set()
        self._submit([job for job in jobs if self.numbers.get(job.name) not in queued])

    def poll(self) -> bool:
        """Look at the queue; whether any job is not over."""
        open_jobs = [job for name, job in self.jobs.items() if not self.folder.read(name).is_over]
        if time.monotonic() - self.looked >= LOOK_SECONDS:
            self.looked = time.monotonic()
            queued = queued_numbers(self.numbers.values())
            if queued is not None:
                self._submit_again([job for job in open_jobs if self.numbers.get(job.name) not in queued])
                self._release(open_jobs)
                if self.enough():
                    self._drop_waiting(open_jobs)
        return bool(open_jobs)

    def _drop_waiting(self, open_jobs: Sequence[Job]) -> None:
        """Take from the queue what would find nothing left to do, however long it would wait for a node."""
        waiting = queued_numbers(self.numbers.values(), "PENDING") or set()
        for job in open_jobs:
            if (number := self.numbers.get(job.name)) in waiting:
                subprocess.run(["scancel", number], check=False, capture_output=True)
                self.folder.update(job.name, state="finished", more="nothing was left to do")

    def _release(self, open_jobs: Sequence[Job]) -> None:
        """Let jobs go on that SLURM holds because a node could not start them, such as one that came back while their
        processes still ran there; held by nobody's wish, they would wait for ever."""
        stuck = failed_launches()
        for job in open_jobs:
            number = self.numbers.get(job.name)
            if number not in stuck:
                continue
            self.lost[job.name] = self.lost.get(job.name, 0) + 1
            if self.lost[job.name] > self.retries:
                error = f"could not be started {self.lost[job.name]} times; scontrol show job {number} says more"
                self.folder.update(job.name, state="failed", ended=time.time(), error=error)
                subprocess.run(["scancel", number], check=False, capture_output=True)
            else:
                self.notes.append(f"{job.name}: a node could not start it and SLURM held it; released, to go on")
                subprocess.run(["scontrol", "release", number], check=False, capture_output=True)

    def cancel(self) -> None:
        """Take all jobs from SLURM; they can be resumed."""
        if self.numbers:
            subprocess.run(["scancel", *dict.fromkeys(self.numbers.values())], check=False, capture_output=True)

    def how_to_cancel(self) -> str:
        """The command for it."""
        return " ".join(["scancel", *dict.fromkeys(number.split("_")[0] for number in self.numbers.values())])

    def _submit_again(self, absent: Sequence[Job]) -> None:
        """Jobs that left the queue without an end: the node was lost, or somebody cancelled them."""
        names = {job.name for job in absent}
        self.gone = {name: self.gone.get(name, 0) + 1 for name in names}
        lost = [job for job in absent if self.gone[job.name] >= SEEN_GONE and not self.folder.read(job.name).is_over]
        again = []
        for job in lost:
            del self.gone[job.name]
            self.lost[job.name] = self.lost.get(job.name, 0) + 1
            if self.lost[job.name] > self.retries:
                error = f"was lost {self.lost[job.name]} times (node, time or memory; see the log)"
                self.folder.update(job.name, state="failed", ended=time.time(), error=error)
            else:
                self.notes.append(f"{job.name}: left SLURM's queue before its end; submitted again, to go on")
                again.append(job)
        self._submit(again)

    def _submit(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            self.folder.update(job.name, state="waiting", more="")
        self.numbers |= dict(zip([job.name for job in jobs], _submitted(jobs, self.folder, self.engine), strict=True))
        write_whole(_numbers_file(self.folder), json.dumps({"numbers": self.numbers}))


class _Numbers(Form):
    numbers: dict[str, str]


def queued_numbers(known: Iterable[str], state: str = "") -> set[str] | None:
    """Which of these SLURM still has in its queue, in one state or in any; None where it does not answer."""
    if not set(known):
        return set()
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    command += [f"--states={state}"] if state else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(done.stdout.split())


def failed_launches() -> set[str]:
    """This user's jobs that SLURM requeued and holds, because a node could not start them. Those that somebody holds are
    not among them."""
    command = ["squeue", "--noheader", "--array", "--states=PENDING", "--format=%i %r", f"--user={os.getuid()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return set()
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return {number for number, _, reason in lines if reason.strip().strip("()") == FAILED_LAUNCH}


def _submitted(jobs: Sequence[Job], folder: JobFolder, engine: Slurm) -> list[str]:
    """SLURM's numbers of new jobs."""
    import submitit

    parameters: dict[str, Any] = {KEYS[key]: value for key, value in engine.parameters.items()}
    parameters["time"] = engine.minutes
    for key in ("cpus_per_task", "array_parallelism"):
        if key in parameters:
            parameters[key] = int(parameters[key])
    # Those that submitit has no name for.
    more: dict[str, Any] = {
        key: parameters.pop(key) for key in ("nodelist", "reservation", "mem", "gpus_per_node") if key in parameters
    }
    more["requeue"] = True
    executor = submitit.SlurmExecutor(folder.folder / "submitit", max_num_timeout=REQUEUES)
    executor.update_parameters(
        job_name=f"excise-{folder.place.name}",
        additional_parameters={key.replace("_", "-"): value for key, value in more.items()},
        **parameters,
    )
    try:
        with executor.batch():
            submitted = [executor.submit(Attempt(job, folder.folder.parent)) for job in jobs]
        return [job.job_id for job in submitted]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
        raise ExciseError(f"SLURM took no job: {one_line(error)}; check what --jobs slurm:... asks for") from error


def _numbers_file(folder: JobFolder) -> Path:
    return folder.folder / "submitted.json"


def read_numbers(folder: JobFolder) -> dict[str, str]:
    """SLURM's number of each job that was submitted.

    Raises:
        RequestError: The file is damaged.
    """
    path = _numbers_file(folder)
    if not path.is_file():
        return {}
    with Telling(RequestError, "remove it; jobs that SLURM still has would be submitted twice").about(path):
        return dict(validated(_Numbers, read_object(path)).numbers)


def _leave_signal_to_parent() -> None:
    # SLURM sends it to every process of the job; the job's own is stopped by ``checkpoint``.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _number() -> str:
    """SLURM's number of this job, as its queue shows it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")
