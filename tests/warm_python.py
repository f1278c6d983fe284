"""In place of a Python interpreter: has a module run by the session's server, whose imports are done.

A process of its own that costs no imports: it hands its files to the server of ``warm.py``, passes on what signals
come, ends as what it stands for ended, and takes that with it where it is killed. What the server cannot answer goes to
the interpreter itself. Nothing is imported that takes time.
"""

import fcntl
import json
import os
import signal
import socket
import sys
import zlib

SESSION = "EXCISE_TESTS_SESSION"
"""Environment variable: a folder that all workers of a session share, with the sockets of its server."""
READ_BY_TRANSFORMERS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
"""Variables that transformers reads while it is imported: who changes them is answered by another server."""
KINDS = {"excise": "commands", "accelerate": "models", "torch": "models"}
"""By the package of a module: what the server that runs it has imported."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def kind_for(environment: dict[str, str], servers: dict[str, str], kind: str) -> str:
    """The server that may answer, if any: what was imported must have read the same environment.

    Args:
        servers: The environment that the session's server started with.
        kind: What is to have been imported.
    """
    changed = {name for name in {*servers, *environment} if servers.get(name) != environment.get(name)}
    if SESSION not in environment or any(name.startswith("PYTHON") for name in changed):
        return ""
    read = sorted((name, environment.get(name)) for name in changed if name.startswith(READ_BY_TRANSFORMERS))
    return f"{kind}-{zlib.crc32(json.dumps(read).encode()):08x}" if read else kind


def ask(
    folder: str, kind: str, request: dict[str, object], files: list[int], timeout: float | None = None
) -> socket.socket:
    """Send a request with open files; on the connection come the process's number, and at its end its status.

    The process ends with the connection.
    """
    with open(os.path.join(folder, "servers.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = os.path.join(folder, kind)
        if not os.path.exists(place):
            # By one that has not imported what reads this environment.
            made = _connected(os.path.join(folder, "torch"), {"kind": kind, **request}, [], timeout)
            made.makefile("r").readline()
        return _connected(place, request, files, timeout)


def _connected(place: str, request: dict[str, object], files: list[int], timeout: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout)
    connection.connect(place)
    socket.send_fds(connection, [b"\0"], files)
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


def _open_files() -> list[int]:
    """Numbers of the files that a child would inherit."""
    numbers = [0, 1, 2]
    for name in os.listdir("/dev/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                numbers.append(int(name))
        except OSError:
            continue
    return numbers


def _module(words: list[str]) -> str:
    """The module that is to be run, if it is one that a server runs."""
    module = words[1] if len(words) > 1 and words[0] == "-m" else ""
    return module if module.partition(".")[0] in KINDS else ""


def main(interpreter: str) -> None:
    """Be the interpreter for the words of the command line."""
    words = sys.argv[1:]
    unbuffered = words[:1] == ["-u"]
    module = _module(words[unbuffered:])
    folder, environment = os.environ.get(SESSION, ""), dict(os.environ)
    kind = ""
    if module and os.path.exists(place := os.path.join(folder, "environment.json")):
        with open(place) as file:
            kind = kind_for(environment, json.load(file), KINDS[module.partition(".")[0]])
    if not kind:
        os.execv(interpreter, [interpreter, *words])
    numbers = _open_files()
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    request = {
        "arguments": words[unbuffered + 2 :],
        "module": module,
        "environment": environment,
        "cwd": os.getcwd(),
        "numbers": numbers,
        "ignored": ignored,
        "unbuffered": unbuffered,
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    connection = ask(folder, kind, request, numbers)
    answers = connection.makefile("r")
    process = int(answers.readline())
    for number in PASSED_ON:
        if number not in ignored:
            signal.signal(number, lambda got, _: os.kill(process, got))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = int(answers.readline() or 1)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
