"""A disk cache of tensors that are expensive to compute, by what they were computed from."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..files.opened import Unreadable, sha256_of
from ..files.tensors import load_safetensors

BUDGET = 4 * 2**30
"""Bytes on disk; the least recently used tensors are deleted first."""


@dataclass(frozen=True)
class TensorCache:
    """A folder of tensors by key. Deleting it only costs time."""

    folder: Path
    scope: str
    """What all entries depend on: the model's files and its dtype, as ``scope_of`` writes it."""
    budget: int = BUDGET

    def get(self, *parts: object) -> dict[str, Tensor] | None:
        """The tensors of a key, or None if there are none or they cannot be read."""
        path = self._path(parts)
        try:
            tensors = load_safetensors(path)
            # The time of last use, by which old entries are deleted.
            os.utime(path)
        except (OSError, Unreadable):
            return None
        return tensors

    def put(self, tensors: Mapping[str, Tensor], *parts: object) -> None:
        """Store tensors completely or not at all; a full disk is not an error."""
        path = self._path(parts)
        # The process number keeps two runs apart that compute the same entry.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            partial.replace(path)
            self._make_room()
        except (OSError, SafetensorError):
            partial.unlink(missing_ok=True)

    def _path(self, parts: Iterable[object]) -> Path:
        key = hashlib.sha256(repr((self.scope, *parts)).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self.budget:
                path.unlink(missing_ok=True)


def scope_of(folder: Path, dtype: torch.dtype, device: torch.device) -> str:
    """A text that identifies a model's outputs: hashes of weights and config, dtype, device and library versions."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    sums = [sha256_of(path) for path in files]
    # Versions and the processor's instructions decide the last bits of a result.
    versions = (torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability())
    return repr((sums, str(dtype), device.type, versions))
