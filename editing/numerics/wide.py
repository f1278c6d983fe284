"""Sums in float64, which some GPUs do not know, and products in the type that their factors have."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

NO_FLOAT64 = {"mps"}
"""Kinds of devices without float64; what is summed in it is moved to the processor."""


def in_float64(values: Tensor) -> Tensor:
    """Values [*n] in float64, on their device where it has that, otherwise on the processor.

    Example:
        >>> in_float64(torch.ones(2)).dtype
        torch.float64
    """
    # Moved first: a device without float64 cannot convert to it.
    return (values.cpu() if values.device.type in NO_FLOAT64 else values).double()


def wide(values: Tensor) -> Tensor:
    """Values in fp32, or wider where they are already.

    Example:
        >>> wide(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values if values.dtype == torch.float64 else values.float()


def widest(device: torch.device) -> torch.dtype:
    """float64 where a device has it, otherwise float32."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are computed in the type of their factors, also while autocast is on.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), as_given(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; of a kind of device that has none, torch cannot be asked.

    Example:
        >>> autocasts(torch.device("cpu"))
        False
    """
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
