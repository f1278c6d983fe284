"""Low-rank updates as data: ``W <- W + left right`` for named tensors, one pair an expert where experts are fused.

Source: LoRA (Hu et al. 2021, equation 3).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..architectures import architecture_of
from ..errors import RequestError
from ..wiring.experts import StoredPiece, stored_pieces
from ..wiring.row import Architecture, spelled
from .base import Plan, RowReader, TensorReader
from .changes import WHOLE, Change, Meter, block_ranges
from .subspace_removal import check_learned_on, ties_embeddings


@runtime_checkable
class Addend(Protocol):
    """Something to add to one stored matrix, in its stored layout."""

    form: ClassVar[str]

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        """Add these rows to a block of the matrix, in fp32; the result goes into ``room`` if it is not None."""
        ...


@runtime_checkable
class Update(Protocol):
    """What an edit does to one parameter: one addend for each of its matrices."""

    @property
    def matrices(self) -> int: ...

    def addend(self, matrix: int) -> Addend: ...


@runtime_checkable
class Divisible(Update, Protocol):
    """An update of fused experts, which a checkpoint may store in pieces."""

    def piece(self, piece: StoredPiece) -> Update:
        """The update of one stored piece, in its layout."""
        ...


@dataclass(frozen=True)
class Factors:
    """Low-rank addend of one stored matrix, scale included, in its stored layout."""

    form: ClassVar[str] = "low_rank"
    matrices: ClassVar[int] = 1
    left: Float[Tensor, "rows r"]
    right: Float[Tensor, "r columns"]

    @property
    def height(self) -> int:
        return len(self.left)

    @property
    def width(self) -> int:
        return self.right.shape[1]

    def addend(self, matrix: int) -> Addend:
        return self

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        # addmm adds the product without storing it beside the block.
        return torch.addmm(block, self.left[rows], self.right, out=room)


@dataclass(frozen=True)
class ExpertFactors:
    """A low-rank addend for each expert of a fused tensor, scale included, in the layout of the parameter."""

    left: Float[Tensor, "experts rows r"]
    right: Float[Tensor, "experts r columns"]

    @property
    def matrices(self) -> int:
        return len(self.left)

    def addend(self, matrix: int) -> Addend:
        return Factors(self.left[matrix], self.right[matrix])

    def piece(self, piece: StoredPiece) -> Update:
        # A stored piece is some rows or some columns of each matrix; the other factor goes with all of them.
        left, right = (part if piece.expert is None else part[piece.expert] for part in (self.left, self.right))
        if piece.part.axis == -2:
            left = left[..., piece.part.places(left.shape[-2]), :]
        else:
            right = right[..., piece.part.places(right.shape[-1])]
        if piece.part.transposed:
            left, right = right.mT, left.mT
        return ExpertFactors(left, right) if piece.expert is None else Factors(left, right)


def expert_factors(
    down: Float[Tensor, "er inputs"], up: Float[Tensor, "outputs er"], experts: int, *, inputs_first: bool
) -> ExpertFactors:
    """The addends of fused experts from the two matrices in which peft keeps those of all experts.

    Args:
        down: lora_A, expert after expert.
        up: lora_B, scale included; experts take turns column by column.
        experts: Number of experts.
        inputs_first: Whether the parameter is [experts, in, out], as its model's code says (``is_transposed``).
    """
    inward = down.reshape(experts, -1, down.shape[-1])
    outward = up.reshape(len(up), -1, experts).permute(2, 0, 1)
    left, right = (inward.mT, outward.mT) if inputs_first else (outward, inward)
    return ExpertFactors(left.contiguous(), right.contiguous())


@dataclass(frozen=True)
class LowRankUpdate:
    """A merged adapter: the addend of each changed tensor."""

    method: ClassVar[str] = "low_rank"
    factors: Mapping[str, Factors | ExpertFactors]
    """By the parameter's name in memory; a checkpoint may spell it without a prefix."""
    model_type: str
    width: int
    layers: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def plan(self, config: dict[str, Any], names: Sequence[str]) -> Plan:
        """Find each tensor in a checkpoint, before reading any.

        Raises:
            RequestError: The update was learned on another kind of model, or a tensor is missing.
        """
        return plan_addition(self, self.factors, config, names)


@runtime_checkable
class Addition(Protocol):
    """An edit that adds to weights, and the kind of model it was learned on."""

    @property
    def model_type(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def layers(self) -> int: ...


def plan_addition(edit: Addition, updates: Mapping[str, Update], config: dict[str, Any], names: Sequence[str]) -> Plan:
    """Find the checkpoint's tensor, or tensors, for each update.

    Raises:
        RequestError: The edit was learned on another kind of model, a tensor is missing, or there is no update.
    """
    check_learned_on(config, edit.model_type, edit.width, edit.layers)
    row, present = architecture_of(config), set(names)
    tensors = [tensor for name, update in updates.items() for tensor in updated_tensors(row, name, update, present)]
    if not tensors:
        raise RequestError("the edit holds no update for any tensor; train it first")
    return Plan(tensors, None, ties_embeddings(config))


def updated_tensors(row: Architecture, name: str, update: Update, names: Collection[str]) -> list["UpdatedTensor"]:
    """The stored tensors that a parameter's update changes; several where experts are fused in memory alone.

    Raises:
        RequestError: The checkpoint has no such tensor, or another number of experts.
    """
    stored_name = spelled(row, name, names)
    if stored_name is not None:
        return [UpdatedTensor(stored_name, update)]
    pieces = stored_pieces(row, name, names) if isinstance(update, Divisible) else []
    if not pieces or not isinstance(update, Divisible):
        raise RequestError(f"the base has no tensor {name}; give the model that the edit was learned on")
    experts = {piece.expert for piece in pieces} - {None}
    if experts and len(experts) != update.matrices:
        raise RequestError(
            f"the base has {len(experts)} experts in {name}, but the update has {update.matrices}; give the model that "
            "the edit was learned on"
        )
    return [UpdatedTensor(piece.name, update.piece(piece)) for piece in pieces]


@dataclass(frozen=True)
class UpdatedTensor:
    """One declared tensor and its update."""

    name: str
    update: Update

    def stream(
        self, matrix: int, rows: int, read: RowReader, other: TensorReader, rows_per_block: int = WHOLE
    ) -> "BlockwiseUpdate":
        """The update as a stream of blocks of rows."""
        addend = self.update.addend(matrix)
        _check(self.name, "rows", rows, addend.height)
        return BlockwiseUpdate(self.name, addend, rows, read, rows_per_block)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Check that the update has a stored tensor's shape.

        Raises:
            RequestError: It has another one.
        """
        *lead, rows, columns = (1, *shape) if len(shape) == 1 else shape
        _check(self.name, "experts" if lead else "matrices", lead[0] if lead else 1, self.update.matrices)
        addend = self.update.addend(0)
        _check(self.name, "rows", rows, addend.height)
        _check(self.name, "columns", columns, addend.width)


def _check(name: str, what: str, count: int, expected: int) -> None:
    """Check a size of a stored tensor.

    Raises:
        RequestError: The update has another one.
    """
    if count != expected:
        raise RequestError(
            f"{name} has {count} {what}, but the update has {expected}; give the model that the edit was learned on"
        )


class BlockwiseUpdate:
    """The sum, block by block; computed in fp32 for every stored dtype."""

    def __init__(self, name: str, addend: Addend, rows: int, read: RowReader, rows_per_block: int):
        self.name, self.addend, self.read = name, addend, read
        self.ranges = block_ranges(rows, rows_per_block)
        self._meter = Meter(name)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.ranges:
            stored = self.read(rows.start, rows.stop)
            _check(self.name, "columns", stored.shape[-1], self.addend.width)
            block = self._meter.widen(stored)
            edited = self.addend.add_to(block, rows, self._meter.room(stored))
            finished, rounded = self._meter.finish(edited, stored.dtype)
            self._meter.compare(block, rounded)
            yield finished

    def change(self) -> Change:
        """What the update did; valid once every block was taken."""
        return self._meter.change(self.addend.form, 1.0)
