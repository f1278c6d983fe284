"""Weight orthogonalization: removing a subspace from what a tensor writes, block by block.

Every form of the edit is ``W <- W - strength * left (right^T W)`` for a tensor whose columns are
writes to the residual stream; the forms differ in ``left`` and ``right`` alone. Arithmetic is fp32,
whatever the tensor is stored in. Source: Arditi et al. 2024, section 2.4.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .changes import WHOLE, Change, Meter, block_ranges, ratio

NEGLIGIBLE_GAIN = 1e-3
"""Gains below this share of their median make the conjugate form divide by almost nothing."""


@dataclass(frozen=True)
class Projection:
    """How the subspace leaves one tensor."""

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "d k"]
    strength: float
    form: str
    """``orthogonal``; behind a norm's gain ``conjugate``, or ``folded`` where a gain is too near zero to invert."""
    norm_preserving: bool = False


@dataclass(frozen=True)
class ColumnSums:
    """Sums over d_model for each column; partial sums over blocks of rows add up."""

    along_right: Float[Tensor, "k n"]
    along_left: Float[Tensor, "k n"] | None = None
    """Summed where norms are preserved, as is the next."""
    squared_norm: Float[Tensor, " n"] | None = None

    def __add__(self, other: "ColumnSums") -> "ColumnSums":
        along_right = self.along_right + other.along_right
        if self.along_left is None or self.squared_norm is None:
            return ColumnSums(along_right)
        assert other.along_left is not None and other.squared_norm is not None
        return ColumnSums(along_right, self.along_left + other.along_left, self.squared_norm + other.squared_norm)


def make_projection(
    basis: Float[Tensor, "d k"],
    strength: float,
    gain: Float[Tensor, " d"] | None = None,
    *,
    norm_preserving: bool = False,
) -> Projection:
    """Choose the form of the edit for one writer.

    Without a gain the write itself must lose the subspace: ``W - s R (R^T W)``. With a norm of gain g
    between matrix and stream, what reaches the stream is ``g * W x / rms``; the conjugate form
    ``W - s D^-1 R (R^T D W)``, D = diag(g), makes it orthogonal to R and equals ablating the stream up
    to the norm's scalar. Where some gain is near zero, the orthogonal form on ``D R`` does the same.

    Args:
        basis: Orthonormal columns, in the residual stream.
        strength: 1 removes the subspace; values between 0 and 1 remove that share of it.
        gain: The norm's gain (offset included), or None.
    """
    if gain is None:
        return Projection(basis, basis, strength, "orthogonal", norm_preserving)
    folded = gain[:, None] * basis
    if gain.abs().min() >= NEGLIGIBLE_GAIN * gain.abs().median():
        return Projection(basis / gain[:, None], folded, strength, "conjugate", norm_preserving)
    folded = torch.linalg.qr(folded.double()).Q.float()
    return Projection(folded, folded, strength, "folded", norm_preserving)


def column_sums(projection: Projection, block: Float[Tensor, "rows n"], rows: slice) -> ColumnSums:
    """What a block of rows of W adds to the sums over all of d_model."""
    along_right = projection.right[rows].T @ block
    if not projection.norm_preserving:
        return ColumnSums(along_right)
    return ColumnSums(along_right, projection.left[rows].T @ block, block.square().sum(0))


def orthogonalize_rows(
    projection: Projection, block: Float[Tensor, "rows n"], rows: slice, sums: ColumnSums, out: Tensor | None = None
) -> Float[Tensor, "rows n"]:
    """Edit a block of rows of W, given the sums over *all* rows, into ``out`` if it is given.

    Norm preservation keeps the norm of each column (one per input neuron, or per token), the axis
    that commutes with the projection; scaling along the other axis would put the direction back.
    """
    s, removed = projection.strength, sums.along_right
    edited = torch.addmm(block, projection.left[rows], removed, alpha=-s, out=out)
    if not projection.norm_preserving:
        return edited
    assert sums.along_left is not None and sums.squared_norm is not None
    gram = projection.left.T @ projection.left
    remaining = (
        sums.squared_norm - 2 * s * (removed * sums.along_left).sum(0) + s**2 * (removed * (gram @ removed)).sum(0)
    )
    # A column that lies wholly in the subspace has nothing left to scale up.
    scalable = remaining > 1e-6 * sums.squared_norm
    return edited.mul_(torch.where(scalable, (sums.squared_norm / remaining.clamp_min(1e-30)).sqrt(), 1.0))


def orthogonalize(weight: Float[Tensor, "d n"], projection: Projection) -> Float[Tensor, "d n"]:
    """Edit a whole matrix whose columns are writes. fp32 in, fp32 out."""
    everything = slice(None)
    return orthogonalize_rows(projection, weight, everything, column_sums(projection, weight, everything))


class BlockwiseEdit:
    """The edit of one matrix as a stream of blocks of its rows; ``change()`` says what happened.

    A matrix whose rows are writes (``axis`` -1: embeddings, Conv1D) needs one pass. One whose columns
    are writes (``axis`` -2: nn.Linear) needs two: the first sums each column over d_model. Memory is a
    few blocks, never the tensor.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        axis: int,
        read: Callable[[int, int], Tensor],
        projection: Projection,
        seen_by_stream: Float[Tensor, "d k"],
        gain: Float[Tensor, " d"] | None = None,
        rows_per_block: int = WHOLE,
    ):
        """``read(start, stop)`` returns rows start:stop in stored dtype; ``seen_by_stream`` is ``D R``."""
        self.name, self.axis, self.read, self.projection = name, axis, read, projection
        self.seen_by_stream, self.gain = seen_by_stream, gain
        self.ranges = block_ranges(rows, rows_per_block)
        self._meter = Meter(name)
        self._written = self._before = self._after = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        return self._rows_are_writes() if self.axis == -1 else self._columns_are_writes()

    def _rows_are_writes(self) -> Iterator[Tensor]:
        everything = slice(None)
        for rows in self.ranges:
            stored = self.read(rows.start, rows.stop)
            block = self._meter.widen(stored).T
            sums = column_sums(self.projection, block, everything)
            self._before += _squared(self._seen(block, everything, sums))
            self._count_written(block, everything)
            room = self._meter.room(stored).T
            edited = orthogonalize_rows(self.projection, block, everything, sums, room)
            finished, rounded = self._meter.finish(edited.T, stored.dtype)
            self._after += _squared(self.seen_by_stream.T @ rounded.T)
            self._meter.compare(block.T, rounded)
            yield finished

    def _columns_are_writes(self) -> Iterator[Tensor]:
        sums, before, after = None, torch.zeros(()), torch.zeros(())
        for rows in self.ranges:
            block = self._meter.widen(self.read(rows.start, rows.stop))
            partial = column_sums(self.projection, block, rows)
            sums = partial if sums is None else sums + partial
            before = before + self._seen(block, rows, partial)
            self._count_written(block, rows)
        assert sums is not None
        for rows in self.ranges:
            stored = self.read(rows.start, rows.stop)
            block = self._meter.widen(stored, counted=True)
            edited = orthogonalize_rows(self.projection, block, rows, sums, self._meter.room(stored))
            finished, rounded = self._meter.finish(edited, stored.dtype)
            after = after + self.seen_by_stream[rows].T @ rounded
            self._meter.compare(block, rounded)
            yield finished
        self._before, self._after = _squared(before), _squared(after)

    def _seen(self, block: Tensor, rows: slice, sums: ColumnSums) -> Tensor:
        # Except in the folded form, the sums hold what the stream sees already.
        if self.projection.form != "folded":
            return sums.along_right
        return self.seen_by_stream[rows].T @ block

    def _count_written(self, block: Tensor, rows: slice) -> None:
        if self.gain is not None:
            self._written += _squared(self.gain[rows, None] * block)

    def change(self) -> Change:
        """What the edit did; valid once every block was taken."""
        written = self._meter.weight if self.gain is None else self._written
        return self._meter.change(
            self.projection.form,
            self.projection.strength,
            written=ratio(self._before, written),
            residual=ratio(self._after, self._before),
        )


def _squared(values: Tensor) -> float:
    return float(values.square().sum())
