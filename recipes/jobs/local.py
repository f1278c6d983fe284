"""Jobs as processes on this machine, some at once."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from .engines import own_cores, threads_each, visible_gpus
from .fork_server import Forked, fork_server
from .job import Job, JobFolder

PATIENCE = 30.0
"""Seconds in which a stopped job may leave its folder in order before it is killed."""


def start(job: Job, folder: JobFolder, environment: Mapping[str, str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a job's process, which prints into its log and holds its lock.

    Args:
        options: For ``Popen``, such as the descriptors to pass on.
    """
    job.clear_rests()
    with folder.log(job.name).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "excise", *job.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environment),
            # Ctrl-C in the terminal reaches the whole group; the jobs are stopped one by one instead.
            start_new_session=True,
            **options,
        )


class LocalRunner:
    """Runs jobs, ``at_once`` of them at a time, in threads that wait for their processes."""

    def __init__(self, folder: JobFolder, at_once: int, retries: int):
        self.folder, self.retries = folder, retries
        self.at_once = at_once
        self.waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self.guard, self.stopping = threading.Lock(), False
        self.fault: BaseException | None = None
        self.threads: list[threading.Thread] = []
        self.notes: list[str] = []
        """What the user should be told."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start to work through them."""
        for job in jobs:
            self.waiting.put(job)
        count = min(self.at_once, len(jobs))
        gpus = visible_gpus()
        for slot in range(count):
            environment = _environment(self.at_once, gpus, slot)
            thread = threading.Thread(target=self._work, args=(environment,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def poll(self) -> bool:
        """Whether any job is not over.

        Raises:
            Exception: What went wrong in a thread.
        """
        if self.fault:
            raise self.fault
        return any(thread.is_alive() for thread in self.threads)

    def stop(self) -> None:
        """Stop all jobs in a way that they can be resumed; returns when their processes have ended."""
        with self.guard:
            self.stopping = True
            running = list(self.processes.values())
        for process in running:
            process.terminate()
        try:
            for thread in self.threads:
                thread.join(PATIENCE)
        finally:
            # After that long, or after another Ctrl-C.
            for process in running:
                if process.poll() is None:
                    process.kill()
            for thread in self.threads:
                thread.join(PATIENCE)

    def _work(self, environment: Mapping[str, str]) -> None:
        try:
            while not self.stopping:
                try:
                    job = self.waiting.get_nowait()
                except queue.Empty:
                    return
                self._run(job, environment)
        except BaseException as error:  # noqa: BLE001  the main thread raises it
            self.fault = error

    def _run(self, job: Job, environment: Mapping[str, str]) -> None:
        for attempt in range(self.retries + 1):
            with self.folder.claimed(job.name, lambda: self._waits(job)) as descriptor:
                code = None if descriptor is None else self._run_once(job, environment, descriptor)
            if code is None or self.stopping or self.folder.read(job.name).is_over:
                return
            if attempt == self.retries:
                self.folder.update(job.name, state="failed")

    def _waits(self, job: Job) -> bool:
        note = f"{job.name}: waits for its process of an earlier command, which is still running"
        if note not in self.notes:
            self.notes.append(note)
        return not self.stopping

    def _run_once(self, job: Job, environment: Mapping[str, str], descriptor: int) -> int | None:
        with self.guard:
            if self.stopping or self.folder.read(job.name).state == "finished":
                return None
            if job.is_complete():
                self.folder.update(job.name, state="finished", more="")
                return None
            self.folder.begin(job)
            process = self._start(job, environment, descriptor)
            self.processes[job.name] = process
        self.folder.update(job.name, process=process.pid)
        code = process.wait()
        with self.guard:
            del self.processes[job.name]
        self.folder.end(job, code)
        return code

    def _start(self, job: Job, environment: Mapping[str, str], descriptor: int) -> "subprocess.Popen[bytes] | Forked":
        """Its process: a copy of one that has imported what it needs, where that is possible."""
        if (server := fork_server()) is not None:
            job.clear_rests()
            with self.folder.log(job.name).open("ab") as log:
                forked = server.start(job.arguments(), environment, log.fileno(), descriptor)
            if forked is not None:
                return forked
        return start(job, self.folder, environment, pass_fds=(descriptor,))


def _environment(at_once: int, gpus: Sequence[str], slot: int) -> dict[str, str]:
    """This process's own, with a share of the cores and, where there are several GPUs, one of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(min(threads_each(at_once), own_cores()))}
    if len(gpus) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def is_alive(process: int) -> bool:
    """Whether a process of this host exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process > 0
