"""Uploading checkpoints to the Hugging Face Hub: only verified folders.

The official client uploads, so uploads resume, unchanged files are not sent, and a push onto a moved branch is refused.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from ..editing.errors import ExciseError, RequestError
from .checkpoints.manifest import FOLDER, MANIFEST, SIGNATURE, SUMS, amend_folder, read_manifest, verify_folder
from .checkpoints.read import open_checkpoint
from .hub import GIT_ATTRIBUTES, explained, literal, remote_files, same_content
from .reporting.card import CARD, without_measurements
from .reporting.results import RESULTS

_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
T = TypeVar("T")
PAUSES = (1.0, 4.0, 15.0)
"""Seconds to wait before trying again, for uploads that the client itself does not repeat."""


@dataclass(frozen=True)
class Push:
    """A checked upload."""

    folder: Path
    repo_id: str
    files: dict[str, int]
    """Size in bytes of each file to upload, by name; nothing else is uploaded."""
    public: bool
    revision: str | None
    create_pr: bool
    measured: bool

    def describe(self) -> dict[str, Any]:
        """What the push would do, as JSON."""
        return {
            "repo": self.repo_id,
            "visibility": "public" if self.public else "private",
            "revision": self.revision or "main",
            "pull_request": self.create_pr,
            "measured": self.measured,
            "files": len(self.files),
            "bytes": sum(self.files.values()),
        }


@dataclass(frozen=True)
class Pushed:
    """Where an uploaded checkpoint is."""

    url: str
    commit: str
    new_commit: bool
    """False if the repository already held all of it."""


def prepare_push(
    folder: Path, repo_id: str, *, public: bool, revision: str | None, create_pr: bool, unmeasured: bool
) -> Push:
    """Check everything that can be checked without the Hub.

    Args:
        folder: The checkpoint folder.
        repo_id: ``OWNER/NAME``.
        public: Create a public repository instead of a private one.
        revision: Branch to upload to; None is main.
        create_pr: Open a pull request instead of writing to the branch.
        unmeasured: Allow a checkpoint without measurements; its card then says so.

    Raises:
        RequestError: The id or the combination of options is wrong, or nothing was measured.
        VerifyError: The folder is not as it was published.
    """
    if not _ID.fullmatch(repo_id):
        raise RequestError(f"{repo_id!r} is no repository id; give OWNER/NAME")
    if create_pr and revision not in (None, "main"):
        raise RequestError("--create-pr opens a pull request against main; leave out --revision")
    verify_folder(folder)
    open_checkpoint(folder)
    measured = (folder / RESULTS).is_file() and (folder / CARD).is_file()
    if not measured and not unmeasured:
        raise RequestError(
            f"{folder.name} holds no measurements ({RESULTS}), so nothing shows what the edit did; "
            "run the recipe, or add --unmeasured and the card will begin with that"
        )
    manifest = read_manifest(folder)
    assert manifest is not None, "verified above"
    files = {name: int(entry["size"]) for name, entry in manifest["files"].items()}
    files |= {name: (folder / name).stat().st_size for name in (MANIFEST, SUMS, SIGNATURE) if (folder / name).is_file()}
    return Push(folder, repo_id, files, public, revision, create_pr, measured)


def push(request: Push) -> Pushed:
    """Upload a checkpoint. Files that the repository already holds are not sent; a rerun after a kill continues.

    Raises:
        RequestError: The repository holds something else, the branch moved meanwhile, or the Hub refused.
        ExciseError: A file did not arrive as it was sent.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with explained(request.repo_id), _carded(request) as folder:
        url = api.create_repo(request.repo_id, private=not request.public, exist_ok=True)
        if request.revision and request.revision != "main":
            api.create_branch(request.repo_id, branch=request.revision, exist_ok=True)
        before = api.repo_info(request.repo_id, revision=request.revision).sha
        there = remote_files(api, request.repo_id, request.revision)
        local = _names(folder)
        stale = sorted(there.keys() - set(local) - {GIT_ATTRIBUTES})
        # Files of an older push, or of one that was not finished, are replaced; those of another model are not.
        if stale and SUMS not in there and not _leftovers(stale):
            raise RequestError(
                f"{request.repo_id} holds {len(stale)} files of another model, the first is {stale[0]}; "
                "give another repository id"
            )
        if not stale and all(same_content(folder / name, there.get(name)) for name in local):
            return Pushed(str(url), str(before), False)
        done = _patiently(
            lambda: api.upload_folder(
                repo_id=request.repo_id,
                folder_path=folder,
                revision=request.revision,
                create_pr=request.create_pr or None,
                # A pull request starts at that commit; a direct upload is refused if somebody pushed meanwhile.
                parent_commit=before,
                commit_message=f"Upload {request.folder.name} with excise",
                # Upload only files of the manifest, and delete files of older uploads.
                allow_patterns=[literal(name) for name in local],
                delete_patterns=[literal(name) for name in stale] or None,
            )
        )
        arrived = remote_files(api, request.repo_id, str(done.oid))
        if wrong := [name for name in local if not same_content(folder / name, arrived.get(name))]:
            raise ExciseError(f"{wrong[0]} did not arrive at {request.repo_id} as it was sent; push again")
        return Pushed(str(done.pr_url if request.create_pr else url), str(done.oid), True)


def _patiently(send: Callable[[], T]) -> T:
    """Send, and try again while the Hub is not available. Files that arrived are not sent again."""
    from huggingface_hub.errors import HfHubHTTPError

    for pause in PAUSES:
        try:
            return send()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in (500, 502, 503, 504):
                raise
            time.sleep(pause)
    return send()


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _leftovers(names: list[str]) -> bool:
    """Whether files without checksums are an unfinished push of excise."""
    return any(name.startswith(f"{FOLDER}/") for name in names)


@contextmanager
def _carded(request: Push) -> Iterator[Path]:
    """Yield the folder, or if nothing was measured a copy whose card says so."""
    if request.measured:
        yield request.folder
        return
    with TemporaryDirectory(dir=request.folder.parent, prefix=".excise-push-") as temporary:
        copy = Path(temporary) / request.folder.name
        # Hard links, because the weights need not be copied for another card.
        shutil.copytree(request.folder, copy, copy_function=os.link)
        amend_folder(copy, {CARD: without_measurements(read_manifest(copy) or {})})
        yield copy
