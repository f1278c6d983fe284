"""Where a model goes: whole to one device, spread over all GPUs, or, as the last resort, partly to main memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...editing.errors import RequestError
from ..checkpoints.read import Checkpoint
from .memory import available_memory, free_memory, weight_bytes

SHARE = 0.8
"""Share of free memory that weights may take where a model is spread; the rest is for what is computed."""
Place = int | str
"""The number of a GPU, or "cpu"."""


@dataclass(frozen=True)
class Placement:
    """Bytes of weights that each place may take; none where the device takes the whole model."""

    room: Mapping[Place, int]
    weights: int

    @property
    def left_over(self) -> int:
        """Bytes that no GPU has room for."""
        on_gpus = sum(size for place, size in self.room.items() if place != "cpu")
        return max(0, self.weights - on_gpus) if self.room else 0

    @property
    def offloads(self) -> bool:
        """Whether main memory holds a part, which each forward copies to a GPU."""
        return self.left_over > 0

    @property
    def fits(self) -> bool:
        """Whether all places together hold the model."""
        return not self.room or self.weights <= sum(self.room.values())

    def sentence(self, name: str) -> str:
        """What a user is told of it; empty where the model is whole."""
        if not self.room:
            return ""
        gpus = len([place for place in self.room if place != "cpu"])
        spread = f"{name} is too large for one GPU" + (f" and is spread over {gpus}" if gpus > 1 else "")
        if not self.offloads:
            return spread
        share = self.left_over / self.weights
        return (
            f"{spread}; {share:.0%} of its weights stay in main memory and are copied to a GPU in every forward, which is"
            " many times slower; use --dtype bfloat16 or larger GPUs to avoid it"
        )


def placement(weights: int, free: Sequence[int], main: int) -> Placement:
    """Plan where a model goes, from bytes of weights and free bytes alone.

    Args:
        weights: Bytes of the model's weights.
        free: Free bytes of each GPU.
        main: Free bytes of main memory.

    Example:
        >>> placement(16, [80], 100).room
        {}
        >>> placement(100, [80, 80], 100).room
        {0: 64, 1: 64}
    """
    # Alone, a GPU is used to its end before main memory is.
    if weights <= (SHARE if len(free) > 1 else 1.0) * free[0]:
        return Placement({}, weights)
    room: dict[Place, int] = {number: int(SHARE * size) for number, size in enumerate(free)}
    if weights > sum(room.values()):
        room["cpu"] = int(SHARE * main)
    return Placement(room, weights)


def spreads(device: torch.device) -> bool:
    """Whether a model may take other GPUs too: ``auto`` and ``cuda`` name no number, ``cuda:N`` is one GPU."""
    return device.type == "cuda" and device.index is None


def placement_of(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Placement:
    """Plan where a checkpoint's model goes on this machine, as it is at the moment."""
    weights = weight_bytes(checkpoint, dtype)
    if not spreads(device):
        return Placement({}, weights)
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return placement(weights, [free_memory(gpu) for gpu in gpus], available_memory())


def check_trainable(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, bits: int = 16) -> None:
    """Check that a model can be trained as it would lie, in the type that it would have.

    Args:
        bits: 4 for a base that is quantized while it is loaded, to one GPU.

    Raises:
        RequestError: A part would stay in main memory, or its type needs what the device lacks.
    """
    where = placement_of(checkpoint, device, dtype)
    if where.offloads and bits == 16:
        raise RequestError(
            f"training needs all weights on GPUs, and {where.left_over / 1e9:.1f} GB of {where.weights / 1e9:.1f} GB have no"
            " room there; use --dtype bfloat16, more or larger GPUs, base_bits=4 where a recipe has it, or --device cpu"
        )
    if dtype == torch.float16 and device.type != "cuda":
        raise RequestError(
            f"training in float16 needs a scaled loss, which there is on CUDA alone, and the device is {device};"
            " use --dtype float32"
        )
