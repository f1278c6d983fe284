"""Downloading checkpoints from the Hugging Face Hub: a folder appears only after every byte was checked."""

import fnmatch
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..editing.errors import ExciseError, RequestError, VerifyError
from .checkpoints.adapter_config import CONFIG, WHOLE_WEIGHTS
from .checkpoints.manifest import (
    FOLDER,
    MANIFEST,
    SUMS,
    verify_folder,
)
from .checkpoints.read import check_finite, open_checkpoint
from .checkpoints.staging import refuse_existing, staged_folder
from .hub import GIT_ATTRIBUTES, Digest, explained, literal, remote_files, same_content
from .models.hub import side_names
from .reporting.card import CARD

_REF = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
RUNNABLE = (".py", ".so", ".sh", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".onnx")
_CLIENT = ".cache"
"""Folder in which the client keeps its notes beside the downloaded files."""


@dataclass(frozen=True)
class Pulled:
    """A downloaded checkpoint."""

    folder: Path
    commit: str
    files: int
    made_by_excise: bool
    """Whether the checkpoint has excise's checksums; otherwise the Hub's were used."""
    left_out: int = 0
    """Number of files that were not fetched, because they are neither safetensors weights nor configuration."""


def pull(ref: str, out: Path) -> Pulled:
    """Download a checkpoint at a commit, check every byte, and only then rename it to ``out``.

    Args:
        ref: ``OWNER/NAME``, with ``@REVISION`` for a branch, tag or commit.
        out: The new folder.

    Raises:
        RequestError: ``out`` exists, the id is wrong, or the Hub refused.
        VerifyError: A file is not as it was published; the message names it.
    """
    from huggingface_hub import HfApi, snapshot_download

    match = _REF.fullmatch(ref)
    if not match:
        raise RequestError(f"{ref!r} is no repository id; give OWNER/NAME, with @REVISION for a branch, tag or commit")
    refuse_existing(out)
    api = HfApi()
    with explained(ref), staged_folder(out, resumable=True) as staging:
        # The branch may move while files are fetched, so everything below is of one commit.
        commit = str(api.repo_info(match["id"], revision=match["revision"]).sha)
        listed = remote_files(api, match["id"], commit)
        made_by_excise = SUMS in listed
        # Names are checked before anything is fetched, because a bad one could be written outside the folder.
        for name in listed:
            _check_name(name, ref, made_by_excise)
        if CONFIG in listed and not any(fnmatch.fnmatchcase(name, kind) for name in listed for kind in WHOLE_WEIGHTS):
            raise RequestError(
                f"{ref} is a PEFT adapter, not a whole model; every command takes it by its id, and"
                f" `excise apply {ref} --out DIR` merges it into its base"
            )
        # Without its checksums, what excise wrote shows that an upload was not finished.
        ours = (name for name in listed if name.startswith(f"{FOLDER}/"))
        kept = {*side_names(listed), *filter(_is_weights, listed), *ours}
        wanted = {name: digest for name, digest in listed.items() if made_by_excise or name in kept}
        target = staging / commit
        # A killed pull of another commit leaves a folder that this pull cannot use.
        for other in staging.iterdir():
            if other != target:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        snapshot_download(
            match["id"], revision=commit, local_dir=target, allow_patterns=[literal(name) for name in wanted]
        )
        # The client's notes and the Hub's file of attributes are no part of the checkpoint, whose checksums do not list
        # them.
        shutil.rmtree(target / _CLIENT, ignore_errors=True)
        (target / GIT_ATTRIBUTES).unlink(missing_ok=True)
        try:
            _check_arrived(target, wanted, ref)
            count = verify_folder(target) if made_by_excise else _check_foreign(target, ref)
            check_finite(open_checkpoint(target))
        except ExciseError:
            # Otherwise the next pull would find the same damaged bytes and not fetch them again.
            shutil.rmtree(target)
            raise
        _move_up(target)
        return Pulled(out, commit, count, made_by_excise, len(listed.keys() - wanted.keys() - {GIT_ATTRIBUTES}))


def _check_arrived(folder: Path, listed: dict[str, Digest], ref: str) -> None:
    """Compare every downloaded file with the Hub's list."""
    # The client does not hash what it downloads over HTTP.
    for name, expected in listed.items():
        if name == GIT_ATTRIBUTES:
            continue
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise VerifyError(f"{name} of {ref} did not arrive as a file; pull again")
        if not same_content(path, expected):
            raise VerifyError(f"{name} of {ref} arrived damaged: it is not what the Hub lists; pull again")


def _check_foreign(folder: Path, ref: str) -> int:
    """Accept a model without excise's checksums, unless it is an unfinished upload; returns the file count."""
    card = folder / CARD
    if (folder / MANIFEST).exists() or (
        card.is_file() and f"{FOLDER}/" in card.read_text(encoding="utf-8", errors="replace")[:4000]
    ):
        raise VerifyError(
            f"{ref} has excise's files but no {SUMS}: its upload was not finished; ask its owner to push again"
        )
    return sum(path.is_file() for path in folder.rglob("*"))


def _is_weights(name: str) -> bool:
    """Whether a file holds weights of the model, and not a second copy of them."""
    return "/" not in name and name.endswith(".safetensors") and not name.startswith("consolidated")


def _check_name(name: str, ref: str, made_by_excise: bool) -> None:
    parts = Path(name).parts
    if made_by_excise and Path(name).suffix in RUNNABLE:
        raise VerifyError(
            f"{ref} holds {name}, which excise never writes and which could run code when loaded; it was not fetched"
        )
    if name.startswith("/") or "\\" in name or ".." in parts or not parts or parts[0] in (".git", _CLIENT):
        raise VerifyError(
            f"{ref} lists a file named {name!r}, which would be written outside its folder; it was not fetched"
        )


def _move_up(target: Path) -> None:
    """Move the downloaded files into the staging folder itself."""
    for path in list(target.iterdir()):
        path.rename(target.parent / path.name)
    target.rmdir()
