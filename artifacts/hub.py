"""What pushes to and pulls from the Hugging Face Hub share: file lists, digests, and errors of one line."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..editing.errors import ExciseError, RequestError, one_line
from .files.opened import sha256_of

GIT_ATTRIBUTES = ".gitattributes"
"""A file that the Hub puts into every repository."""


@dataclass(frozen=True)
class Digest:
    """The Hub's digest of a file: SHA-256 for large files (LFS), git's SHA-1 for small ones."""

    size: int
    sha256: str | None
    git: str | None


def remote_files(api: Any, repo_id: str, revision: str | None) -> dict[str, Digest]:
    """Digest of every file in a repository, by name."""
    from huggingface_hub.hf_api import RepoFile

    digests = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision):
        if isinstance(entry, RepoFile):
            sha256 = entry.lfs.sha256 if entry.lfs else None
            digests[entry.path] = Digest(entry.size, sha256, None if sha256 else entry.blob_id)
    return digests


def same_content(path: Path, remote: Digest | None) -> bool:
    """Whether a local file has the digest that the Hub lists."""
    size = path.stat().st_size
    if remote is None or size != remote.size:
        return False
    if remote.sha256:
        return sha256_of(path) == remote.sha256
    # Git hashes a header together with the content; such files are small enough to read whole.
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest() == remote.git


def literal(name: str) -> str:
    """A glob pattern that matches only this name."""
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def explained(ref: str) -> Iterator[None]:
    """Turn the Hub's refusals and broken connections into errors of one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except ExciseError:
        raise
    except OfflineModeIsEnabled as error:
        raise RequestError(
            "HF_HUB_OFFLINE is set, so the Hub was not contacted; unset it and run the same command again"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ExciseError(
            f"{ref} could not be fetched completely: {one_line(error)}; run the same command again"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise RequestError(
            f"the Hub refused {ref} ({status or 'no answer'}): {ANSWERS.get(status, one_line(error))}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        # Errors of the disk have a number and are no matter of the Hub.
        if isinstance(error, OSError) and error.errno:
            raise
        raise ExciseError(f"{ref}: {one_line(error)}; run the same command again to continue") from error
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise ExciseError(
            f"the connection for {ref} broke ({type(error).__name__}); run the same command again to continue"
        ) from error


def is_connection_error(error: BaseException) -> bool:
    """Whether an error is of the client's HTTP library."""
    # By package name, because the library differs between the client's versions.
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "hf_xet")


ANSWERS = {
    401: "you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "your token may not do this; give it write access to the repository",
    404: "there is no such repository or revision, or it is private and you are not logged in; check the name",
    409: "another upload is running; wait and run the same command again",
    412: "somebody else pushed meanwhile; pull, check what changed, and push again",
    429: "too many requests; wait a minute and run the same command again",
    500: "the Hub has a problem; run the same command again later",
    502: "the Hub has a problem; run the same command again later",
    503: "the Hub is not available; run the same command again later",
}
"""Meaning of an HTTP status, and what to do."""
