"""What every edit has in common: a plan, a stream of edited blocks for each tensor, and a check at the end.

An edit is data (``WeightEdit``). ``plan`` declares the tensors that it changes before any weight is read; each
``TensorEdit`` of the plan streams edited blocks; ``check_changes`` compares what changed with what was declared.

Example:
    >>> changes = edit_model(edit, model, model.config.to_dict())
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import EditError, RequestError
from .changes import WHOLE, Change

TensorReader = Callable[[str], Tensor]
"""Reads a whole small tensor by name."""
RowReader = Callable[[int, int], Tensor]
"""Reads rows ``start:stop`` of a matrix, in stored dtype."""


@runtime_checkable
class BlockStream(Protocol):
    """Edited blocks of rows of one matrix, in order; call ``change()`` only after the last block."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def change(self) -> Change: ...


@runtime_checkable
class TensorEdit(Protocol):
    """The edit of one declared tensor. Fused experts [E, a, b] are E matrices; a bias is a matrix of one row."""

    @property
    def name(self) -> str: ...

    def stream(
        self, matrix: int, rows: int, read: RowReader, other: TensorReader, rows_per_block: int = WHOLE
    ) -> BlockStream: ...


@runtime_checkable
class Shrinking(Protocol):
    """A tensor edit whose zeroed rows or columns a checkpoint may leave out; a model in memory keeps its shapes."""

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]: ...

    def stored_block(self, first_row: int, rows: int, block: Tensor) -> Tensor:
        """The part of an edited block that is stored; the whole matrix has ``rows`` rows."""
        ...


@runtime_checkable
class Shaped(Protocol):
    """A tensor edit that fits some shapes only, which can be checked before a weight is read."""

    def check_shape(self, shape: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What an edit will do to one checkpoint, decided from the config and tensor names alone."""

    tensors: Sequence[TensorEdit]
    untied: str | None
    """Name of the unembedding tensor that the edit adds, holding the old tied embedding."""
    tied: bool
    """Whether the unembedding is the embedding, so that editing one edits both."""
    unties: bool = False
    """Whether the new checkpoint's config must say that unembedding and embedding differ."""
    stored_apart: bool = False
    """Whether the base's config ties unembedding and embedding, while it stores two that differ."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys to change in the checkpoint's ``config.json``."""

    @property
    def declared(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)


@runtime_checkable
class WeightEdit(Protocol):
    """An edit as data: learned once, saved, and applied to any copy of its base model."""

    method: ClassVar[str]

    @property
    def provenance(self) -> dict[str, Any]: ...

    def plan(self, config: dict[str, Any], names: Sequence[str]) -> Plan: ...


def merge_changes(name: str, parts: list[Change]) -> Change:
    """One record for a tensor that was edited as several matrices (fused experts): the largest value of each figure."""
    return Change(
        name,
        parts[0].form,
        parts[0].strength,
        relative_change=max(part.relative_change for part in parts),
        largest_change=max(part.largest_change for part in parts),
        written=_worst(part.written for part in parts),
        residual=_worst(part.residual for part in parts),
        changed=any(part.changed for part in parts),
    )


def _worst(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def check_changes(plan: Plan, changes: list[Change]) -> None:
    """Check that an applied edit treated exactly the tensors that it declared, and changed at least one.

    Raises:
        EditError: Nothing changed, or other tensors were treated than those declared.
    """
    if {change.name for change in changes} != set(plan.declared):
        missing = sorted(set(plan.declared) ^ {change.name for change in changes})
        raise EditError(f"the edit treated other tensors than it declared: {', '.join(missing[:3])}; report this bug")
    if not any(change.changed for change in changes):
        raise EditError(
            f"the edit changed none of its {len(changes)} tensors: each change rounds to zero in the stored precision; "
            "choose another direction, a larger strength or more training"
        )


@torch.no_grad()
def edit_model(edit: WeightEdit, model: nn.Module, config: dict[str, Any]) -> list[Change]:
    """Apply the edit in place to a model in memory, through the same arithmetic as the streaming export.

    Args:
        edit: Any edit that ``excise.load_edit`` returns or a recipe learned.
        model: A causal language model with the parameter names of transformers.
        config: The content of the model's ``config.json``, such as ``model.config.to_dict()``.

    Returns:
        One record for each changed tensor, with relative sizes.

    Raises:
        RequestError: The edit was learned on another kind of model, or has ``embeddings=untie``: a tied module stays
            tied.
        EditError: The edit changed nothing, or a weight is NaN or infinite.
    """
    parameters = dict(model.named_parameters())
    plan = edit.plan(config, list(parameters))
    if plan.untied:
        raise RequestError(
            "embeddings=untie adds a tensor, which a model in memory has no place for; apply the edit to a checkpoint "
            "folder"
        )
    changes = []
    # ``other`` reads the model as far as it is edited, so a plan lists an edit that needs an unedited tensor before the
    # edit of that tensor.
    for tensor in plan.tensors:
        parts = []
        for index, matrix in enumerate(as_matrices(parameters[tensor.name].detach())):
            source = matrix.cpu().clone()
            stream = tensor.stream(index, len(source), _rows_of(source), lambda name: parameters[name].detach().cpu())
            matrix.copy_(torch.cat(list(stream)))
            parts.append(stream.change())
        changes.append(merge_changes(tensor.name, parts))
    check_changes(plan, changes)
    return changes


def _rows_of(matrix: Tensor) -> RowReader:
    return lambda start, stop: matrix[start:stop]


def as_matrices(tensor: Tensor) -> list[Tensor]:
    """Views of a tensor as matrices: a bias is one row, fused experts [E, a, b] are E matrices."""
    if tensor.dim() == 1:
        return [tensor[None]]
    return [tensor] if tensor.dim() == 2 else list(tensor)
