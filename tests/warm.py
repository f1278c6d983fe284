"""Processes of their own that need not import torch again: forked from one that has, on request, over a socket.

Importing torch, transformers and peft costs a command 8 seconds, and the tests start a few hundred. Started once a
session, this server imports what excise depends on, and for commands excise itself; it loads no model and computes
nothing. Every request is answered by a fork, which is as new as an interpreter except that these imports are done and
that strings hash as in its siblings. What such a process starts with ``sys.executable`` is answered so too.
"""

import atexit
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
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

import warm_python
from warm_python import READ_BY_TRANSFORMERS, SESSION, ask, kind_for

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the processor; so do the commands that they start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ENVIRONMENT = dict(os.environ)
"""What the server starts with: no test has changed it yet."""
KINDS = ("torch", "models", "commands")
"""What is imported: torch alone; what models need as well; excise as well."""
IDLE = 60.0
"""Seconds after which a server for another environment ends when nobody asks it."""


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
        (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
        _write_interpreter(folder / "python")
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


def _write_interpreter(place: Path) -> None:
    code = Path(warm_python.__file__).read_text()
    place.write_text(f"#!{sys.executable} -SE\n{code}\n\nmain({sys.executable!r})\n")
    place.chmod(0o700)


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
    with TemporaryDirectory(prefix="excise-said-") as place, ExitStack() as stack:
        said = [Path(place) / name for name in ("stdout", "stderr")]
        files = [
            stack.enter_context(path.open(mode))
            for path, mode in ((Path(os.devnull), "rb"), *((p, "wb") for p in said))
        ]
        request = {
            "arguments": arguments,
            "environment": dict(environment),
            "cwd": str(cwd or Path.cwd()),
            "code": code,
            "numbers": [0, 1, 2],
        }
        connection = stack.enter_context(ask(str(folder), kind, request, [file.fileno() for file in files], timeout))
        answers = stack.enter_context(connection.makefile("r"))
        answers.readline()
        status = int(answers.readline())
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in said))


def warm_kind(environment: Mapping[str, str], kind: str = "models") -> str:
    """The server that may answer, if any."""
    return kind_for(dict(environment), ENVIRONMENT, kind)


def warm_interpreter() -> str:
    """What to start in place of ``sys.executable`` as a process of its own that need not import torch again."""
    folder = Path(os.environ[SESSION])
    _server(folder)
    return str(folder / "python")


def _serve(listening: socket.socket, idle: float | None = None) -> NoReturn:
    """Answer every connection by a fork, which forks the command and waits for it."""
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if idle and not select.select([listening], [], [], idle)[0]:
            _leave_unless_asked(listening)
            continue
        connection, _ = listening.accept()
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
            os._exit(0)
        connection.close()


def _leave_unless_asked(listening: socket.socket) -> None:
    place = Path(listening.getsockname())
    with (place.parent / "servers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not select.select([listening], [], [], 0)[0]:
            place.unlink()
            os._exit(0)


def _serve_another(kind: str, environment: Mapping[str, str], connection: socket.socket) -> NoReturn:
    """Serve those who changed what is read while transformers is imported."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(Path(environment[SESSION]) / kind))
    listening.listen(16)
    connection.sendall(b"\n")
    connection.close()
    for name in {*os.environ, *environment}:
        if name.startswith(READ_BY_TRANSFORMERS):
            os.environ.pop(name, None)
    os.environ.update({name: value for name, value in environment.items() if name.startswith(READ_BY_TRANSFORMERS)})
    _import_what_models_need()
    if kind.startswith("commands"):
        _import_excise()
    _serve(listening, IDLE)


def _answer(connection: socket.socket) -> None:
    _, files, _, _ = socket.recv_fds(connection, 1, 64)
    with connection, connection.makefile("r") as words:
        request = json.loads(words.readline())
        if "kind" in request:
            _serve_another(request["kind"], request["environment"], connection)
        pid = os.fork()
        if not pid:
            connection.close()
            _become(request, files)
        # Who asked for it may be killed: then nobody waits for it.
        threading.Thread(target=_end_with, args=(connection, pid), daemon=True).start()
        with suppress(BrokenPipeError):
            connection.sendall(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        with suppress(BrokenPipeError):
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _end_with(connection: socket.socket, pid: int) -> None:
    with suppress(OSError):
        if not connection.recv(1):
            os.kill(pid, signal.SIGKILL)


def _take_over(files: list[int], numbers: list[int]) -> None:
    """Give files that came over the connection the numbers that they had."""
    # Above all numbers first: a number may be that of another of them.
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, 1 + max(*files, *numbers)) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(above, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """This process is the command from here on."""
    _take_over(files, request["numbers"])
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=request.get("unbuffered", False))  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request.get("ignored", ()):
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(request["environment"])
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and threads != ENVIRONMENT.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    os.chdir(request["cwd"])
    # As `python -m` and `python -c` have it, instead of this file's folder.
    sys.path[0] = request["cwd"]
    code, module = request.get("code", ""), request.get("module", "")
    sys.argv = ["-c" if code else module or "excise", *request["arguments"]]
    sys.executable = str(Path(os.environ[SESSION]) / "python")

    def command() -> None:
        if code:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif module not in ("", "excise"):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            from excise.cli import main

            main()

    _leave_as_python_does(command)


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


def _import_excise() -> None:
    for folder in ("editing", "eval", "artifacts", "recipes"):
        package = importlib.import_module(f"excise.{folder}")
        for module in pkgutil.walk_packages(package.__path__, f"excise.{folder}."):
            # What needs an extra that is not installed tells who asks for it.
            with suppress(ImportError):
                importlib.import_module(module.name)
    importlib.import_module("excise.cli")


def _main(*numbers: str) -> NoReturn:
    import numpy  # noqa: F401
    import pydantic.main  # noqa: F401
    import rich.console
    import rich.progress
    import rich.table  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import typer  # noqa: F401

    sockets = [socket.socket(fileno=int(number)) for number in numbers]
    for more in (_import_what_models_need, _import_excise):
        if not os.fork():
            for later in sockets[1:]:
                later.close()
            _serve(sockets[0])
        sockets.pop(0).close()
        more()
    _serve(*sockets)


if __name__ == "__main__":
    _main(*sys.argv[1:])
