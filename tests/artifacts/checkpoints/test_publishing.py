"""A folder is absent or complete, and any change to a complete one is found."""

import os
import random
import shutil
import subprocess
import sys

import pytest
from excise.artifacts.checkpoints.edits import load_edit, save_edit
from excise.artifacts.checkpoints.manifest import SUMS, verify_folder
from excise.artifacts.checkpoints.staging import staged_folder
from excise.artifacts.files.written import write_whole
from excise.editing.errors import RequestError, VerifyError
from helpers import excise, in_fresh_process, random_edit

KILLS = 200
KILL = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from excise.artifacts.events import Events
from excise.artifacts.checkpoints.manifest import verify_folder
from excise.recipes import apply

edit, base, out, kills = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
rng, seen = random.Random(0), {"absent": 0, "complete": 0, "in_progress": 0}

def export():
    # This process never ran a tensor operation, so a fork of it may.
    child = os.fork()
    if child == 0:
        apply.run(apply.prepare(edit, base, out), Events())
        os._exit(0)
    return child

def clear():
    for path in out.parent.glob(f"*{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

started = time.monotonic()
assert os.waitpid(export(), 0)[1] == 0
whole = time.monotonic() - started
for _ in range(kills):
    # Half of the kills find the remains of an earlier one.
    shutil.rmtree(out, ignore_errors=True)
    if rng.random() < 0.5:
        clear()
    child = export()
    time.sleep(rng.uniform(0, 1.1) * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen["in_progress"] += (out.parent / f".{out.name}.staging").exists()
    if out.exists():
        verify_folder(out)
        seen["complete"] += 1
    else:
        seen["absent"] += 1
shutil.rmtree(out, ignore_errors=True)
assert os.waitpid(export(), 0)[1] == 0
seen["verified"] = verify_folder(out)
seen["left"] = sorted(path.name for path in out.parent.glob(f".{out.name}*"))
print(json.dumps(seen))
"""


@pytest.fixture
def request_folder(save_pico, tmp_path):
    """A small sharded checkpoint, and an edit for it."""
    checkpoint = save_pico("qwen3", max_shard_size="20KB")
    save_edit(random_edit(checkpoint.config), tmp_path / "edit")
    return checkpoint.folder


@pytest.fixture
def published(request_folder, tmp_path):
    done = excise("apply", tmp_path / "edit", "--base", request_folder, "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    return tmp_path / "new"


def test_a_published_folder_verifies_and_its_edit_loads(published):
    assert excise("verify", published).returncode == 0
    assert verify_folder(published) == len([p for p in published.rglob("*") if p.is_file()])
    assert load_edit(published / "excise").model_type == "qwen3"


def test_coreutils_agree_with_the_sums(published):
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=published, capture_output=True, check=False)
    assert done.returncode == 0


def test_every_flipped_byte_is_found(published):
    """Each file, at its first, last and random bytes; the file of sums at every one."""
    rng = random.Random(0)
    for path in sorted(p for p in published.rglob("*") if p.is_file()):
        original = path.read_bytes()
        places = (
            range(len(original))
            if path.name == SUMS
            else {0, len(original) - 1, *(rng.randrange(len(original)) for _ in range(4))}
        )
        for place in places:
            changed = bytearray(original)
            changed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(VerifyError, match=r".+"):
                verify_folder(published)
        path.write_bytes(original)
    verify_folder(published)


def test_added_missing_truncated_and_linked_files_are_found(published, tmp_path):
    (published / "extra.txt").write_text("x")
    with pytest.raises(VerifyError, match=r"extra\.txt is not in"):
        verify_folder(published)
    (published / "extra.txt").unlink()
    (published / "empty").mkdir()
    with pytest.raises(VerifyError, match="empty is an empty folder"):
        verify_folder(published)
    (published / "empty").rmdir()
    for path in sorted(p for p in published.rglob("*") if p.is_file() and p.name != SUMS):
        name = path.relative_to(published).as_posix()
        original = path.read_bytes()
        path.write_bytes(original[:-1])
        with pytest.raises(VerifyError, match=f"{name} was changed"):
            verify_folder(published)
        path.unlink()
        with pytest.raises(VerifyError, match=f"{name} is missing"):
            verify_folder(published)
        (tmp_path / "aside").write_bytes(original)
        path.symlink_to(tmp_path / "aside")
        with pytest.raises(VerifyError, match=f"{name} is a link"):
            verify_folder(published)
        path.unlink()
        path.write_bytes(original)
    verify_folder(published)


def test_a_folder_without_sums_says_so(tmp_path):
    with pytest.raises(RequestError, match=f"has no {SUMS}"):
        verify_folder(tmp_path)


def test_an_existing_folder_is_refused_and_left_alone(request_folder, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    done = excise("apply", tmp_path / "edit", "--base", request_folder, "--out", out)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_killed_export_is_absent_or_complete(request_folder, tmp_path):
    """SIGKILL at random moments; what stands under the final name always verifies, and a rerun completes."""
    seen = in_fresh_process(KILL, tmp_path / "edit", request_folder, tmp_path / "new", KILLS)
    assert seen["absent"] + seen["complete"] == KILLS
    assert seen["absent"] > KILLS / 10 and seen["in_progress"] > KILLS / 10
    assert seen["verified"] > 5 and seen["left"] == []


@pytest.mark.parametrize("moment", ["after_first_file", "before_publish"])
def test_an_error_while_writing_leaves_nothing(tmp_path, moment):
    with pytest.raises(OSError, match="no space"), staged_folder(tmp_path / "new") as staging:
        (staging / "a").write_text("x")
        if moment == "before_publish":
            (staging / "b").write_text("x")
        raise OSError(28, "no space")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(tmp_path):
    """A place with 64 kB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("making a small file system needs root")
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    yield place
    subprocess.run(["umount", place], check=False)


def test_a_full_disk_is_one_line_and_leaves_nothing(request_folder, small, tmp_path):
    # The check before writing would catch this; without it the disk fills in the middle.
    code = (
        "import excise.recipes.apply as a, sys; a.check_disk = lambda *_: None\n"
        "from excise.cli import main; sys.argv = ['excise', *sys.argv[1:]]; main()"
    )
    arguments = ["apply", str(tmp_path / "edit"), "--base", str(request_folder), "--out", str(small / "new")]
    checked = excise(*arguments)
    filled = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    for done in (checked, filled):
        error = [line for line in done.stderr.splitlines() if line.startswith("excise: ")]
        assert done.returncode == 1 and len(error) == 1 and "disk" in error[0]
        assert done.stderr.endswith(f"{error[0]}\n") and "Traceback" not in done.stderr
    assert list(small.iterdir()) == []


def test_a_file_is_whole_or_what_it_was(small):
    path = small / "new" / "page.html"
    write_whole(path, "first")
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"x" * 100_000)
    assert path.read_text() == "first" and [found.name for found in path.parent.iterdir()] == ["page.html"]
