"""Threads that work beside a writer, so that hashing and the disk do not wait for each other."""

import hashlib
import os
import queue
import threading
from typing import Any, BinaryIO

FLUSH_EVERY = 256 << 20
"""Bytes after which written data starts on its way to the disk; left alone, all of it would wait for the end."""


class Hasher:
    """SHA-256 in a thread of its own, a few blocks behind the writer."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=16)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def update(self, block: Any) -> None:
        """Take in a block, which must not be changed afterwards."""
        self._queue.put(block)

    def finish(self) -> str:
        """Wait for all blocks and return the hex digest."""
        self._queue.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (block := self._queue.get()) is not None:
            self._digest.update(block)


class Flusher:
    """Forces written data to disk in a thread of its own; an error of the disk comes out of ``finish``."""

    def __init__(self) -> None:
        self._queue: queue.Queue[int | None] = queue.Queue()
        self._error: OSError | None = None
        self._pending = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wrote(self, file: BinaryIO, size: int, *, last: bool = False) -> None:
        """Note ``size`` more bytes in ``file``; ``last`` flushes whatever the file still holds back."""
        self._pending += size
        if last or self._pending >= FLUSH_EVERY:
            self._pending = 0
            file.flush()
            # The file may be closed before its turn comes; a duplicate descriptor stays open.
            self._queue.put(os.dup(file.fileno()))

    def finish(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError: The disk could not take it.
        """
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (descriptor := self._queue.get()) is not None:
            try:
                os.fsync(descriptor)
            except OSError as error:
                self._error = error
            finally:
                os.close(descriptor)
