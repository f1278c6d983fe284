"""Folders that are absent or complete: each is written under a hidden name and renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...editing.errors import RequestError
from ..files.locks import Lock
from ..files.written import sync


def refuse_existing(out: Path) -> None:
    """Check that nothing exists at ``out``, before anything expensive happens.

    Raises:
        RequestError: Something exists there.
    """
    # A broken link exists too, although exists() says no.
    if out.exists() or out.is_symlink():
        raise RequestError(f"{out} exists already; give another --out, or remove it first")


@contextmanager
def staged_folder(out: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside ``out``; on success it is synced to disk and renamed to ``out``.

    After an error or Ctrl-C the hidden folder is removed, unless ``resumable``. After a kill it stays behind, and the
    next run with the same ``out`` continues in it or removes it.

    Raises:
        RequestError: ``out`` exists, or another process is writing it.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic on one file system only.
    staging = out.with_name(f".{out.name}.staging")
    with _locked(out.with_name(f".{out.name}.lock"), out):
        if not resumable:
            shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(exist_ok=True)
        try:
            yield staging
            publish_folder(staging, out)
        finally:
            if not resumable:
                shutil.rmtree(staging, ignore_errors=True)


def publish_folder(staging: Path, out: Path) -> None:
    """Make a finished folder visible: sync every file to disk, rename the folder, then sync its parent."""
    # The umask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            # Some libraries create files that only the user can read; published files follow the umask.
            path.chmod(0o666 & ~umask)
        sync(path)
    sync(staging)
    # Again, because a run takes long enough for somebody else to make the folder: rename would replace an empty one.
    refuse_existing(out)
    os.rename(staging, out)
    # A rename is safe after a power cut only when the parent folder is on disk too.
    sync(out.parent)


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    lock = Lock.take(path)
    if lock is None:
        raise RequestError(f"another process is writing {out}; wait for it or give another --out")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
