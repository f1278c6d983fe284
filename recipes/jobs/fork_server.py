"""A process that has imported what jobs need: each job begins as a copy of it, and so without seconds of imports.

It computes nothing itself, so that a copy finds neither threads nor a device in use. The libraries of other systems
than Linux do not work in such a copy, nor do drivers of accelerators; there each job is a process that begins anew.
"""

import atexit
import gc
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from importlib import import_module

IMPORTED = ("transformers.trainer", "peft", "excise.recipes.audit.recipe", "excise.cli")
"""What the server imports, the slowest first."""
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/dxg")
LONGEST = 1 << 20
"""Bytes of a request, which holds the environment."""
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Request:
    """What a copy is to be: a command, and what it finds when it starts."""

    folder: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def encoded(self) -> bytes:
        """In bytes, of which none of its parts holds a 0; a path need not be UTF-8."""
        variables = (f"{name}={value}" for name, value in self.environment.items())
        return b"\0".join(map(os.fsencode, (self.folder, str(len(self.arguments)), *self.arguments, *variables)))

    @classmethod
    def decoded(cls, message: bytes) -> "Request":
        """What ``encoded`` gave."""
        folder, count, *rest = map(os.fsdecode, message.split(b"\0"))
        arguments, variables = rest[: int(count)], rest[int(count) :]
        return cls(folder, tuple(arguments), dict(variable.split("=", 1) for variable in variables))


def forks_here() -> bool:
    """Whether jobs of this machine can begin as copies of a process."""
    return sys.platform == "linux" and not any(glob(pattern) for pattern in ACCELERATORS)


class Forked:
    """A job's process, in the words of ``subprocess.Popen``."""

    def __init__(self, server: "ForkServer", told: int):
        """``told``: where the server says its number, and later how it ended."""
        self.server, self.told = server, os.fdopen(told, "rb")
        self.returncode: int | None = None
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        """Its number, for which the server's imports are waited for; 0 where it never began."""
        if self._pid is None:
            self._pid = int(self.told.readline() or 0)
        return self._pid

    def wait(self) -> int:
        """How it ended, as ``Popen`` says it; as if killed where the server ended first."""
        self.returncode = int(self.told.readline() or KILLED) if self.pid else KILLED
        self.told.close()
        return self.returncode

    def poll(self) -> int | None:
        """How it ended; None until somebody who waits for it knows."""
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self._pid is None:
            # It waits for the server's imports, as all others do.
            self.server.end()
        elif self._pid and self.returncode is None:
            os.kill(self._pid, number)


class ForkServer:
    """The server's process, from the side of who started it."""

    def __init__(self, environment: Mapping[str, str]):
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "excise.recipes.jobs.fork_server", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            pass_fds=(theirs.fileno(),),
            # As for jobs: Ctrl-C in the terminal is for who started it.
            start_new_session=True,
        )
        theirs.close()
        atexit.register(self.end)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: int, held: int) -> Forked | None:
        """A process of ``excise``; None where the server has ended, or the environment is too long for it.

        Args:
            log: Descriptor that it prints to.
            held: Descriptor that it keeps as long as it lives.
        """
        telling, told = os.pipe()
        request = Request(os.getcwd(), tuple(arguments), environment)
        try:
            socket.send_fds(self.channel, [request.encoded()], [log, told, held])
        except OSError:
            os.close(telling)
            return None
        finally:
            os.close(told)
        return Forked(self, telling)

    def end(self) -> None:
        """End the server; jobs that have begun go on."""
        atexit.unregister(self.end)
        self.channel.close()
        self.process.kill()
        self.process.wait()


_started: list[ForkServer] = []


def fork_server() -> ForkServer | None:
    """The server of this process, started if there is none; None where jobs cannot be forked, or it has ended."""
    if not forks_here():
        return None
    if not _started:
        # With one thread, so that numerical libraries start none when they are imported.
        _started.append(ForkServer({**os.environ, "OMP_NUM_THREADS": "1"}))
    return _started[0] if _started[0].process.poll() is None else None


def end_fork_server() -> None:
    """End the server of this process, if there is one, where no job is to come: it holds the memory of its imports."""
    for server in _started:
        server.end()


def serve(channel: socket.socket) -> Request | None:
    """Fork a process for each request; returns the request in that process, and None here once nobody asks any more."""
    told: dict[int, int] = {}
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([channel.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 12)
            _tell_ends(told)
        if channel.fileno() not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(channel, LONGEST, 3)
        if not message:
            return None
        log, telling, held = descriptors
        if (number := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # Who waits for the end of one of these is to see it even while another runs.
            for descriptor in (log, telling, woken, waker, channel.detach(), *told.values()):
                os.close(descriptor)
            return Request.decoded(message)
        os.close(log)
        os.close(held)
        told[number] = telling
        _write(telling, number)


def _tell_ends(told: dict[int, int]) -> None:
    while told:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number == 0:
            return
        descriptor = told.pop(number)
        _write(descriptor, os.waitstatus_to_exitcode(status))
        os.close(descriptor)


def _write(descriptor: int, number: int) -> None:
    # Who asked may have ended, and the process goes on all the same.
    with suppress(BrokenPipeError):
        os.write(descriptor, b"%d\n" % number)


def become(request: Request) -> None:
    """Be what ``python -m excise`` with these arguments is."""
    import runpy

    import torch

    os.setsid()
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    sys.argv = ["excise", *request.arguments]
    runpy.run_module("excise", run_name="__main__", alter_sys=True)


def main() -> None:
    """The server, or what it becomes."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    # Modules are no garbage, and no copy is to look through them for it.
    gc.disable()
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    gc.enable()
    if (request := serve(channel)) is not None:
        become(request)


if __name__ == "__main__":
    main()
