"""Tensors that are dear to compute, kept on disk under what they were computed from."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .manifest import sha256_of

BUDGET = 4 * 2**30
"""Bytes kept; what was used longest ago goes first."""


@dataclass(frozen=True)
class TensorCache:
    """A folder of tensors by content key. Losing it costs time alone."""

    folder: Path
    scope: str
    """What all of them depend on: the model's files and the type it computes in."""
    budget: int = BUDGET

    def get(self, *parts: object) -> dict[str, Tensor] | None:
        """What is kept under a key, or None."""
        path = self._path(parts)
        try:
            found: dict[str, Tensor] = load_file(path)
            os.utime(path)
        except (OSError, SafetensorError):
            return None
        return found

    def put(self, tensors: Mapping[str, Tensor], *parts: object) -> None:
        """Keep tensors whole or not at all; a full disk is no reason to stop."""
        path = self._path(parts)
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
    """Identifies a model's outputs: the bytes of its weights and configuration, and what computes."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    sums = [sha256_of(path) for path in files]
    versions = (torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability())
    return repr((sums, str(dtype), device.type, versions))
