"""Jobs that begin as copies of a process: each is what a process of its own would be, and outlives who started it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from excise.artifacts.files.locks import Lock, is_held
from excise.recipes.jobs import fork_server
from excise.recipes.jobs.fork_server import KILLED, ForkServer, Request
from excise.recipes.jobs.local import is_alive

LONG = ("testbed", "build", "--seed", "3", "--out")
"""A command that takes minutes."""


@pytest.fixture(scope="module")
def server():
    server = ForkServer({**os.environ, "OMP_NUM_THREADS": "1"})
    yield server
    server.end()


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    begun = []

    def begin(server, *arguments):
        lock = Lock.take(tmp_path / "lock")
        with (tmp_path / "log").open("ab") as log:
            process = server.start(arguments, os.environ, log.fileno(), lock.descriptor)
        lock.release()
        begun.append(process)
        return process

    yield begin
    for process in begun:
        if process is not None and process.pid and is_held(tmp_path / "lock"):
            os.kill(process.pid, signal.SIGKILL)


def _when(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "request_",
    [
        Request("/a b", ("list", "--set", "x=1=2", ""), {"EMPTY": "", "TWO": "a=b\nc", "TEXT": "ü"}),
        Request(os.fsdecode(b"/not \xff UTF-8"), (), {"PATH": os.fsdecode(b"\xfe")}),
        Request("/", (), {}),
    ],
)
def test_a_request_arrives_as_it_was_sent_whatever_its_bytes(request_):
    assert Request.decoded(request_.encoded()) == request_


def test_a_copy_is_a_process_of_excise_with_an_exit_code_of_its_own(server, start, tmp_path):
    process = start(server, "list", "recipes")
    assert process.pid not in (0, os.getpid(), server.process.pid) and process.poll() is None
    assert process.wait() == 0 == process.poll()
    assert "orthogonalize\t" in (tmp_path / "log").read_text()
    assert start(server, "list", "nothing").wait() == 2
    assert "excise: nothing called 'nothing'" in (tmp_path / "log").read_text()


def test_a_signal_ends_it_as_any_command_and_a_kill_is_told(server, start, tmp_path):
    process = start(server, *LONG, "world")
    assert process.pid
    _when(lambda: (tmp_path / "log").stat().st_size)
    assert os.readlink(f"/proc/{process.pid}/cwd") == str(tmp_path) and os.getsid(process.pid) == process.pid
    process.terminate()
    assert process.wait() == 130 and not is_held(tmp_path / "lock")
    process = start(server, *LONG, "world")
    assert process.pid and is_held(tmp_path / "lock")
    process.kill()
    assert process.wait() == KILLED == -9 and not is_held(tmp_path / "lock")
    # What has ended is sent nothing: its number may be another's by now.
    process.terminate()


def test_a_copy_lives_on_without_the_server_and_keeps_its_lock(server, start, tmp_path):
    other = ForkServer({**os.environ, "OMP_NUM_THREADS": "1"})
    process = start(other, *LONG, "world")
    assert process.pid
    other.end()
    # How it ends is nobody's to know now, so it counts as killed, and whoever starts it again waits for its lock.
    assert process.wait() == KILLED and is_alive(process.pid) and is_held(tmp_path / "lock")
    os.kill(process.pid, signal.SIGKILL)
    _when(lambda: not is_held(tmp_path / "lock"))
    assert start(other, "list", "recipes") is None


def test_to_stop_before_the_imports_are_done_takes_no_time(start):
    other = ForkServer({**os.environ, "OMP_NUM_THREADS": "1"})
    process, began = start(other, "list", "recipes"), time.monotonic()
    process.terminate()
    assert process.wait() == KILLED and process.pid == 0 and time.monotonic() - began < 2
    assert other.process.poll() is not None


def test_the_server_ends_with_whoever_started_it():
    code = (
        "import os, time; from excise.recipes.jobs.fork_server import ForkServer\n"
        "print(ForkServer(os.environ).process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        number = int(owner.stdout.readline())
        assert is_alive(number)
        owner.kill()
    _when(lambda: not is_alive(number))


def test_a_server_that_no_job_is_to_begin_from_is_ended(monkeypatch):
    monkeypatch.setattr(fork_server, "_started", [])
    fork_server.end_fork_server()
    server = fork_server.fork_server()
    assert server is not None and server is fork_server.fork_server() and server.process.poll() is None
    fork_server.end_fork_server()
    assert server.process.poll() is not None and fork_server.fork_server() is None


def test_where_there_is_an_accelerator_each_job_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server, "_started", [])
    monkeypatch.setattr(fork_server, "ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    assert fork_server.forks_here() == (sys.platform == "linux")
    (tmp_path / "nvidia0").touch()
    assert not fork_server.forks_here() and fork_server.fork_server() is None and not fork_server._started
