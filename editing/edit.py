"""An edit as data: which subspace leaves which tensors of a checkpoint, decided before any is read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .architectures import Architecture, Site, architecture_of, classify, gain_name, layer_count, residual_width
from .changes import WHOLE, Change
from .errors import EditError, RequestError
from .orthogonalize import BlockwiseEdit, make_projection

Variant = Literal["plain", "norm_preserving", "projected"]
Embeddings = Literal["edit", "skip", "untie"]
TensorReader = Callable[[str], Tensor]


@dataclass(frozen=True)
class Edit:
    """A subspace of the residual stream and how strongly each layer loses it."""

    basis: Float[Tensor, "d k"]
    """Orthonormal columns, fp32."""
    model_type: str
    layer_strengths: tuple[float, ...]
    """One strength a decoder layer; 0 leaves the layer as it is."""
    embeddings: Embeddings = "edit"
    """``edit`` changes a tied unembedding too; ``untie`` keeps the old one as a tensor of its own."""
    variant: Variant = "plain"
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the subspace came from: source, layer, position, scores of every candidate, data hashes."""

    def __post_init__(self) -> None:
        d, k = self.basis.shape
        if k > d or torch.dist(self.basis.T @ self.basis, torch.eye(k)) > 1e-4:
            raise RequestError(f"the basis [{d}, {k}] is not orthonormal; orthonormalize its columns first")


@dataclass(frozen=True)
class TensorEdit:
    """One declared tensor and the strength of its edit."""

    site: Site
    strength: float
    gain: str | None


@dataclass(frozen=True)
class Plan:
    """What an edit will do to one checkpoint, from names alone."""

    tensors: tuple[TensorEdit, ...]
    untied: str | None
    """Name of the unembedding tensor that the edit adds, holding the old tied embedding."""
    tied: bool
    """Whether the unembedding is the embedding, so that editing one edits both."""

    @property
    def declared(self) -> tuple[str, ...]:
        return tuple(tensor.site.name for tensor in self.tensors)


def plan_edit(edit: Edit, config: dict[str, Any], names: list[str]) -> Plan:
    """Decide which tensors change, before reading any.

    Raises:
        UnsupportedArchitecture: No row for the model, or a tensor no row knows.
        RequestError: The edit was learned on another kind of model.
    """
    row = architecture_of(config)
    width, count = residual_width(config), layer_count(config)
    found = (config["model_type"], width, count)
    wanted = (edit.model_type, edit.basis.shape[0], len(edit.layer_strengths))
    if found != wanted:
        raise RequestError(
            f"the edit was learned on a {wanted[0]} of width {wanted[1]} and {wanted[2]} layers, "
            f"the base is a {found[0]} of width {found[1]} and {found[2]} layers; apply it to the model it was learned on"
        )
    tied = bool(config.get("tie_word_embeddings", config["model_type"] in ("gpt2", "opt", "gemma2", "gemma3_text")))
    tensors = []
    for site in classify(row, names):
        strength = 1.0 if site.layer is None else edit.layer_strengths[site.layer]
        if site.layer is None and edit.embeddings == "skip":
            strength = 0.0
        if strength != 0.0:
            tensors.append(TensorEdit(site, strength, gain_name(site)))
    if not tensors:
        raise RequestError("the edit touches no tensor: every layer's strength is 0 and embeddings are skipped")
    untie = edit.embeddings == "untie" and tied
    return Plan(tuple(tensors), row.unembedding if untie and row.unembedding not in names else None, tied)


def blockwise(
    edit: Edit, row: Architecture, tensor: TensorEdit, rows: int, read: Callable[[int, int], Tensor],
    gain: Tensor | None, rows_per_block: int = WHOLE,
) -> BlockwiseEdit:  # fmt: skip
    """The edit of one matrix (or of one bias, as a single row), as a stream of its blocks."""
    if gain is not None:
        gain = gain.float() + row.gain_offset
    vector = tensor.site.name.endswith("bias")
    projection = make_projection(
        edit.basis, tensor.strength, gain, norm_preserving=edit.variant == "norm_preserving" and not vector
    )
    seen = edit.basis if gain is None else gain[:, None] * edit.basis
    return BlockwiseEdit(
        tensor.site.name, rows, tensor.site.writer.axis, read, projection, seen, gain, rows_per_block
    )  # fmt: skip


def merge_changes(name: str, parts: list[Change]) -> Change:
    """One record for a tensor that was edited as several matrices (fused experts): the worst of each figure."""
    return Change(
        name, parts[0].form, parts[0].strength,
        relative_change=max(part.relative_change for part in parts),
        largest_change=max(part.largest_change for part in parts),
        written=max(part.written for part in parts),
        residual=max(part.residual for part in parts),
        changed=any(part.changed for part in parts),
    )  # fmt: skip


def check_changes(plan: Plan, changes: list[Change]) -> None:
    """Hold an applied edit to what it declared.

    Raises:
        EditError: Nothing changed, or the tensors treated are not the declared ones.
    """
    if {change.name for change in changes} != set(plan.declared):
        missing = sorted(set(plan.declared) ^ {change.name for change in changes})
        raise EditError(f"the edit treated other tensors than it declared: {', '.join(missing[:3])}")
    if not any(change.changed for change in changes):
        raise EditError(
            f"the edit changed none of its {len(changes)} tensors: they write nothing along the direction; "
            "choose another direction or a larger strength"
        )


@torch.no_grad()
def edit_model(edit: Edit, model: nn.Module, config: dict[str, Any]) -> list[Change]:
    """Apply the edit to a model in memory, through the same arithmetic as the streaming export.

    ``embeddings: untie`` has no meaning here: a tied module stays tied, so it is refused.
    """
    parameters = dict(model.named_parameters())
    plan = plan_edit(edit, config, list(parameters))
    if plan.untied:
        raise RequestError(
            "embeddings=untie adds a tensor; apply the edit to a checkpoint instead of a model in memory"
        )
    row, changes = architecture_of(config), []
    for tensor in plan.tensors:
        parameter = parameters[tensor.site.name]
        gain = None if tensor.gain is None else parameters[tensor.gain].detach().cpu()
        parts = []
        for matrix in as_matrices(parameter.detach()):
            source = matrix.cpu().clone()
            stream = blockwise(edit, row, tensor, source.shape[0], _rows_of(source), gain)
            matrix.copy_(torch.cat(list(stream)))
            parts.append(stream.change())
        changes.append(merge_changes(tensor.site.name, parts))
    check_changes(plan, changes)
    return changes


def _rows_of(matrix: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: matrix[start:stop]


def as_matrices(tensor: Tensor) -> list[Tensor]:
    """Views of a tensor as matrices: a bias is one row, fused experts [E, a, b] are E matrices."""
    if tensor.dim() == 1:
        return [tensor[None]]
    return [tensor] if tensor.dim() == 2 else list(tensor)
