"""A folder is absent or complete, and any change to a complete one is found."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import excise, random_edit
from excise.artifacts.edits import load_edit, save_edit
from excise.artifacts.manifest import SUMS, verify_folder
from excise.artifacts.staging import staged_folder
from excise.editing.errors import RequestError, VerifyError

KILLS = int(os.environ.get("EXCISE_KILLS", "12"))
"""Exports killed at random moments; 200 for a release."""


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
    out, rng = tmp_path / "new", random.Random(0)
    code = "import sys; from excise.cli import main; sys.argv = ['excise', *sys.argv[1:]]; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "apply",
        str(tmp_path / "edit"),
        "--base",
        str(request_folder),
        "--out",
        str(out),
    ]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    seen = {"absent": 0, "complete": 0}
    for _ in range(KILLS):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # The import of torch takes most of the time; the export itself is in the last part.
        time.sleep(rng.uniform(0.5, 1.1) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            verify_folder(out)
            seen["complete"] += 1
        else:
            seen["absent"] += 1
    assert seen["absent"] and sum(seen.values()) == KILLS
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(command, check=True, capture_output=True)
    verify_folder(out)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("moment", ["after_first_file", "before_publish"])
def test_an_error_while_writing_leaves_nothing(tmp_path, moment):
    with pytest.raises(OSError, match="no space"), staged_folder(tmp_path / "new") as staging:
        (staging / "a").write_text("x")
        if moment == "before_publish":
            (staging / "b").write_text("x")
        raise OSError(28, "no space")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(request_folder, tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("making a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False, capture_output=True
    ).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        # The check before writing would catch this; without it the disk fills in the middle.
        code = (
            "import excise.recipes.apply as a, sys; a.check_disk = lambda *_: None\n"
            "from excise.cli import main; sys.argv = ['excise', *sys.argv[1:]]; main()"
        )
        arguments = ["apply", str(tmp_path / "edit"), "--base", str(request_folder), "--out", str(small / "new")]
        checked = excise(*arguments)
        filled = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        for done in (checked, filled):
            assert done.returncode == 1 and done.stderr.count("\n") == 1 and "disk" in done.stderr
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=False)
