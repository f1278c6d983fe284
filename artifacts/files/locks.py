"""Locks between processes and hosts, by files: each dies with the process that holds it."""

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that know no locks, such as Lustre without its option ``flock``."""


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds. A child that inherits the descriptor keeps it as long as it lives."""

    descriptor: int

    @classmethod
    def take(cls, path: Path) -> "Lock | None":
        """The lock of a file, which is made; None where another process holds it.

        On a file system without locks everybody gets it: there is no way to tell.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if _is_free(descriptor, fcntl.LOCK_EX) is False:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        """Let another process have it."""
        os.close(self.descriptor)


def is_held(path: Path) -> bool | None:
    """Whether a process, on whatever host, holds the lock of a file; None where the file system knows no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        free = _is_free(descriptor, fcntl.LOCK_SH)
        return None if free is None else not free
    finally:
        os.close(descriptor)


def _is_free(descriptor: int, kind: int) -> bool | None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return None
        raise
    return True
