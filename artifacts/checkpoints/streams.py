"""Threads for hashing and writing, so that the processor and the disk do not wait for each other."""

import errno
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Block = bytes | memoryview
"""Bytes that must not change while threads share them."""
ROOM = 2 << 20
"""Bytes per write."""


class Hasher:
    """SHA-256 in a separate thread, a few blocks behind the writer."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        # Bounded, so that a fast reader waits and memory holds a few blocks.
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=16)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, block: Block) -> None:
        """Add a block, which must not change afterwards."""
        self._queue.put(block)

    def finish(self) -> str:
        """Wait for all blocks and return the hex digest."""
        self._queue.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (block := self._queue.get()) is not None:
            self._digest.update(block)


class Output:
    """A new file, written in a separate thread and synced to disk by ``close``.

    Writes bypass the page cache if the file system allows it: caching gigabytes that nobody reads would take more time
    than the rest of an export.

    Raises:
        OSError: From any method, after a write failed.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            # Some file systems, such as tmpfs on older kernels, do not know O_DIRECT.
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)
        # Direct writes need aligned memory, which anonymous pages are.
        self._room, self._held = memoryview(mmap.mmap(-1, ROOM)), 0
        self._queue: queue.Queue[Block | None] = queue.Queue(maxsize=16)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, block: Block) -> None:
        """Add a block, which must not change afterwards."""
        if self._error is not None:
            raise self._error
        self._queue.put(block)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (block := self._queue.get()) is not None:
            # After a failure blocks are still taken, because the writer would wait forever for room in the queue.
            if self._error is None:
                self._guarded(self._take, block)
        if self._error is None:
            self._guarded(self._finish)

    def _guarded(self, work: Callable[..., None], *blocks: Block) -> None:
        try:
            work(*blocks)
        except OSError as error:
            self._error = error

    def _take(self, block: Block) -> None:
        rest = memoryview(block)
        while rest:
            piece = rest[: ROOM - self._held]
            self._room[self._held : self._held + len(piece)] = piece
            self._held += len(piece)
            rest = rest[len(piece) :]
            if self._held == ROOM:
                self._put()

    def _finish(self) -> None:
        # The last piece is rarely a multiple of the sector size, which direct writes need.
        self._buffered()
        self._put()
        os.fsync(self._file)

    def _put(self) -> None:
        view = self._room[: self._held]
        while view:
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                # Some file systems accept O_DIRECT and then refuse the write, and a short write breaks the alignment.
                if error.errno != errno.EINVAL or not self._buffered():
                    raise
        self._held = 0

    def _buffered(self) -> bool:
        """Use the page cache from here on; returns whether writes bypassed it before."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        direct = getattr(os, "O_DIRECT", 0)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~direct)
        return bool(flags & direct)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread while the context lasts, to leave the other cores to hashing."""
    # Idle torch threads spin, so they would take time from the hashing threads even without work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
