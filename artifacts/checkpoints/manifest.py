"""The manifest and checksums of a published folder, and the check that nothing changed since."""

import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...editing.errors import RequestError, VerifyError
from ..files.opened import Telling, read_text, sha256_of
from ..files.written import sync
from ..upgrade import SCHEMA_VERSION, read_json

if TYPE_CHECKING:
    # It imports torch, which lists and help do without.
    from ...editing.edits.changes import Change

FOLDER = "excise"
MANIFEST = f"{FOLDER}/manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = f"{SUMS}.sig"
"""Signature of the checksums file; not listed in it."""
log = logging.getLogger(__name__)
PACKAGES = ("excise", "torch", "transformers", "safetensors", "huggingface-hub", "numpy")


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint of a run's folder; any other folder is returned as it is."""
    inner = folder / "checkpoint"
    is_model = (folder / SUMS).exists() or (folder / "config.json").exists()
    return inner if inner.is_dir() and not is_model else folder


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    return {name: metadata.version(name) for name in PACKAGES}


def platform_of() -> dict[str, str]:
    """System, processor family and instruction set, which decide the last bits of a result."""
    import torch

    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def write_manifest(
    folder: Path,
    *,
    base: dict[str, Any],
    base_files: dict[str, str],
    changes: "tuple[Change, ...]",
    untied: str | None,
    known: dict[str, str],
    run: dict[str, Any],
    code_left_out: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Write ``excise/manifest.json`` and ``SHA256SUMS`` for everything in a staging folder.

    Args:
        known: SHA-256 of files hashed while they were written, so that weights are not read again.
        run: Recipe, settings, seeds and versions.
        code_left_out: Code that the base names and that was not copied, by the file that named it.
    """
    files: dict[str, dict[str, Any]] = {
        name: {"size": (folder / name).stat().st_size, "sha256": known.get(name) or sha256_of(folder / name)}
        for name in _files(folder)
        if name not in (MANIFEST, SUMS)
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "base": {**base, "files": base_files},
        "run": run,
        "packages": package_versions(),
        "platform": platform_of(),
        "tensors_changed": [asdict(change) for change in changes if change.changed],
        "tensors_declared_but_unchanged": [change.name for change in changes if not change.changed],
        "tensor_added": untied,
        "code_left_out": dict(code_left_out),
        "files": files,
    }
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    # The sums cover the manifest, so they are written last.
    sums = {name: entry["sha256"] for name, entry in files.items()} | {MANIFEST: sha256_of(folder / MANIFEST)}
    (folder / SUMS).write_text(_sums_text(sums), encoding="utf-8")


def verify_folder(folder: Path) -> int:
    """Check a published folder against its own checksums; returns how many files were checked.

    Raises:
        RequestError: The folder has no checksums, so excise did not make it.
        VerifyError: A file was changed, added, removed or replaced by a link; the message names it.
    """
    sums_path = folder / SUMS
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; give a checkpoint folder")
    if not sums_path.is_file():
        inner = folder / "checkpoint"
        hint = (
            f"; did you mean {inner}?" if inner.is_dir() else "; excise did not make it, or its checksums were removed"
        )
        raise RequestError(f"{folder} has no {SUMS}{hint}")
    # Links could point outside the folder, where the checksums do not reach.
    problems = [f"{name} is a link" for name in _files(folder) if (folder / name).is_symlink()]
    problems += [f"{path.relative_to(folder)} is an empty folder" for path in _empty_folders(folder)]
    actual = {
        name: sha256_of(folder / name)
        for name in _files(folder)
        # The signature is made over the checksums, so they cannot list it.
        if name not in (SUMS, SIGNATURE) and (folder / name).is_file()
    }
    # A damaged file of sums must be reported as such, so it is decoded whatever it holds.
    raw = sums_path.read_bytes().decode("utf-8", errors="replace")
    listed = {line[66:]: line[:64] for line in raw.splitlines()}
    problems += [f"{name} is missing" for name in sorted(listed.keys() - actual.keys())]
    problems += [f"{name} is not in {SUMS}" for name in sorted(actual.keys() - listed.keys())]
    problems += [
        f"{name} was changed" for name in sorted(listed.keys() & actual.keys()) if listed[name] != actual[name]
    ]
    # The file of sums is compared as text, so that a changed space or letter case in it is noticed as well.
    if not problems and raw != _sums_text(actual):
        problems = [f"{SUMS} was changed"]
    if MANIFEST not in actual:
        problems.append(f"{MANIFEST} is missing")
    if problems:
        raise VerifyError(f"{folder.name} is not as it was published: {'; '.join(problems[:5])}; fetch it again")
    return len(actual) + 1


def check_unchanged(folder: Path, names: Iterable[str]) -> None:
    """Check some small files of a published folder against its checksums; a folder without any is taken as it is.

    Raises:
        VerifyError: A file was changed, removed or added since; the message names it.
    """
    if not (folder / SUMS).is_file():
        return
    with Telling(VerifyError, "fetch it again").about(f"{folder.name}/{SUMS}"):
        listed = {line[66:]: line[:64] for line in read_text(folder / SUMS).splitlines()}
    for name in names:
        actual = sha256_of(folder / name) if (folder / name).is_file() else None
        if actual != listed.get(name):
            raise VerifyError(
                f"{folder.name} is not as it was published: {name} was changed, added or removed; `excise verify` lists"
                " everything, and the run or a fetch makes it again"
            )


def amend_folder(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Add or replace small files of a published folder, checksums included.

    The new folder is completed beside the old one, with hard links to its weights, and then takes its place. A
    signature is removed with a warning, because it belongs to the old checksums.

    Args:
        folder: A published folder.
        contents: New content by file name, relative to the folder.

    Raises:
        VerifyError: The folder is not as it was published.
    """
    verify_folder(folder)
    staging, before = folder.with_name(f".{folder.name}.amended"), folder.with_name(f".{folder.name}.before")
    shutil.rmtree(staging, ignore_errors=True)
    # Links, not copies: the weights may be larger than the free space.
    shutil.copytree(folder, staging, copy_function=os.link)
    manifest = read_json(folder / MANIFEST)
    if (staging / SIGNATURE).exists():
        (staging / SIGNATURE).unlink()
        log.warning("%s was signed; its files have changed, so the signature was removed; sign it again", folder.name)
    for name, content in contents.items():
        _write_anew(staging / name, content)
        manifest["files"][name] = {"size": (staging / name).stat().st_size, "sha256": sha256_of(staging / name)}
    _write_anew(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    sums = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    _write_anew(staging / SUMS, _sums_text(sums | {MANIFEST: sha256_of(staging / MANIFEST)}))
    # Everything is on disk before the names change, so that a crash leaves the old folder or the new one.
    for path in staging.rglob("*"):
        sync(path)
    # A rename cannot replace a folder that holds something, so the old one moves aside first.
    os.rename(folder, before)
    os.rename(staging, folder)
    shutil.rmtree(before)


def _write_anew(path: Path, content: str | bytes) -> None:
    """Replace a file by a new one."""
    # The old file may be a hard link into another folder, which writing into it would change.
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None where there is none.

    Raises:
        RequestError: It is not of the form that excise writes.
    """
    path = folder / MANIFEST
    return read_json(path) if path.is_file() else None


def _files(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _empty_folders(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink() and not os.listdir(path)]


def _sums_text(sums: dict[str, str]) -> str:
    """The format of coreutils' ``sha256sum``."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
