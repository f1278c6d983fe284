"""Checkpoints to and from the Hugging Face Hub: only verified folders go up, and only verified ones come down.

Through the real client: uploads resume, unchanged files are not sent, and a push onto a moved branch is refused.
"""

import fnmatch
import hashlib
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

from ..editing.errors import ExciseError, RequestError, VerifyError, one_line
from .checkpoints.manifest import (
    FOLDER,
    MANIFEST,
    SIGNATURE,
    SUMS,
    amend_folder,
    read_manifest,
    sha256_of,
    verify_folder,
)
from .checkpoints.read import check_finite, open_checkpoint
from .checkpoints.staging import refuse_existing, staged_folder
from .models.hub import WANTED
from .reporting.card import CARD, without_measurements
from .reporting.results import RESULTS

_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_REF = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
T = TypeVar("T")
PAUSES = (1.0, 4.0, 15.0)
"""Seconds to wait before trying again where the client itself does not."""
GIT_ATTRIBUTES = ".gitattributes"
"""The Hub's own file, in every repository."""
RUNNABLE = (".py", ".so", ".sh", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".onnx")
_CLIENT = ".cache"
"""Where the client keeps its notes beside what it downloads."""


@dataclass(frozen=True)
class Push:
    """What is to be uploaded, checked."""

    folder: Path
    repo_id: str
    files: dict[str, int]
    """Sizes by name; nothing else is uploaded."""
    public: bool
    revision: str | None
    create_pr: bool
    measured: bool

    def describe(self) -> dict[str, Any]:
        """What a push would do."""
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
    """Where a checkpoint is now."""

    url: str
    commit: str
    new_commit: bool
    """False where the repository held all of it already."""


@dataclass(frozen=True)
class Pulled:
    """What came down."""

    folder: Path
    commit: str
    files: int
    made_by_excise: bool
    """Whether it carried checksums of its own; otherwise the Hub's were used."""
    left_out: int = 0
    """Files of other people's models that are neither weights in safetensors nor configuration, and were not fetched."""


def prepare_push(
    folder: Path, repo_id: str, *, public: bool, revision: str | None, create_pr: bool, unmeasured: bool
) -> Push:
    """Check everything that can be checked without the Hub.

    Raises:
        RequestError: The id or the combination of options is wrong, or nothing was measured.
        VerifyError: The folder is not as it was published.
    """
    if not _ID.fullmatch(repo_id):
        raise RequestError(f"{repo_id!r} is no repository id; give OWNER/NAME")
    if create_pr and revision not in (None, "main"):
        raise RequestError("--create-pr opens against main; leave out --revision")
    verify_folder(folder)
    open_checkpoint(folder)
    measured = (folder / RESULTS).is_file() and (folder / CARD).is_file()
    if not measured and not unmeasured:
        raise RequestError(
            f"{folder.name} holds no measurements ({RESULTS}), and readers would have to believe it; "
            "run the recipe, or add --unmeasured and the card will say so first"
        )
    manifest = read_manifest(folder)
    assert manifest is not None, "verified above"
    files = {name: int(entry["size"]) for name, entry in manifest["files"].items()}
    files |= {name: (folder / name).stat().st_size for name in (MANIFEST, SUMS, SIGNATURE) if (folder / name).is_file()}
    return Push(folder, repo_id, files, public, revision, create_pr, measured)


def push(request: Push) -> Pushed:
    """Upload; what the repository holds already is not sent, and a rerun after a kill goes on.

    Raises:
        RequestError: The repository holds something else, moved meanwhile, or the Hub refused.
        ExciseError: What arrived is not what was sent.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(request.repo_id), _carded(request) as folder:
        url = api.create_repo(request.repo_id, private=not request.public, exist_ok=True)
        if request.revision and request.revision != "main":
            api.create_branch(request.repo_id, branch=request.revision, exist_ok=True)
        before = api.repo_info(request.repo_id, revision=request.revision).sha
        there = _remote(api, request.repo_id, request.revision)
        local = _names(folder)
        stale = sorted(there.keys() - set(local) - {GIT_ATTRIBUTES})
        if stale and SUMS not in there and not _leftovers(stale):
            raise RequestError(
                f"{request.repo_id} holds {len(stale)} files that are not of this checkpoint, the first is {stale[0]}, and none of them "
                "is excise's; give another repository id"
            )
        if not stale and all(_same(folder / name, there.get(name)) for name in local):
            return Pushed(str(url), str(before), False)
        done = _patiently(
            lambda: api.upload_folder(
                repo_id=request.repo_id,
                folder_path=folder,
                revision=request.revision,
                create_pr=request.create_pr or None,
                # A pull request is opened on that commit; anything else is refused if somebody pushed meanwhile.
                parent_commit=before,
                commit_message=f"Upload {request.folder.name} with excise",
                # Never anything outside the manifest; and nothing of an older upload stays beside it.
                allow_patterns=[_literal(name) for name in local],
                delete_patterns=[_literal(name) for name in stale] or None,
            )
        )
        arrived = _remote(api, request.repo_id, str(done.oid))
        if wrong := [name for name in local if not _same(folder / name, arrived.get(name))]:
            raise ExciseError(f"{wrong[0]} did not arrive at {request.repo_id} as it was sent; push again")
        return Pushed(str(done.pr_url if request.create_pr else url), str(done.oid), True)


def pull(ref: str, out: Path) -> Pulled:
    """Download a checkpoint at a commit, check every byte, and only then let it appear as ``out``.

    Raises:
        RequestError: ``out`` exists, the id is wrong, or the Hub refused.
        VerifyError: Something is not as it was published; the message names it.
    """
    from huggingface_hub import HfApi, snapshot_download

    match = _REF.fullmatch(ref)
    if not match:
        raise RequestError(f"{ref!r} is no repository id; give OWNER/NAME, with @REVISION for a branch, tag or commit")
    refuse_existing(out)
    api = HfApi()
    with _explained(ref), staged_folder(out, resumable=True) as staging:
        commit = str(api.repo_info(match["id"], revision=match["revision"]).sha)
        listed = _remote(api, match["id"], commit)
        own = SUMS in listed
        for name in listed:
            _check_name(name, ref, own)
        wanted = {name: digest for name, digest in listed.items() if own or _is_wanted(name)}
        target = staging / commit
        # What a killed pull of another commit left behind is of no use.
        for other in staging.iterdir():
            if other != target:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        snapshot_download(
            match["id"], revision=commit, local_dir=target, allow_patterns=[_literal(name) for name in wanted]
        )
        shutil.rmtree(target / _CLIENT, ignore_errors=True)
        (target / GIT_ATTRIBUTES).unlink(missing_ok=True)
        try:
            _check_arrived(target, wanted, ref)
            count = verify_folder(target) if own else _check_foreign(target, ref)
            check_finite(open_checkpoint(target))
        except ExciseError:
            # Else the next pull would find the same bytes and never fetch them anew.
            shutil.rmtree(target)
            raise
        _move_up(target)
        return Pulled(out, commit, count, own, len(listed.keys() - wanted.keys() - {GIT_ATTRIBUTES}))


def _patiently(send: Callable[[], T]) -> T:
    """Try again while the Hub is not available; what was sent already is not sent again, and a moved branch is still refused."""
    from huggingface_hub.errors import HfHubHTTPError

    for pause in PAUSES:
        try:
            return send()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in (500, 502, 503, 504):
                raise
            time.sleep(pause)
    return send()


def _check_arrived(folder: Path, listed: dict[str, "_Digest"], ref: str) -> None:
    """The client does not hash what comes over HTTP."""
    for name, expected in listed.items():
        if name == GIT_ATTRIBUTES:
            continue
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise VerifyError(f"{name} of {ref} did not arrive as a file; pull again")
        if not _same(path, expected):
            raise VerifyError(f"{name} of {ref} arrived damaged: it is not what the Hub lists; pull again")


def _check_foreign(folder: Path, ref: str) -> int:
    """A model without checksums of its own: anybody's, or one of ours whose upload never ended."""
    card = folder / CARD
    if (folder / MANIFEST).exists() or (
        card.is_file() and f"{FOLDER}/" in card.read_text(encoding="utf-8", errors="replace")[:4000]
    ):
        raise VerifyError(
            f"{ref} has excise's files and no {SUMS}: its upload was not finished; ask its owner to push again"
        )
    return sum(path.is_file() for path in folder.rglob("*"))


@dataclass(frozen=True)
class _Digest:
    """How the Hub names a file's content: by SHA-256 where it is stored apart, by git's SHA-1 where it is not."""

    size: int
    sha256: str | None
    git: str | None


def _remote(api: Any, repo_id: str, revision: str | None) -> dict[str, _Digest]:
    from huggingface_hub.hf_api import RepoFile

    found = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision):
        if isinstance(entry, RepoFile):
            sha256 = entry.lfs.sha256 if entry.lfs else None
            found[entry.path] = _Digest(entry.size, sha256, None if sha256 else entry.blob_id)
    return found


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _same(path: Path, remote: _Digest | None) -> bool:
    """Whether a file is what the Hub lists, by the digest that the Hub names it by."""
    size = path.stat().st_size
    if remote is None or size != remote.size:
        return False
    if remote.sha256:
        return sha256_of(path) == remote.sha256
    # Git hashes a header with the content; what it stores itself is small.
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest() == remote.git


def _leftovers(names: list[str]) -> bool:
    """Whether files without checksums are an unfinished push of ours."""
    return any(name.startswith(f"{FOLDER}/") for name in names)


def _literal(name: str) -> str:
    """A pattern that matches one name."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(Path(name).name, pattern) for pattern in WANTED)


def _check_name(name: str, ref: str, own: bool) -> None:
    parts = Path(name).parts
    if own and Path(name).suffix in RUNNABLE:
        raise VerifyError(
            f"{ref} holds {name}, which excise never writes and which could run code when loaded; it was not fetched"
        )
    if name.startswith("/") or "\\" in name or ".." in parts or not parts or parts[0] in (".git", _CLIENT):
        raise VerifyError(
            f"{ref} lists a file named {name!r}, which would be written outside its folder; it was not fetched"
        )


@contextmanager
def _carded(request: Push) -> Iterator[Path]:
    """The folder itself; a copy whose card says that nothing was measured, where nothing was."""
    if request.measured:
        yield request.folder
        return
    with TemporaryDirectory(dir=request.folder.parent, prefix=".excise-push-") as temporary:
        copy = Path(temporary) / request.folder.name
        shutil.copytree(request.folder, copy, copy_function=os.link)
        amend_folder(copy, {CARD: without_measurements(read_manifest(copy) or {})})
        yield copy


def _move_up(target: Path) -> None:
    """What was downloaded becomes the staging folder's own content."""
    for path in list(target.iterdir()):
        path.rename(target.parent / path.name)
    target.rmdir()


@contextmanager
def _explained(ref: str) -> Iterator[None]:
    """The Hub's refusals and a broken connection in one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except ExciseError:
        raise
    except OfflineModeIsEnabled as error:
        raise RequestError("HF_HUB_OFFLINE is set, so the Hub was not asked; unset it") from error
    except LocalEntryNotFoundError as error:
        raise ExciseError(f"{ref} could not be fetched whole: {one_line(error)}; run the same command again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise RequestError(
            f"the Hub refused {ref} ({status or 'no answer'}): {ANSWERS.get(status, one_line(error))}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ExciseError(f"{ref}: {one_line(error)}; run the same command again to go on") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "hf_xet"):
            raise
        raise ExciseError(
            f"the connection for {ref} broke ({type(error).__name__}); run the same command again to go on"
        ) from error


ANSWERS = {
    401: "you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "your token may not do this; give it write access to the repository",
    404: "there is no such repository or revision, or it is private and you are not logged in; check the name",
    409: "another upload is going on; wait and run the same command again",
    412: "somebody else pushed meanwhile; pull, look at what changed, and push again",
    429: "too many requests; wait a minute and run the same command again",
    500: "the Hub has a problem; run the same command again later",
    502: "the Hub has a problem; run the same command again later",
    503: "the Hub is not available; run the same command again later",
}
"""What a status means here, and what to do."""
