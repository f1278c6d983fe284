"""A trained adapter as an edit: what it does to each stored tensor, where that is more than one low-rank sum.

An adapter that is low-rank sums alone is a ``LowRankUpdate``; this file has the rest: experts that one tensor holds
together, DoRA, and tensors or rows that were trained whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..architectures import architecture_of
from ..errors import RequestError
from ..wiring.row import spelled
from .base import Plan
from .low_rank import Addend, Factors, Update, updated_tensors
from .subspace_removal import check_learned_on, new_unembedding, ties_embeddings


@dataclass(frozen=True)
class Rescaled:
    """DoRA on a matrix [out, in]: the sum W + left right, with each row scaled to a learned norm.

    Source: DoRA (Liu et al. 2024, equation 5); rows here are the paper's columns, because nn.Linear stores [out, in].
    """

    form: ClassVar[str] = "rescaled_low_rank"
    matrices: ClassVar[int] = 1
    factors: Factors
    magnitude: Float[Tensor, " rows"]

    @property
    def height(self) -> int:
        return self.factors.height

    @property
    def width(self) -> int:
        return self.factors.width

    def addend(self, matrix: int) -> Addend:
        return self

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        summed = self.factors.add_to(block, rows, room)
        norms = torch.linalg.vector_norm(summed, dim=1)
        return summed.mul_((self.magnitude[rows] / norms)[:, None])


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained whole: a bias [n], a matrix, or experts [E, a, b], in any floating-point type."""

    form: ClassVar[str] = "replaced"
    values: Tensor

    @property
    def matrices(self) -> int:
        return len(self.values) if self.values.dim() == 3 else 1

    @property
    def height(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        return int(self.values.shape[-1])

    def addend(self, matrix: int) -> Addend:
        if self.values.dim() == 3:
            return Replaced(self.values[matrix])
        return self if self.values.dim() == 2 else Replaced(self.values[None])

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        return (torch.empty_like(block) if room is None else room).copy_(self.values[rows])


@dataclass(frozen=True)
class ReplacedRows:
    """Rows of an embedding that were trained, with new values for them."""

    form: ClassVar[str] = "replaced_rows"
    matrices: ClassVar[int] = 1
    indices: Int64[Tensor, " n"]
    values: Float[Tensor, "n columns"]
    height: int
    """Rows of the embedding."""

    @property
    def width(self) -> int:
        return int(self.values.shape[1])

    def addend(self, matrix: int) -> Addend:
        return self

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        edited = (torch.empty_like(block) if room is None else room).copy_(block)
        inside = (self.indices >= rows.start) & (self.indices < rows.stop)
        edited[self.indices[inside] - rows.start] = self.values[inside].to(edited.dtype)
        return edited


@dataclass(frozen=True)
class InTurn:
    """Two updates of one tensor, one after the other."""

    first: Update
    second: Update

    @property
    def matrices(self) -> int:
        return self.first.matrices if self.first.matrices == self.second.matrices else -1

    def addend(self, matrix: int) -> Addend:
        return _AddendsInTurn(self.first.addend(matrix), self.second.addend(matrix))


@dataclass(frozen=True)
class _AddendsInTurn:
    form: ClassVar[str] = "several"
    first: Addend
    second: Addend

    @property
    def height(self) -> int:
        return self.second.height if self.first.height == self.second.height else -1

    @property
    def width(self) -> int:
        return self.second.width if self.first.width == self.second.width else -1

    def add_to(self, block: Tensor, rows: slice, room: Tensor | None) -> Tensor:
        return self.second.add_to(self.first.add_to(block, rows, None), rows, room)


@dataclass(frozen=True)
class AdapterMerge:
    """An adapter that does more than low-rank sums on matrices: one update for each changed tensor."""

    method: ClassVar[str] = "adapter"
    updates: Mapping[str, Update]
    """By the parameter's name in memory; a checkpoint may spell it without a prefix."""
    model_type: str
    width: int
    layers: int
    unties: bool = False
    """Whether the adapter changes the embedding alone, in a model whose unembedding was the same tensor."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def plan(self, config: dict[str, Any], names: Sequence[str]) -> Plan:
        """Find each tensor in a checkpoint, before reading any.

        Raises:
            RequestError: The adapter is of another kind of model, or a tensor is missing.
        """
        check_learned_on(config, self.model_type, self.width, self.layers)
        row, present = architecture_of(config), set(names)
        tensors = [
            tensor for name, update in self.updates.items() for tensor in updated_tensors(row, name, update, present)
        ]
        if not tensors:
            raise RequestError("the adapter changes no tensor; train it first")
        unties = self.unties and ties_embeddings(config)
        # A checkpoint may store the unembedding although it is tied; then nothing is added.
        untied = new_unembedding(row, names) if unties and spelled(row, row.unembedding, present) is None else None
        return Plan(tensors, untied, ties_embeddings(config), unties)
