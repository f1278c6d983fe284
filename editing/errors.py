"""The errors that users see: one family of exceptions, each message one line.

A message says what is wrong, what the value was, what is allowed and what to do next. ``RequestError`` means that the
request was wrong (exit code 2); any other ``ExciseError`` means that a run failed (exit code 1).
"""

import difflib


def one_line(error: BaseException, most: int = 300) -> str:
    """Another library's error message on one line of at most ``most`` characters; if it is empty, the error's class."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


class ExciseError(Exception):
    """A run that failed."""

    exit_code = 1


class RequestError(ExciseError):
    """A request that can never work. Raised before anything expensive happens."""

    exit_code = 2


class OutOfMemory(ExciseError):
    """Memory ran out on the smallest piece of work; the message says what would help."""


class UnsupportedArchitecture(RequestError):
    """A model type without a row in the table of architectures, or a tensor that matches no pattern of its row."""


class CheckpointError(RequestError):
    """A checkpoint on disk that is incomplete, damaged or unsafe."""


class ConceptError(RequestError):
    """A concept pack with errors; the message lists all of them."""


class EditError(ExciseError):
    """An edit that changed nothing, changed the wrong tensors, or did not remove what it should."""


class VerifyError(ExciseError):
    """A published folder that does not match its own checksums."""


def nearest(word: str, words: list[str]) -> str:
    """Return `` (did you mean 'X'?)`` if one of the words is similar, else an empty string."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def counted(count: int, one: str, many: str) -> str:
    """A count with the words that fit it.

    Example:
        >>> counted(1, "row was left out", "rows were left out"), counted(0, "row", "rows")
        ('1 row was left out', '0 rows')
    """
    return f"{count} {one if count == 1 else many}"
