"""Outlines of models on the Hub: everything but the weights, which are files of the right size without their numbers.

A dry run needs names, types and shapes of tensors. These stand in the first kilobytes of each file, and the rest may be
hundreds of gigabytes.

Example:
    >>> with outlines():
    ...     source = find_model("org/name", to_edit=True)
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
AT_ONCE = 8
"""Headers that are fetched at the same time."""
_PLACE: ContextVar[Path | None] = ContextVar("place of outlines", default=None)


@contextmanager
def outlines(wanted: bool = True) -> Iterator[None]:
    """Fetch outlines of Hub models instead of their weights while the context lasts; then they are removed.

    What is found meanwhile may be planned with and not loaded, merged or converted.

    Args:
        wanted: Do so; otherwise the context does nothing.
    """
    if not wanted:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="excise-outline-") as folder:
        token = _PLACE.set(Path(folder))
        try:
            yield
        finally:
            _PLACE.reset(token)


@contextmanager
def whole_models() -> Iterator[None]:
    """Fetch weights even within ``outlines``, where their numbers are needed."""
    token = _PLACE.set(None)
    try:
        yield
    finally:
        _PLACE.reset(token)


def place_of_outlines() -> Path | None:
    """The folder that outlines go into; None where whole models are wanted."""
    return _PLACE.get()


def outline(
    api: Any, repo_id: str, snapshot: Path, files: Sequence[str], sizes: Mapping[str, int], place: Path
) -> Path:
    """A folder that holds what ``snapshot`` does, and the headers of the weights.

    Args:
        api: The Hub's client.
        repo_id: The repository.
        snapshot: The files beside the weights, in a folder named by the commit.
        files: The files of weights.
        sizes: Bytes of each file, as the Hub says.
        place: Where outlines go.
    """
    log.info("reading the headers of %d files of weights of %s, not the weights", len(files), repo_id)
    folder = place / repo_id.replace("/", "--") / snapshot.name
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for path in snapshot.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(snapshot)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())

    def header(name: str) -> Any:
        return api.parse_safetensors_file_metadata(repo_id, name, revision=snapshot.name)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, about in zip(files, pool.map(header, files), strict=True):
            (folder / name).unlink(missing_ok=True)
            _write(folder / name, about, sizes[name])
    return folder


def _write(path: Path, about: Any, size: int) -> None:
    """A file with this header, and a hole where the numbers would be."""
    tensors = {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
        for name, tensor in about.tensors.items()
    }
    metadata = {"__metadata__": about.metadata} if about.metadata else {}
    text = json.dumps({**metadata, **tensors}, separators=(",", ":")).encode()
    end = max((tensor.data_offsets[1] for tensor in about.tensors.values()), default=0)
    # The stored header may have been written with other blanks; the file gets the size that it has on the Hub.
    text += b" " * max(size - 8 - end - len(text), 0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + min(end, size))
