"""Folders of runs between processes: a free one is given to one alone, and one that is written is locked."""

import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from excise.artifacts.files.locks import Lock, is_held
from excise.editing.errors import RequestError
from excise.recipes.common.run_folder import RunSettings, free_folder, letting_go, refuse_taken, start_folder
from helpers import excise

INPUTS = {"the base": "a"}


def test_a_free_folder_is_given_to_one_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, barrier = [], threading.Barrier(12)

    def take():
        barrier.wait()
        given.append(free_folder("elm"))

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == sorted(Path(f"runs/elm-{number}") for number in range(1, 13))
    # This process may write into what it was given; what another one made is taken.
    refuse_taken(given[0])
    Path("runs/elm-13").mkdir()
    with pytest.raises(RequestError, match="runs/elm-13 exists already"):
        refuse_taken(Path("runs/elm-13"))


def test_a_command_that_is_refused_or_only_plans_leaves_no_folder(tmp_path):
    refused = excise("run", "orthogonalize", "--concept", "builtin:nope", cwd=tmp_path)
    assert refused.returncode == 2 and not (tmp_path / "runs").exists()
    planned = excise("run", "orthogonalize", "--dry-run", cwd=tmp_path)
    assert "runs/orthogonalize-1" in planned.stdout and not (tmp_path / "runs").exists(), planned.stderr


def test_a_run_that_is_written_is_refused_to_another_process_until_it_is_let_go(tmp_path):
    out, settings = tmp_path / "run", RunSettings(out=tmp_path / "run")
    code = (
        "import sys; from pathlib import Path\n"
        "from excise.recipes.common.run_folder import RunSettings, start_folder\n"
        "out = Path(sys.argv[1]); start_folder(out, 'elm', RunSettings(out=out), {'the base': 'a'})"
    )
    with letting_go():
        start_folder(out, "elm", settings, INPUTS)
        # The same process may go on with it.
        start_folder(out, "elm", settings, INPUTS)
        other = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
        assert f"another process is writing {out}; follow it with excise watch {out}" in other.stderr
        # Workers beside it, such as parts of an audit, are let in.
        start_folder(out, "elm", settings, INPUTS, alone=False)
        assert is_held(out / ".work" / "lock")
    assert is_held(out / ".work" / "lock") is False
    assert subprocess.run([sys.executable, "-c", code, str(out)], check=False).returncode == 0


def test_a_file_system_without_locks_gives_them_to_everybody_and_says_that_it_cannot_tell(tmp_path, monkeypatch):
    """As Lustre does without its option."""
    path = tmp_path / "lock"
    first = Lock.take(path)
    assert first is not None and Lock.take(path) is None and is_held(path) is True

    def refuse(descriptor, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Lock.take(path) is not None and is_held(path) is None
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        Lock.take(path)
