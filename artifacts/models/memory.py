"""How much memory is free, whether a model fits into it, and giving it back."""

import gc
import os
from pathlib import Path

import torch

from ...editing.errors import ExciseError
from ..checkpoints.read import Checkpoint


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in memory."""
    return sum(elements(tensor.shape) for tensor in checkpoint.tensors.values()) * dtype.itemsize


def check_memory(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the weights alone fit into the device's free memory.

    Raises:
        ExciseError: They do not fit.
    """
    weights, free = weight_bytes(checkpoint, dtype), free_memory(device)
    if weights > free:
        raise ExciseError(
            f"the model needs {weights / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}, "
            f"{device} has {free / 1e9:.1f} GB free; "
            "use --dtype bfloat16 or a larger machine; `excise apply` needs no memory for the model"
        )


def release_memory() -> None:
    """Free models that nobody uses any more, and give a GPU's memory back to all programs that use it."""
    # Models are in cycles of references, so that they outlive their last name.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can take on a device."""
    if device.type != "cuda":
        return available_memory()
    # What PyTorch holds of freed tensors counts as taken for the driver, and new tensors get it all the same.
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + idle


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        # The real number of free pages is not known without /proc; what the machine has is an upper limit.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor of this shape."""
    count = 1
    for length in shape:
        count *= length
    return count
