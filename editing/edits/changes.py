"""What an edit did to each tensor, summed up block by block while it is done."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import EditError

WHOLE = 1 << 30
"""Rows a block, where a tensor is taken in one."""


@dataclass(frozen=True)
class Change:
    """What an edit did to one tensor."""

    name: str
    form: str
    strength: float
    relative_change: float
    """Frobenius norm of the change over that of the tensor."""
    largest_change: float
    """Largest absolute change of one weight."""
    written: float | None
    """Orthogonalization: share of what the tensor writes to the stream that lay in the subspace before (0 to 1, root mean square)."""
    residual: float | None
    """Orthogonalization: what is left of that component, in stored precision, over what it was; 0 where there was none."""
    changed: bool


class Meter:
    """Sums what happens to one matrix, in two fp32 buffers that all its blocks share.

    Arithmetic on a checkpoint is bound by memory: fresh buffers, and a pass more over each block, would
    cost as much as the edit.
    """

    def __init__(self, name: str):
        self.name = name
        self.weight = self.difference = self.largest = 0.0
        self._buffers: list[Tensor] = []

    def widen(self, stored: Tensor, *, counted: bool = False) -> Float[Tensor, "rows columns"]:
        """A block in fp32, in a buffer that the next block overwrites; ``counted`` if it was seen before.

        Raises:
            EditError: It holds NaN or an infinity.
        """
        block = self._buffer(0, stored).copy_(stored)
        if not counted:
            squared = _dot(block)
            # Squares of huge finite weights overflow too; only then is the slow test worth its time.
            if not squared < float("inf"):
                if not torch.isfinite(block).all():
                    raise EditError(f"{self.name} holds NaN or infinite weights; the base checkpoint is damaged")
                squared = float(block.double().square().sum())
            self.weight += squared
        return block

    def room(self, stored: Tensor) -> Tensor:
        """An fp32 buffer of a block's shape for its edited values."""
        return self._buffer(1, stored)

    def finish(self, edited: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The edited block as it is stored, in memory of its own, and the same values in fp32."""
        finished = edited.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return finished, edited.copy_(finished)

    def compare(self, block: Tensor, rounded: Tensor) -> None:
        """Count the difference between a block and its edited values, which this overwrites."""
        rounded.sub_(block)
        self.difference += _dot(rounded)
        if rounded.numel():
            low, high = torch.aminmax(rounded)
            self.largest = max(self.largest, -float(low), float(high))

    def change(
        self, form: str, strength: float, *, written: float | None = None, residual: float | None = None
    ) -> Change:
        """The record of the whole matrix."""
        return Change(
            self.name,
            form,
            strength,
            ratio(self.difference, self.weight),
            self.largest,
            written,
            residual,
            changed=self.largest > 0,
        )

    def _buffer(self, number: int, stored: Tensor) -> Tensor:
        if len(self._buffers) <= number or len(self._buffers[number]) < len(stored):
            self._buffers[number:] = [torch.empty(stored.shape, dtype=torch.float32)]
        return self._buffers[number][: len(stored)]


def block_ranges(rows: int, rows_per_block: int) -> list[slice]:
    """Consecutive ranges of rows."""
    step = max(1, rows_per_block)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def ratio(squared_part: float, squared_whole: float) -> float:
    """Of two squared norms, the ratio of the norms; 0 of nothing."""
    return (squared_part / squared_whole) ** 0.5 if squared_whole > 0 else 0.0


def _dot(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
