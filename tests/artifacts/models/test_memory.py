"""Free memory of a GPU: what the driver has, and what PyTorch holds but does not use."""

from pathlib import Path

import pytest
import torch
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.memory import check_memory, free_memory
from excise.editing.errors import ExciseError
from helpers import SMALL_TESTBED

GPU = torch.device("cuda:0")


class Allocator:
    """PyTorch's view of a GPU of a given size whose driver knows of nobody else."""

    def __init__(self, monkeypatch, total):
        self.total, self.reserved, self.allocated = total, 0, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.total - self.reserved, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)


def test_memory_of_freed_tensors_counts_as_free(monkeypatch):
    checkpoint = open_checkpoint(Path(SMALL_TESTBED))
    size = 4 * sum(torch.Size(tensor.shape).numel() for tensor in checkpoint.tensors.values())
    allocator = Allocator(monkeypatch, total=size * 3 // 2)
    # A model was loaded and freed: the driver sees half a model's room, and a whole one fits.
    allocator.reserved = size
    assert torch.cuda.mem_get_info(GPU)[0] < size
    assert free_memory(GPU) == allocator.total
    check_memory(checkpoint, GPU, torch.float32)

    allocator.allocated = size  # It is still there.
    with pytest.raises(ExciseError, match=r"has .* GB free"):
        check_memory(checkpoint, GPU, torch.float32)
