"""Every mistake a user can make, as one family of errors that read as one line each.

A message says what is wrong, what was got, what is allowed and what to do next. ``RequestError``
is a wrong request (exit code 2); any other ``ExciseError`` is a run that failed (exit code 1).
"""

import difflib


def one_line(error: BaseException, most: int = 300) -> str:
    """What another library's error says, on one line; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


class ExciseError(Exception):
    """A run that failed."""

    exit_code = 1


class RequestError(ExciseError):
    """A request that could never work, found before anything expensive happens."""

    exit_code = 2


class UnsupportedArchitecture(RequestError):
    """A model type without a row, or a tensor that no pattern of its row knows."""


class CheckpointError(RequestError):
    """A checkpoint on disk that is incomplete, damaged or unsafe."""


class ConceptError(RequestError):
    """A concept pack with bad lines; the message lists all of them."""


class EditError(ExciseError):
    """An edit that changed nothing, changed the wrong tensors or left what it should remove."""


class VerifyError(ExciseError):
    """A published folder that does not match its own checksums."""


def nearest(word: str, words: list[str]) -> str:
    """`` (did you mean X?)`` where some word is close, else nothing."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
