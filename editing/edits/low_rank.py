"""Low-rank updates as data: ``W <- W + left right`` for named tensors.

Source: LoRA (Hu et al. 2021, equation 3).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..architectures import architecture_of
from ..errors import RequestError
from ..wiring.row import spelled
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


@dataclass(frozen=True)
class Factors:
    """Low-rank addend of one stored matrix, scale included, in its stored layout."""

    form: ClassVar[str] = "low_rank"
    left: Float[Tensor, "rows r"]
    right: Float[Tensor, "r columns"]

    @property
    def height(self) -> int:
        return len(self.left)

    @property
    def width(self) -> int:
        return self.right.shape[1]

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        # addmm adds the product without storing it beside the block.
        return torch.addmm(block, self.left[rows], self.right, out=room)


@dataclass(frozen=True)
class LowRankUpdate:
    """A merged adapter: the addend of each changed tensor."""

    method: ClassVar[str] = "low_rank"
    factors: dict[str, Factors]
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


def plan_addition(edit: Addition, addends: Mapping[str, Addend], config: dict[str, Any], names: Sequence[str]) -> Plan:
    """Find the checkpoint's tensor for each addend.

    Raises:
        RequestError: The edit was learned on another kind of model, a tensor is missing, or there is no addend.
    """
    check_learned_on(config, edit.model_type, edit.width, edit.layers)
    row, present = architecture_of(config), set(names)
    tensors = []
    for name, addend in addends.items():
        stored_name = spelled(row, name, present)
        if stored_name is None:
            raise RequestError(f"the base has no tensor {name}; apply the edit to the model it was learned on")
        tensors.append(UpdatedTensor(stored_name, addend))
    if not tensors:
        raise RequestError("the edit holds no update for any tensor; train it first")
    return Plan(tensors, None, ties_embeddings(config))


@dataclass(frozen=True)
class UpdatedTensor:
    """One declared tensor and its addend."""

    name: str
    addend: Addend

    def stream(
        self, matrix: int, rows: int, read: RowReader, other: TensorReader, rows_per_block: int = WHOLE
    ) -> "BlockwiseUpdate":
        """The update as a stream of blocks of rows."""
        self._check_rows(rows)
        return BlockwiseUpdate(self, rows, read, rows_per_block)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Check that the update has a stored tensor's shape.

        Raises:
            RequestError: It has another one.
        """
        rows, columns = ((1, *shape) if len(shape) == 1 else shape)[-2:]
        self._check_rows(rows)
        self.check_columns(columns)

    def _check_rows(self, rows: int) -> None:
        if rows != self.addend.height:
            raise RequestError(
                f"{self.name} has {rows} rows, but the update has {self.addend.height}; apply it to the model it was "
                "learned on"
            )

    def check_columns(self, columns: int) -> None:
        """Check the width of a stored block.

        Raises:
            RequestError: The update has another width.
        """
        if columns != self.addend.width:
            raise RequestError(
                f"{self.name} has {columns} columns, but the update has {self.addend.width}; apply it to the model it "
                "was learned on"
            )


class BlockwiseUpdate:
    """The sum, block by block; computed in fp32 for every stored dtype."""

    def __init__(self, tensor: UpdatedTensor, rows: int, read: RowReader, rows_per_block: int):
        self.tensor, self.addend, self.read = tensor, tensor.addend, read
        self.ranges = block_ranges(rows, rows_per_block)
        self._meter = Meter(tensor.name)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.ranges:
            stored = self.read(rows.start, rows.stop)
            self.tensor.check_columns(stored.shape[-1])
            block = self._meter.widen(stored)
            edited = self.addend.add_to(block, rows, self._meter.room(stored))
            finished, rounded = self._meter.finish(edited, stored.dtype)
            self._meter.compare(block, rounded)
            yield finished

    def change(self) -> Change:
        """What the update did; valid once every block was taken."""
        return self._meter.change(self.addend.form, 1.0)
