"""A disk cache of tensors that are expensive to compute, by what they were computed from."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..files.opened import Unreadable, sum_of_input
from ..files.tensors import load_safetensors

BUDGET = 4 * 2**30
"""Bytes on disk; the least recently used tensors are deleted first."""

TOGETHER = 600
"""Seconds within which entries are taken for parts of one, when room is made."""


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
            # Where not even the folder could be made, there is nothing to remove.
            with suppress(OSError):
                partial.unlink()

    def _path(self, parts: Iterable[object]) -> Path:
        key = hashlib.sha256(repr((self.scope, *parts)).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def put_parts(self, parts: Iterable[Mapping[str, Tensor]], *key: object) -> None:
        """The same in several files, so that no more than one part is held twice."""
        count = 0
        for count, tensors in enumerate(parts, 1):
            self.put(tensors, *key, "part", count - 1)
        self.put({"parts": torch.tensor(count)}, *key)

    def get_parts(self, *key: object) -> Iterator[dict[str, Tensor]] | None:
        """What ``put_parts`` stored, part by part; None if one of them is gone."""
        stored = self.get(*key)
        if stored is None or "parts" not in stored:
            return None
        names = [(*key, "part", number) for number in range(int(stored["parts"]))]
        if not all(self._path(name).exists() for name in names):
            return None
        return self._until_damaged(names)

    def _until_damaged(self, names: Iterable[tuple[object, ...]]) -> Iterator[dict[str, Tensor]]:
        for name in names:
            part = self.get(*name)
            if part is None:
                # Whoever reads looks at how much came.
                return
            yield part

    def _make_room(self) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        # What was stored last is worth most, however large it is: an entry that were deleted at once would never help.
        # It has half of the disk's free space at most, so that runs find room for their checkpoints.
        budget = max(self.budget, min(self._newest(files), shutil.disk_usage(self.folder).free // 2))
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > budget:
                path.unlink(missing_ok=True)

    def _newest(self, files: Sequence[Path]) -> int:
        """Bytes of what was stored in the last minutes: the parts of one entry belong together."""
        times = [path.stat().st_mtime for path in files]
        return sum(p.stat().st_size for p, time in zip(files, times, strict=True) if times[0] - time < TOGETHER)


def scope_of(folder: Path, dtype: torch.dtype, device: torch.device) -> str:
    """A text that identifies a model's outputs: hashes of weights and config, dtype, device and library versions."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    sums = [sum_of_input(path) for path in files]
    # Versions and the processor's instructions decide the last bits of a result.
    versions = (torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability())
    return repr((sums, str(dtype), device.type, versions))
