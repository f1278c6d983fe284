"""Weight orthogonalization: removing a subspace from what a tensor writes to the residual stream, block by block.

Every form of the edit is ``W <- W - strength * left (right^T W)`` for a tensor whose columns are writes to the residual
stream; the forms differ only in ``left`` and ``right``. Arithmetic is fp32 for every stored dtype.

Example:
    >>> projection = make_projection(basis, strength=1.0)  # basis [d, k], orthonormal columns
    >>> edited = orthogonalize(weight, projection)  # weight [d, n]: basis.T @ edited is 0

Source: Arditi et al. 2024, section 2.4.
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
    """The two factors of the edit of one tensor."""

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "d k"]
    strength: float
    form: str
    """``orthogonal`` without a norm between tensor and stream; else ``conjugate``, or ``folded`` (a gain near 0)."""
    norm_preserving: bool = False


@dataclass(frozen=True)
class ColumnSums:
    """Sums over d_model for each column; the sums of blocks of rows add up to those of the matrix."""

    along_right: Float[Tensor, "k n"]
    along_left: Float[Tensor, "k n"] | None = None
    """None unless norms are preserved, as for ``squared_norm``."""
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
    centred: bool = False,
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
        norm_preserving: Scale each column back to the norm it had.
        centred: The norm takes the mean off first, as LayerNorm does; the orthogonal form is used then, on ``D R``
            without the mean of each column.

    Source:
        Arditi et al. 2024 (weight orthogonalization). The forms for a gain are this package's derivation.
    """
    if gain is None:
        return Projection(basis, basis, strength, "orthogonal", norm_preserving)
    folded = seen_through(basis, gain, centred)
    if not centred and gain.abs().min() >= NEGLIGIBLE_GAIN * gain.abs().median():
        return Projection(basis / gain[:, None], folded, strength, "conjugate", norm_preserving)
    # The columns of D R are not orthonormal, which the orthogonal form needs.
    folded = torch.linalg.qr(folded.double()).Q.float()
    return Projection(folded, folded, strength, "folded", norm_preserving)


def seen_through(basis: Float[Tensor, "d k"], gain: Float[Tensor, " d"], centred: bool) -> Float[Tensor, "d k"]:
    """The directions that a norm turns into ``basis``: ``D R``, without each column's mean if the norm takes it off."""
    folded = gain[:, None] * basis
    return folded - folded.mean(dim=0) if centred else folded


def column_sums(projection: Projection, block: Float[Tensor, "rows n"], rows: slice) -> ColumnSums:
    """The contribution of a block of rows of W to the sums over d_model."""
    along_right = projection.right[rows].T @ block
    if not projection.norm_preserving:
        return ColumnSums(along_right)
    return ColumnSums(along_right, projection.left[rows].T @ block, block.square().sum(0))


def orthogonalize_rows(
    projection: Projection, block: Float[Tensor, "rows n"], rows: slice, sums: ColumnSums, out: Tensor | None = None
) -> Float[Tensor, "rows n"]:
    """Edit a block of rows of W, from the sums over *all* rows; the result goes into ``out`` if it is not None.

    Norm preservation keeps the norm of each column (one for each input neuron or token). Scaling columns commutes
    with the projection; scaling rows would bring the direction back.
    """
    s, removed = projection.strength, sums.along_right
    edited = torch.addmm(block, projection.left[rows], removed, alpha=-s, out=out)
    if not projection.norm_preserving:
        return edited
    assert sums.along_left is not None and sums.squared_norm is not None
    # The squared norm of each edited column, |w - s L r|^2 with r = R^T w, from the sums over all rows: reading the
    # edited rows for it would take another pass. L^T L is not the identity in the conjugate form.
    gram = projection.left.T @ projection.left
    remaining = (
        sums.squared_norm - 2 * s * (removed * sums.along_left).sum(0) + s**2 * (removed * (gram @ removed)).sum(0)
    )
    # A column that lies wholly in the subspace is now 0 and cannot be scaled up to its old norm.
    scalable = remaining > 1e-6 * sums.squared_norm
    return edited.mul_(torch.where(scalable, (sums.squared_norm / remaining.clamp_min(1e-30)).sqrt(), 1.0))


def orthogonalize(weight: Float[Tensor, "d n"], projection: Projection) -> Float[Tensor, "d n"]:
    """Edit a whole fp32 matrix whose columns are writes to the stream; returns a new fp32 matrix."""
    everything = slice(None)
    return orthogonalize_rows(projection, weight, everything, column_sums(projection, weight, everything))


class BlockwiseEdit:
    """The edit of one matrix as a stream of blocks of its rows; ``change()`` returns the record.

    A matrix whose rows are writes (``axis`` -1: embeddings, Conv1D) needs one pass. A matrix whose columns are writes
    (``axis`` -2: nn.Linear) needs two, because each column must first be summed over d_model. Memory holds a few
    blocks, never the whole tensor.
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
        """Prepare the stream; nothing is read yet.

        Args:
            name: The tensor's name, for messages.
            rows: Rows of the matrix.
            axis: Axis of d_model, -1 or -2.
            read: Returns rows start:stop in stored dtype.
            projection: Factors of the edit.
            seen_by_stream: ``D R``: the basis times the gain between matrix and stream.
            gain: That gain; None without a norm in between.
            rows_per_block: Rows read at a time.
        """
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
            # Of the rounded values, because rounding to the stored type brings a little of the component back.
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
        # Each block holds a part of every column, so components are summed over the blocks before they are squared.
        self._before, self._after = _squared(before), _squared(after)

    def _seen(self, block: Tensor, rows: slice, sums: ColumnSums) -> Tensor:
        # In the other two forms right = D R, so the column sums already are the component that the stream sees.
        if self.projection.form != "folded":
            return sums.along_right
        return self.seen_by_stream[rows].T @ block

    def _count_written(self, block: Tensor, rows: slice) -> None:
        if self.gain is not None:
            self._written += _squared(self.gain[rows, None] * block)

    def change(self) -> Change:
        """Record of the edit; valid after the last block."""
        # Without a gain the writes are the weights, whose squares the meter has summed already.
        written = self._meter.weight if self.gain is None else self._written
        return self._meter.change(
            self.projection.form,
            self.projection.strength,
            written=ratio(self._before, written),
            residual=ratio(self._after, self._before),
        )


def _squared(values: Tensor) -> float:
    return float(values.square().sum())
