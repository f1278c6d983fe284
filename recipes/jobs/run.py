"""Run many excise commands on an engine: each one resumable, finished work never done twice."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...artifacts.files.locks import Lock
from ...editing.errors import ExciseError, RequestError
from .board import Board, board
from .engines import Engine, Local, parse_engine
from .job import LOCK, Job, JobFolder, Outcome
from .local import LocalRunner
from .slurm import SlurmRunner
from .status import rows_of_jobs

RETRIES = 3
"""How often a job is started again that was killed, or lost with its node. One that ended with an error is not."""
POLL_SECONDS = 0.5
SECOND_THOUGHT = 5.0
"""Seconds in which a second Ctrl-C cancels jobs on a cluster."""


class JobsInterrupted(ExciseError):
    """The user stopped the command; its jobs can be resumed."""

    exit_code = 130


def run_jobs(
    jobs: Sequence[Job],
    engine: Engine | str,
    folder: Path,
    *,
    retries: int = RETRIES,
    again: str = "the same command again",
    shown: Board | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Run jobs until each has finished or failed; one that fails holds up no other.

    Args:
        engine: ``local:N`` or ``slurm[:key=value,...]``, or what ``parse_engine`` made of it.
        folder: Holds ``jobs/`` with a record and a log of each, on a file system that all hosts share. Started again
            there, finished jobs are skipped, unfinished ones go on, and failed ones are tried again.
        retries: How often a job is started again that was killed or lost; one that ended with an error is not.
        again: What continues the jobs after an interrupt, for the message.
        shown: Where the state of all jobs is shown; by default on stderr.
        enough: Whether jobs that have not begun would find nothing left to do; a cluster then need not find a node for
            them. For workers that share what they do.

    Returns:
        How each ended, in the order of ``jobs``.

    Raises:
        RequestError: Jobs of another request are in the folder, or another process is running them.
        JobsInterrupted: By Ctrl-C. On this machine the jobs are stopped; on a cluster they go on, and a second Ctrl-C
            cancels them.

    Example:
        >>> jobs = [Job(f"seed-{n}", ("run", "elm", "--seed", str(n)), Path(f"runs/seed-{n}")) for n in range(3)]
        >>> run_jobs(jobs, "local:2", Path("runs"))  # doctest: +SKIP
    """
    engine = parse_engine(engine) if isinstance(engine, str) else engine
    records = JobFolder(folder)
    with _alone(records):
        records.register(jobs)
        waiting = [job for job in jobs if not _is_done(records, job)]
        runner = (
            LocalRunner(records, engine.at_once, retries)
            if isinstance(engine, Local)
            else SlurmRunner(records, engine, retries, enough)
        )
        with shown or board() as display:
            try:
                runner.submit(waiting)
                _follow(runner, records, display)
            except KeyboardInterrupt:
                raise _interrupted(runner, records, again, display) from None
        return [records.outcome(job) for job in jobs]


def _is_done(records: JobFolder, job: Job) -> bool:
    """Whether a job is finished; one that failed waits for another start."""
    record = records.read(job.name)
    if record.state == "finished" and (job.out.exists() or not job.own_folder):
        return True
    # What says that it runs may do so on another host, which then writes its end.
    if record.state not in ("running", "waiting"):
        records.update(job.name, state="waiting", attempts=0, error="", exit_code=None, more="")
    return False


def _follow(runner: LocalRunner | SlurmRunner, records: JobFolder, display: Board) -> None:
    while True:
        busy = runner.poll()
        display.show(rows_of_jobs(records), runner.notes)
        if not busy:
            return
        time.sleep(POLL_SECONDS)


def _interrupted(runner: LocalRunner | SlurmRunner, records: JobFolder, again: str, display: Board) -> JobsInterrupted:
    """Stop the jobs, or leave them to the cluster; what the user is told."""
    if isinstance(runner, LocalRunner):
        display.say("stopping the jobs; each leaves a folder that can be resumed")
        runner.stop()
        display.show(rows_of_jobs(records), runner.notes)
        return JobsInterrupted(f"interrupted; the jobs were stopped. Continue with {again}")
    try:
        display.say(f"the jobs go on without this command; Ctrl-C again within {SECOND_THOUGHT:.0f} s cancels them")
        time.sleep(SECOND_THOUGHT)
    except KeyboardInterrupt:
        runner.cancel()
        return JobsInterrupted(f"interrupted; the jobs were cancelled. Continue with {again}")
    return JobsInterrupted(
        f"interrupted; the jobs go on. Follow them with excise watch {records.place}, cancel them with"
        f" {runner.how_to_cancel()}; {again} collects what they made"
    )


@contextmanager
def _alone(records: JobFolder) -> Iterator[None]:
    """Hold the folder's lock: two commands would start each job twice."""
    records.folder.mkdir(parents=True, exist_ok=True)
    for _ in range(10):
        # `excise watch` looks at it for a moment.
        if (lock := Lock.take(records.folder / LOCK)) is not None:
            break
        time.sleep(0.1)
    else:
        raise RequestError(
            f"another command is running the jobs in {records.place}; follow it with excise watch {records.place}"
        )
    try:
        yield
    finally:
        lock.release()
