"""Files that a program may be killed while it writes: whole or not at all, and sealed against changes."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .forms import Form, validated
from .opened import Unreadable, regular_file
from .parsed import read_object

SEAL = "seal.json"
"""Checksums of the files of a folder, in the folder itself."""
CHECKSUM = "sha256_of_content"
"""Key of a sealed object's own checksum."""


class _Seal(Form):
    files: Annotated[dict[str, str], Field(min_length=1)]
    """A seal of no file would call anything whole."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all; until then the old content, if any, stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        # Synced before the rename: otherwise a power cut could leave the new name with an empty file.
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its own checksum, completely or not at all."""
    write_whole(path, sealed(content))


def sealed(content: Mapping[str, Any]) -> str:
    """A JSON object as text, with its own checksum."""
    # As it will be read: JSON makes texts of keys that are numbers.
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, CHECKSUM: _digest(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What ``write_sealed`` wrote.

    Raises:
        Unreadable: The file is damaged, or was changed since.
        OSError: It does not exist, or the system refuses it.
    """
    return unsealed(read_object(path))


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a sealed object.

    Raises:
        Unreadable: It was changed, or never sealed.
    """
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    if content.get(CHECKSUM) != _digest(rest):
        raise Unreadable("it was changed since it was written, or another version wrote it")
    return rest


def seal_files(seal: Path, files: Mapping[str, Path]) -> None:
    """Write the checksums of files, by the names under which ``check_sealed`` will look for them."""
    write_sealed(seal, {"files": {name: _sha256(path) for name, path in sorted(files.items())}})


def files_in(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Every file of a folder by its relative name, seals left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {f"{prefix}{path.relative_to(folder).as_posix()}": path for path in files}


def check_sealed(seal: Path, base: Path) -> tuple[list[str], list[str]]:
    """Names of sealed files that are gone from ``base``, and of those that were changed.

    Raises:
        Unreadable: The seal is damaged.
        OSError: There is no seal.
    """
    sums = validated(_Seal, read_sealed(seal)).files
    present = {name: digest for name, digest in sums.items() if (base / name).is_file()}
    changed = [name for name, digest in present.items() if _sha256(base / name) != digest]
    return sorted(sums.keys() - present.keys()), changed


def _sha256(path: Path) -> str:
    with regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
