"""Processes of their own that need not import torch again: forked from one that has, on request, over a socket.

Importing torch, transformers and peft costs a command 8 seconds, and the tests start a few hundred. Started once a
session, this server imports what excise depends on, and nothing of excise itself; it loads no model and computes
nothing. Every request is answered by a fork, which is as new as an interpreter except that these imports are done and
that strings hash as in its siblings.
"""

import atexit
import fcntl
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

SESSION = "EXCISE_TESTS_SESSION"
"""Environment variable: a folder that all workers of a session share, with the sockets of its server."""
READ_BY_TRANSFORMERS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
"""Variables that transformers reads while it is imported: who changes them is not answered from behind that import."""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the processor; so do the commands that they start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ENVIRONMENT = dict(os.environ)
"""What the server starts with: no test has changed it yet."""
KINDS = ("torch", "models")
"""What is imported: torch alone; or all that commands on models need."""


@contextmanager
def session_folder() -> Iterator[Path]:
    """A folder for all workers of a session; the server that one of them started in it ends with it."""
    with TemporaryDirectory(prefix="excise-session-") as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            with suppress(FileNotFoundError, ProcessLookupError):
                os.killpg(int((folder / "server").read_text()), signal.SIGKILL)


def _server(folder: Path) -> None:
    """Start the session's server, unless there is one: only tests that start commands pay for it."""
    with (folder / "server.lock").open("w") as lock, ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "server").exists():
            return
        sockets = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in KINDS]
        for listening, kind in zip(sockets, KINDS, strict=True):
            # Who asks before the imports are done waits in line.
            listening.bind(str(folder / kind))
            listening.listen(16)
        numbers = [listening.fileno() for listening in sockets]
        process = subprocess.Popen(
            [sys.executable, __file__, *map(str, numbers)],
            env=ENVIRONMENT,
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # In a session of its own: an interrupt at the terminal is for pytest.
            start_new_session=True,
        )
        (folder / "server").write_text(str(process.pid))


def run_warm(
    kind: str,
    arguments: list[str],
    environment: Mapping[str, str],
    *,
    cwd: Path | None = None,
    code: str = "",
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run ``excise`` with these arguments, or Python code, in a process that need not import torch again."""
    folder = Path(environment[SESSION])
    _server(folder)
    with TemporaryDirectory(prefix="excise-said-") as place:
        files = [str(Path(place) / name) for name in ("stdout", "stderr")]
        request = {
            "arguments": arguments,
            "environment": dict(environment),
            "cwd": str(cwd or Path.cwd()),
            "code": code,
            "files": files,
        }
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("r") as answers:
            connection.settimeout(timeout)
            connection.connect(str(folder / kind))
            connection.sendall(json.dumps(request).encode() + b"\n")
            pid = int(answers.readline())
            try:
                status = int(answers.readline())
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(arguments, status, *(Path(file).read_text() for file in files))


def warm_kind(environment: Mapping[str, str]) -> str:
    """The server that may answer, if any: what reads its environment while it is imported must not have been."""
    changed = {name for name in {*ENVIRONMENT, *environment} if ENVIRONMENT.get(name) != environment.get(name)}
    if SESSION not in environment or any(name.startswith("PYTHON") for name in changed):
        return ""
    return "torch" if any(name.startswith(READ_BY_TRANSFORMERS) for name in changed) else "models"


def _serve(listening: socket.socket) -> NoReturn:
    """Answer every connection by a fork, which forks the command and waits for it."""
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listening.accept()
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
            os._exit(0)
        connection.close()


def _answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rw") as words:
        request = json.loads(words.readline())
        pid = os.fork()
        if not pid:
            connection.close()
            _become(request)
        words.write(f"{pid}\n")
        words.flush()
        _, status = os.waitpid(pid, 0)
        words.write(f"{os.waitstatus_to_exitcode(status)}\n")
        words.flush()


def _become(request: dict[str, Any]) -> NoReturn:
    """This process is the command from here on."""
    for number, file in enumerate((os.devnull, *request["files"])):
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    # As `python -m` and `python -c` have it, instead of this file's folder.
    sys.path[0] = request["cwd"]
    sys.argv = ["-c" if request["code"] else "excise", *request["arguments"]]

    def command() -> None:
        from excise.cli import main

        main()

    code = request["code"]
    _leave_as_python_does(
        lambda: exec(compile(code, "<string>", "exec"), {"__name__": "__main__"}) if code else command()
    )


def _leave_as_python_does(command: Callable[[], Any]) -> NoReturn:
    status = 0
    try:
        command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _import_what_models_need() -> None:
    import accelerate  # noqa: F401
    import jinja2  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import transformers
    import yaml  # noqa: F401

    # What stands behind a lazy import is imported when it is named.
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast", "Trainer"):
        getattr(transformers, name)


def _main(*numbers: str) -> NoReturn:
    import numpy  # noqa: F401
    import pydantic.main  # noqa: F401
    import rich.console
    import rich.progress
    import rich.table  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import typer  # noqa: F401

    without, behind = (socket.socket(fileno=int(number)) for number in numbers)
    if not os.fork():
        behind.close()
        _serve(without)
    without.close()
    _import_what_models_need()
    _serve(behind)


if __name__ == "__main__":
    _main(*sys.argv[1:])
