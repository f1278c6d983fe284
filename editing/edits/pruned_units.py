"""Pruned units as data: which neurons and heads of a model are removed, and how.

A unit is an MLP neuron (after its activation) or an attention head: one or several inputs of its sublayer's last
matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..architectures import architecture_of
from ..errors import RequestError, UnsupportedArchitecture
from ..wiring.row import Architecture, Site, classify, spelled
from .base import Plan, RowReader, TensorReader
from .changes import WHOLE, Change, Meter, block_ranges
from .subspace_removal import check_learned_on, ties_embeddings

Semantics = Literal["down", "all", "frozen", "mean", "remove"]
"""How units are pruned:
- ``down``: the weights that a unit writes through are 0. They still get gradients, so training can bring the unit back.
- ``all``: the weights that a neuron reads through are 0 too, so all its gradients are 0.
- ``frozen``: as ``down``, and ``keep_pruned`` masks the gradients.
- ``mean``: as ``down``, and the unit's mean write is added to the bias of the matrix.
- ``remove``: as ``all``, and a checkpoint stores smaller tensors. Every layer must lose the same number of neurons.
"""
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")
"""Config keys for the number of MLP neurons per layer, depending on the architecture."""


@dataclass(frozen=True)
class PrunedUnits:
    """The edit: indices of pruned neurons and heads, by layer."""

    method: ClassVar[str] = "prune"
    neurons: dict[int, tuple[int, ...]]
    heads: dict[int, tuple[int, ...]]
    semantics: Semantics
    model_type: str
    width: int
    layers: int
    head_width: int
    means: dict[int, Float[Tensor, " units"]] = field(default_factory=dict)
    """Mean activation of each pruned neuron, by layer; only for ``semantics=mean``."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def plan(self, config: dict[str, Any], names: Sequence[str]) -> Plan:
        """Find each tensor in a checkpoint, before reading any.

        Raises:
            RequestError: The units belong to another model, or the semantics do not work for this model.
            UnsupportedArchitecture: Neurons are to be pruned, but the experts are fused into one tensor.
        """
        check_learned_on(config, self.model_type, self.width, self.layers)
        row = architecture_of(config)
        if row.mlp_units is None and self.neurons:
            raise UnsupportedArchitecture(
                f"{self.model_type} has no neurons to prune: {no_units('neurons')}; "
                "set share=0 and prune heads with heads_share"
            )
        if row.attention_units is None and self.heads:
            raise UnsupportedArchitecture(
                f"{self.model_type} has no heads to prune: {no_units('heads')}; set heads_share=0"
            )
        changes = self._narrower(config) if self.semantics == "remove" else {}
        tensors = [tensor for site in classify(row, names, self.layers) for tensor in self._written(site, row, names)]
        if self.semantics in ("all", "remove"):
            tensors += self._read(row, names)
        if not tensors:
            raise RequestError("the edit prunes no unit; raise share or heads_share")
        # Biases come first: they need the matrix before its columns are zeroed.
        tensors.sort(key=lambda tensor: not isinstance(tensor, ShiftedBias))
        return Plan(tensors, None, ties_embeddings(config), config=changes)

    def _narrower(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config key, with its new value, of a model with fewer neurons."""
        counts = {len(self.neurons.get(layer, ())) for layer in range(self.layers)}
        if self.heads or len(counts) != 1:
            raise RequestError(
                "semantics=remove must take the same number of neurons from every layer, and no heads, because a "
                f"config has one width for all layers; got {min(counts)} to {max(counts)} neurons per layer; "
                "use semantics=all"
            )
        key = next((key for key in WIDTHS if key in config), None)
        if key is None or not isinstance(config[key] or 4 * self.width, int):
            raise RequestError(
                f"the config of {self.model_type} has no single width ({', '.join(WIDTHS)}) to make smaller; use "
                "semantics=all"
            )
        # GPT-2 configs leave n_inner at None, which means four times the width of the stream.
        return {key: (config[key] or 4 * self.width) - counts.pop()}

    def _written(self, site: Site, row: Architecture, names: Sequence[str]) -> Iterator["ZeroedTensor | ShiftedBias"]:
        """Edits of the matrices that pruned units write through."""
        if site.layer is None or not site.name.endswith("weight"):
            if self.semantics == "mean" and site.layer in self.neurons and site.writer.kind == "mlp":
                yield ShiftedBias(
                    site.name,
                    site.name.removesuffix("bias") + "weight",
                    self.neurons[site.layer],
                    self.means[site.layer],
                )
            return
        units = self.neurons.get(site.layer, ()) if site.writer.kind == "mlp" else self._columns(site.layer)
        if units:
            # Units lie along the axis that does not hold d_model.
            yield ZeroedTensor(
                site.name, units, -1 if site.writer.axis == -2 else -2, removed=self.semantics == "remove"
            )
            if self.semantics == "mean" and site.name.removesuffix("weight") + "bias" not in names:
                raise RequestError(
                    f"{site.name} has no bias to which the mean of the pruned units could be added; use semantics=down"
                )

    def _columns(self, layer: int) -> tuple[int, ...]:
        # A head's output is a run of consecutive inputs of the matrix that writes it.
        return tuple(
            head * self.head_width + place for head in self.heads.get(layer, ()) for place in range(self.head_width)
        )

    def _read(self, row: Architecture, names: Sequence[str]) -> list["ZeroedTensor"]:
        """Edits of the matrices that compute the pruned neurons."""
        # Conv1D stores [in, out]. If the writing matrix of the MLP does, so do the matrices that read for it.
        transposed = any(w.axis == -1 for w in row.writers if w.kind == "mlp" and w.pattern.endswith("weight"))
        tensors = []
        for layer, units in self.neurons.items():
            for module in row.mlp_inputs:
                for part in ("weight", "bias"):
                    if name := spelled(row, f"{row.layers}.{layer}.{module}.{part}", names):
                        axis = -1 if part == "bias" or transposed else -2
                        tensors.append(
                            ZeroedTensor(
                                name,
                                units,
                                axis,
                                fused=module.endswith("gate_up_proj"),
                                removed=self.semantics == "remove",
                            )
                        )
        return tensors


@dataclass(frozen=True)
class ZeroedTensor:
    """One declared tensor whose rows or columns of the pruned units are set to zero."""

    name: str
    units: tuple[int, ...]
    axis: int
    """-2: units are rows; -1: columns."""
    fused: bool = False
    """Whether the tensor holds two projections of the units, one after the other (gate_up_proj)."""
    removed: bool = False
    """Whether a checkpoint stores the tensor without these rows or columns."""

    def stream(
        self, matrix: int, rows: int, read: RowReader, other: TensorReader, rows_per_block: int = WHOLE
    ) -> "BlockwiseZeros":
        """The tensor as a stream of blocks of rows."""
        return BlockwiseZeros(self, rows, read, rows_per_block)

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape in the new checkpoint."""
        changed = list(shape)
        axis = max(self.axis, -len(changed))
        changed[axis] -= len(self.places(changed[axis])) if self.removed else 0
        return tuple(changed)

    def stored_block(self, first_row: int, rows: int, block: Tensor) -> Tensor:
        """A block of the edited matrix without the removed units; the whole matrix has ``rows`` rows."""
        if not self.removed:
            return block
        if self.axis == -1:
            return block[:, _others(self.places(block.shape[-1]), 0, block.shape[-1])].contiguous()
        return block[_others(self.places(rows), first_row, len(block))]

    def check_shape(self, shape: Sequence[int]) -> None:
        """Check that a stored tensor has all the units.

        Raises:
            RequestError: A unit lies outside the tensor.
        """
        self.places(shape[max(self.axis, -len(shape))])

    def places(self, size: int) -> list[int]:
        """Indices of the units' rows or columns in an axis of this size.

        Raises:
            RequestError: A unit lies outside the tensor.
        """
        units = list(self.units)
        indices = [*units, *(unit + size // 2 for unit in units)] if self.fused else units
        # A negative index would be read from the end, and remove a unit that nobody named.
        if wrong := [unit for unit in indices if not 0 <= unit < size]:
            raise RequestError(
                f"{self.name} has {size} units, the edit names unit {wrong[-1]};"
                " apply it to the model it was learned on"
            )
        return indices


class BlockwiseZeros:
    """Sets rows or columns to zero, block by block."""

    def __init__(self, tensor: ZeroedTensor, rows: int, read: RowReader, rows_per_block: int):
        self.tensor, self.rows, self.read = tensor, rows, read
        self.ranges = block_ranges(rows, rows_per_block)
        self._meter = Meter(tensor.name)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.ranges:
            stored = self.read(rows.start, rows.stop)
            block = self._meter.widen(stored)
            edited = self._meter.room(stored).copy_(block)
            if self.tensor.axis == -1:
                edited[:, self.tensor.places(stored.shape[-1])] = 0
            else:
                inside = [unit - rows.start for unit in self.tensor.places(self.rows) if rows.start <= unit < rows.stop]
                edited[inside] = 0
            finished, rounded = self._meter.finish(edited, stored.dtype)
            self._meter.compare(block, rounded)
            yield finished

    def change(self) -> Change:
        """Record of the pruning; valid after the last block."""
        return self._meter.change("pruned", 1.0)


@dataclass(frozen=True)
class ShiftedBias:
    """The bias to which the mean write of pruned neurons is added."""

    name: str
    weight: str
    units: tuple[int, ...]
    means: Float[Tensor, " units"]

    def stream(
        self, matrix: int, rows: int, read: RowReader, other: TensorReader, rows_per_block: int = WHOLE
    ) -> "WholeBias":
        """The bias, in one block."""
        return WholeBias(self, read, other)


class WholeBias:
    """``b + W[:, units] mean``."""

    def __init__(self, tensor: ShiftedBias, read: RowReader, other: TensorReader):
        self.tensor, self.read, self.other = tensor, read, other
        self._meter = Meter(tensor.name)

    def __iter__(self) -> Iterator[Tensor]:
        stored = self.read(0, 1)
        block = self._meter.widen(stored)
        weight = self.other(self.tensor.weight).float()
        # A weight next to its bias: [d, units] for nn.Linear, [units, d] for Conv1D.
        self._check_units(weight.shape[1] if len(weight) == stored.shape[-1] else len(weight))
        columns = (
            weight[:, list(self.tensor.units)] if len(weight) == stored.shape[-1] else weight[list(self.tensor.units)].T
        )
        edited = torch.add(block, columns @ self.tensor.means, out=self._meter.room(stored))
        finished, rounded = self._meter.finish(edited, stored.dtype)
        self._meter.compare(block, rounded)
        yield finished

    def _check_units(self, count: int) -> None:
        units, means = self.tensor.units, len(self.tensor.means)
        if len(units) != means or not all(0 <= unit < count for unit in units):
            raise RequestError(
                f"{self.tensor.weight} has {count} units, the edit names {len(units)} of them and {means} means; apply "
                "it to the model it was learned on"
            )

    def change(self) -> Change:
        """Record of the addition; valid after the block."""
        return self._meter.change("mean", 1.0)


def _others(places: Sequence[int], first: int, count: int) -> list[int]:
    """Of ``count`` places from ``first`` on, those that are not in ``places``, counted from ``first``."""
    removed = set(places)
    return [place for place in range(count) if place + first not in removed]


def keep_pruned(model: nn.Module, edit: PrunedUnits, config: dict[str, Any]) -> list[torch.utils.hooks.RemovableHandle]:
    """Mask the gradients of pruned weights, so that training cannot bring them back (``semantics=frozen``).

    Returns:
        Hook handles; call ``remove()`` on each to allow training of the pruned weights again.
    """
    parameters = dict(model.named_parameters())
    handles = []
    for tensor in edit.plan(config, list(parameters)).tensors:
        # Masked gradients are enough: the weights are 0, and weight decay leaves 0 where it is.
        if isinstance(tensor, ZeroedTensor):
            parameter = parameters[tensor.name]
            mask = torch.ones_like(parameter)
            pruned = torch.tensor(tensor.units, device=parameter.device)
            mask.index_fill_(parameter.dim() + max(tensor.axis, -parameter.dim()), pruned, 0.0)
            # The default binds this tensor's mask; a closure would see the last one of the loop.
            handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
    return handles


def no_units(kind: str) -> str:
    """Why a model has no units of a kind that can be pruned one by one."""
    if kind == "neurons":
        return "its experts are fused into one tensor, or its layers keep neurons in different modules"
    return "not every layer has attention of the same kind"
