"""Training of whole weights: what it takes, and the optimizer with which it fits into memory."""

import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from ...artifacts.checkpoints.read import Checkpoint
from ...artifacts.models.memory import free_memory

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
"""AdamW with its two moments in fp32; in 8 bits; in 8 bits and in main memory while a GPU has no room. The names of the
last two are the library's own."""
MOMENT_BYTES: dict[Optimizer, float] = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 0.0}
"""What the two moments of one trained weight take on the device. In 8 bits, 256 numbers share a scale in fp32."""
OTHER_BYTES = 12
"""What else training takes of a weight: itself in fp32, what it was, and its gradient."""
PACKAGE = "bitsandbytes"


@dataclass(frozen=True)
class WholeWeights:
    """How whole weights are trained on a device."""

    optimizer: Optimizer
    need: int
    """Bytes that it takes with this optimizer."""
    free: int
    """Bytes that are free on the device."""
    full: int
    """Bytes that it takes with all states in fp32."""
    processes: int = 1
    """That share the training, with the states in full."""

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.need <= self.free

    @property
    def sentence(self) -> str:
        """What a user is told; empty where states are kept in full."""
        if self.optimizer == "adamw":
            return ""
        paged = ", which go to main memory where the GPU has no room" if self.optimizer.startswith("paged") else ""
        return (
            f"whole weights are trained with AdamW's states in 8 bits ({PACKAGE}){paged}: in full they need"
            f" {self.full / 1e9:.1f} GB, and {self.free / 1e9:.1f} GB are free"
        )

    @property
    def missing(self) -> str:
        """Why it does not fit, and what would."""
        told = f"needs {self.need / 1e9:.1f} GB of memory and {self.free / 1e9:.1f} GB are free"
        if self.processes > 1:
            return f"in {self.processes} processes {told}"
        small = int(self.full * (OTHER_BYTES + MOMENT_BYTES["adamw_8bit"]) / (OTHER_BYTES + MOMENT_BYTES["adamw"]))
        if self.optimizer != "adamw" or small > self.free:
            return told
        return f"{told}; {small / 1e9:.1f} GB are enough with states in 8 bits: pip install 'excise[{PACKAGE}]'"


def products_in(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What products are computed in while whole weights train, which are in fp32 then: the run's own bfloat16 on a GPU.
    None is the weights' type; so it is on processors, whose results would change, and of float16, which overflows.

    Args:
        dtype: Of the run.
    """
    return dtype if device.type == "cuda" and dtype == torch.bfloat16 else None


def computed_in(products: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are computed in this type. The trainer's library wraps a model's forward alone, and
    losses call what is inside of it."""
    if products is None:
        return nullcontext()
    # Copies that were made without a gradient would be taken again where one is needed.
    return torch.autocast(device.type, products, cache_enabled=False)


def whole_weights(checkpoint: Checkpoint, device: torch.device, processes: int = 1) -> WholeWeights:
    """The first optimizer with which every weight of a model can be trained in what is free now; the one in full where
    none fits, or where several processes share the training."""
    elements = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if processes > 1:
        need = shared_need(elements, processes, device)
        return WholeWeights("adamw", need, free_memory(device), need, processes)
    return choose(elements, free_memory(device), device)


def shared_need(elements: int, processes: int, device: torch.device) -> int:
    """Bytes that training so many whole weights takes of the memory that is looked at, where processes share them.

    On a GPU that is one process's part of the weights, gradients and moments, and in the first what weights were. In main
    memory it is all parts, beside the whole model in fp32 and what it was.

    Example:
        >>> shared_need(10**9, 4, torch.device("cuda")) / 10**9
        8.0
    """
    parts, before = 4 + 4 + MOMENT_BYTES["adamw"], 4
    return int(elements * (parts / processes + before if device.type == "cuda" else parts + 4 + before))


def choose(elements: int, free: int, device: torch.device) -> WholeWeights:
    """The same of so many weights and so many free bytes.

    Example:
        >>> choose(10**9, 16 * 10**9, torch.device("cuda")).optimizer
        'adamw_8bit'
    """
    full = need_of(elements, "adamw")
    for optimizer in _known_on(device):
        need = need_of(elements, optimizer)
        if need <= free:
            return WholeWeights(optimizer, need, free, full)
    return WholeWeights("adamw", full, free, full)


def need_of(elements: int, optimizer: Optimizer) -> int:
    """Bytes that training so many whole weights takes on the device."""
    return int(elements * (OTHER_BYTES + MOMENT_BYTES[optimizer]))


def _known_on(device: torch.device) -> tuple[Optimizer, ...]:
    if importlib.util.find_spec(PACKAGE) is None or device.type not in ("cpu", "cuda"):
        return ("adamw",)
    # Pages that move between main memory and the device are CUDA's.
    return ("adamw", "adamw_8bit", "paged_adamw_8bit") if device.type == "cuda" else ("adamw", "adamw_8bit")
