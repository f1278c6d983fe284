"""Records of what an edit did to each tensor, summed block by block while the edit runs."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import EditError

WHOLE = 1 << 30
"""Rows per block that put any tensor into a single block."""


@dataclass(frozen=True)
class Change:
    """What an edit did to one tensor."""

    name: str
    form: str
    strength: float
    relative_change: float
    """Frobenius norm of the change, divided by that of the tensor."""
    largest_change: float
    """Largest absolute change of one weight."""
    written: float | None
    """Orthogonalization only: share of the tensor's writes that lay in the subspace before (RMS, 0 to 1)."""
    residual: float | None
    """Orthogonalization only: that component after the edit in stored precision, divided by that before."""
    changed: bool


class Meter:
    """Sums the changes of one matrix, in two fp32 buffers that all its blocks share.

    Editing a checkpoint is limited by memory bandwidth: new buffers for each block, or one more pass over it, would
    cost as much time as the edit.
    """

    def __init__(self, name: str):
        self.name = name
        self.weight = self.difference = self.largest = 0.0
        self._buffers: list[Tensor] = []

    def widen(self, stored: Tensor, *, counted: bool = False) -> Float[Tensor, "rows columns"]:
        """A block in fp32, in a buffer that the next block overwrites.

        Args:
            stored: The block in stored dtype.
            counted: Whether the block was read before; its norm is then not added again.

        Raises:
            EditError: The block holds NaN or an infinity.
        """
        block = self._buffer(0, stored).copy_(stored)
        if not counted:
            squared = _dot(block)
            # Squares of huge finite weights overflow as well, so the slower exact test decides.
            if not squared < float("inf"):
                if not torch.isfinite(block).all():
                    raise EditError(
                        f"{self.name} holds NaN or infinite weights; the base checkpoint is damaged, fetch it again"
                    )
                squared = float(block.double().square().sum())
            self.weight += squared
        return block

    def room(self, stored: Tensor) -> Tensor:
        """An fp32 buffer with the block's shape, for the edited values."""
        return self._buffer(1, stored)

    def finish(self, edited: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The edited block in stored dtype, as a copy, and the same rounded values in fp32."""
        # The caller keeps the stored block while the buffer behind ``edited`` is reused for the next one.
        finished = edited.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return finished, edited.copy_(finished)

    def compare(self, block: Tensor, rounded: Tensor) -> None:
        """Add the difference between a block and its edited values to the sums; overwrites ``rounded``.

        Raises:
            EditError: An edited value is NaN or infinite.
        """
        rounded.sub_(block)
        self.difference += _dot(rounded)
        if rounded.numel():
            # One pass over the block; abs().max() would need another buffer.
            low, high = (float(end) for end in torch.aminmax(rounded))
            # Either end is NaN where any value is.
            if not (math.isfinite(low) and math.isfinite(high)):
                raise EditError(
                    f"the edit would make weights of {self.name} NaN or infinite; lower its strength, or learn it again"
                )
            self.largest = max(self.largest, -low, high)

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
        # Only the last block of a matrix is shorter, so each buffer is made once.
        if len(self._buffers) <= number or len(self._buffers[number]) < len(stored):
            self._buffers[number:] = [torch.empty(stored.shape, dtype=torch.float32)]
        return self._buffers[number][: len(stored)]


def block_ranges(rows: int, rows_per_block: int) -> list[slice]:
    """Consecutive ranges of rows."""
    step = max(1, rows_per_block)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def ratio(squared_part: float, squared_whole: float) -> float:
    """Ratio of two norms, from their squares; 0 if the second is 0."""
    return (squared_part / squared_whole) ** 0.5 if squared_whole > 0 else 0.0


def _dot(values: Tensor) -> float:
    # torch.dot needs no buffer for the squares.
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
