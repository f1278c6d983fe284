"""Opening a file that somebody else may have written or touched: a regular file, of bounded size, told in one line."""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from ...editing.errors import CheckpointError, ExciseError, RequestError, one_line

MAX_TEXT = 1 << 30
"""Bytes of the largest file of JSON lines."""
MAX_JSON = 1 << 26
"""Bytes of the largest file that holds one JSON value."""
MAX_LINE = 1 << 26
"""Bytes of the longest line of a file that is read line by line."""
MAX_YAML = 1 << 20
"""Bytes of the largest YAML file."""


class Unreadable(ValueError):
    """What is wrong with a file, without its name; who reads the file tells its name and what to do."""


def located(name: str, error: Unreadable) -> str:
    """A fault with its place, as editors jump to it: ``NAME:LINE: …`` where it has a line."""
    line = re.match(r"line ([0-9]+) (.*)", str(error))
    return f"{name}:{line[1]}: {line[2]}" if line else f"{name}: {error}"


@dataclass(frozen=True)
class Telling:
    """How a fault of a file reaches the user: as which error, and what to do next."""

    error: type[ExciseError]
    advice: str

    @contextmanager
    def about(self, name: str | Path) -> Iterator[None]:
        """Raise every fault that reading meets as the error, in one line with the file's name.

        Raises:
            ExciseError: Of the kind ``error``.
        """
        try:
            yield
        except (Unreadable, OSError) as error:
            reason = str(error) if isinstance(error, Unreadable) else error.strerror or one_line(error)
            raise self.error(f"{name} cannot be read ({one_line(ValueError(reason))}); {self.advice}") from error


OF_A_CHECKPOINT = Telling(CheckpointError, "fetch it again")
OF_A_REQUEST = Telling(RequestError, "correct it or give another file")


@contextmanager
def regular_file(path: Path, most: int | None = None) -> Iterator[BufferedReader]:
    """Open a file for reading.

    Raises:
        Unreadable: It is a pipe, a device or a folder, or larger than ``most`` bytes.
        OSError: It does not exist, or the system refuses it.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise Unreadable("it is a pipe, a device or a folder, not a file")
        if most is not None and about.st_size > most:
            raise Unreadable(f"it has {about.st_size} bytes, at most {most} are read")
        yield file


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """A whole text file in UTF-8.

    Raises:
        Unreadable: It is no regular file, too large, or not UTF-8.
        OSError: It does not exist, or the system refuses it.
    """
    with regular_file(path, most) as file:
        data = file.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Unreadable(f"line {line} is not UTF-8, at byte {error.start}") from error


def decoded_lines(path: Path, longest: int, most: int | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8 with their ends, and their numbers from 1; no more than one line is in memory.

    Bytes are cut at newlines alone, not at characters that JSON allows inside a text, such as U+2028. A byte order mark,
    which some editors write before the first line, is left out.

    Raises:
        Unreadable: It is no regular file, is larger than ``most`` bytes, has a line of more than ``longest``, or is not
            UTF-8.
        OSError: It does not exist, or the system refuses it.
    """
    with regular_file(path, most) as file:
        number = begin = 0
        while data := file.readline(longest + 1):
            number += 1
            if len(data) > longest:
                raise Unreadable(f"line {number} has more than {longest} bytes, the most that are read")
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Unreadable(f"line {number} is not UTF-8, at byte {begin + error.start}") from error
            yield number, line
            begin += len(data)


def lines_at_ends(path: Path, most: int) -> list[str]:
    """The whole lines within the first and the last ``most`` bytes of a text file that somebody may be writing.

    What is no UTF-8 is left out line by line, because a writer on another host may be in the middle of one.

    Raises:
        Unreadable: It is no regular file.
        OSError: It does not exist, or the system refuses it.
    """
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        parts = [file.read(size if size <= 2 * most else most)]
        if size > 2 * most:
            file.seek(size - most)
            parts.append(file.read(most))
    lines = []
    for number, part in enumerate(parts):
        # The first line of the last bytes is cut, and so may be the last line of either.
        lines += part.split(b"\n")[number : -1 if len(parts) > 1 and number == 0 else None]
    return [text for line in lines if (text := _decoded(line))]


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def text_lines(path: Path, longest: int = MAX_LINE) -> Iterator[tuple[int, str]]:
    """The lines of a text file of any size, as ``decoded_lines`` reads them.

    Raises:
        Unreadable: It is no regular file, has a longer line, or is no text in UTF-8.
        OSError: It does not exist, or the system refuses it.
    """
    for number, line in decoded_lines(path, longest):
        if "\0" in line:
            raise Unreadable(f"line {number} holds a byte of 0, so the file is no text in UTF-8")
        yield number, line


_Version = tuple[str, int, int, int]
"""A file as it stands: place, inode, size and time of change."""
_INPUTS: dict[_Version, str] = {}
_SUMS: ContextVar[dict[_Version, str] | None] = ContextVar("_SUMS", default=None)


@contextmanager
def summed_once() -> Iterator[None]:
    """Within this context no file is summed a second time while its size and time of change stay the same."""
    token = _SUMS.set({})
    try:
        yield
    finally:
        _SUMS.reset(token)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    held = _SUMS.get()
    return _summed(path) if held is None or not path.is_file() else _remembered(path, held)


def sum_of_input(path: Path) -> str:
    """SHA-256 of a file that this process reads and does not write, such as a base's weights: summed once a process.

    Raises:
        CheckpointError: It is no regular file.
        OSError: It does not exist, or the system refuses it.
    """
    return _remembered(path, _INPUTS)


def _remembered(path: Path, held: dict[_Version, str]) -> str:
    about = path.stat()
    version = (str(path.resolve()), about.st_ino, about.st_size, about.st_mtime_ns)
    if version not in held:
        held[version] = _summed(path)
    return held[version]


def _summed(path: Path) -> str:
    with (
        Telling(CheckpointError, "remove it or put the file in its place").about(path.name),
        regular_file(path) as file,
    ):
        return hashlib.file_digest(file, "sha256").hexdigest()
