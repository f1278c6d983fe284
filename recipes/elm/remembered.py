"""What the teacher read, by row: in memory where it fits, else in files that are mapped into memory.

The system keeps of a mapped file what it has room for, and reads the rest again when it is asked for.
"""

import logging
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ...artifacts.models.memory import available_memory, free_memory

log = logging.getLogger(__name__)
SHARE = 0.4
"""Share of the device's free memory, and of the machine's, that what is remembered may take."""
FILE_NUMBERS = 1 << 26
"""Numbers of one mapped file, at least."""


class Pages:
    """Tensors that stay: on their device as long as there is room, then in main memory, then on disk."""

    def __init__(self, device: torch.device, room: int | None = None, main: int | None = None):
        """Args:
        room: Bytes that may stay on the device; by default a share of what is free.
        main: Bytes that may stay in main memory.
        """
        self.device = device
        self.room = int(SHARE * free_memory(device)) if room is None else room
        self.main = (0 if device.type == "cpu" else int(SHARE * available_memory())) if main is None else main
        self._held = self._in_main = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._file: Tensor | None = None
        self._used = self._files = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it where there is room."""
        if self._held + tensor.nbytes <= self.room:
            self._held += tensor.nbytes
            return tensor
        if self._in_main + tensor.nbytes <= self.main:
            self._in_main += tensor.nbytes
            return tensor.cpu()
        return self._on_disk(tensor)

    def _on_disk(self, tensor: Tensor) -> Tensor:
        if self._folder is None:
            # Beside the run's other temporary files: they are removed with the process.
            self._folder = tempfile.TemporaryDirectory(prefix="excise-teacher-")
            log.warning("what the teacher read does not fit into memory; the rest goes to disk, and takes longer")
        if self._file is None or self._used + tensor.numel() > len(self._file) or self._file.dtype != tensor.dtype:
            size = max(FILE_NUMBERS, tensor.numel())
            path = Path(self._folder.name) / str(self._files)
            self._file = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
            self._used, self._files = 0, self._files + 1
        place = self._file[self._used : self._used + tensor.numel()].view(tensor.shape)
        place.copy_(tensor)
        self._used += tensor.numel()
        return place

    def clear(self) -> None:
        """Forget all of it; files go once nothing reads them."""
        self._held = self._in_main = self._used = self._files = 0
        self._file = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
