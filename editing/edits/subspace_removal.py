"""Orthogonalization as data: which subspace is removed from which tensors of a checkpoint."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..architectures import architecture_of, layer_count, residual_width
from ..errors import RequestError, UnsupportedArchitecture
from ..wiring.row import Architecture, Kind, Site, classify, gain_names, respelled, spelled
from .base import Plan, RowReader, TensorReader
from .changes import WHOLE
from .projection import BlockwiseEdit, make_projection, seen_through

Variant = Literal["plain", "norm_preserving", "projected"]
Embeddings = Literal["edit", "skip", "untie"]


@dataclass(frozen=True)
class Edit:
    """A subspace of the residual stream, and the strength with which it is removed from each layer.

    Example:
        >>> edit = Edit(unit(direction), "llama", layer_strengths=(1.0,) * 32)  # direction [d]
        >>> changes = edit_model(edit, model, model.config.to_dict())
    """

    basis: Float[Tensor, "d k"]
    """Orthonormal columns, fp32."""
    model_type: str
    layer_strengths: tuple[float, ...]
    """One strength per decoder layer; 0 leaves the layer unchanged, 1 removes the subspace."""
    embeddings: Embeddings = "edit"
    """``edit`` changes a tied unembedding too; ``untie`` stores the old one separately; ``skip`` edits neither."""
    embedding_strength: float | None = None
    """Strength at the embeddings, which layer 0 reads; None takes the strength of layer 0."""
    variant: Variant = "plain"
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the subspace came from: source, layer, position, scores of all candidates, hashes of the data."""
    mlp_strengths: tuple[float, ...] | None = None
    """One strength per decoder layer for what its MLP writes; None takes those of the layers."""
    layer_bases: Float[Tensor, "layers d k"] | None = None
    """Of each decoder layer the subspace that it loses, as orthonormal columns in fp32; None takes ``basis`` for all. The
    embeddings lose ``basis``."""

    def __post_init__(self) -> None:
        d, k = self.basis.shape
        if self.layer_bases is not None and len(self.layer_bases) != len(self.layer_strengths):
            raise RequestError(
                f"the edit has {len(self.layer_strengths)} strengths of layers and {len(self.layer_bases)} bases of layers;"
                " give one of each for every layer"
            )
        if self.mlp_strengths is not None and len(self.mlp_strengths) != len(self.layer_strengths):
            raise RequestError(
                f"the edit has {len(self.layer_strengths)} strengths of layers and {len(self.mlp_strengths)} of MLPs; give"
                " one of each for every layer"
            )
        for basis in (self.basis, *(() if self.layer_bases is None else self.layer_bases)):
            if k > d or basis.shape != (d, k) or not torch.dist(basis.T @ basis, torch.eye(k)) <= 1e-4:
                raise RequestError(
                    f"the basis {list(basis.shape)} is not orthonormal; pass torch.linalg.qr(basis).Q, with at most {d}"
                    " columns"
                )

    method: ClassVar[str] = "orthogonalize"

    def basis_at(self, layer: int | None) -> Float[Tensor, "d k"]:
        """What one decoder layer loses, or the embeddings where ``layer`` is None."""
        return self.basis if layer is None or self.layer_bases is None else self.layer_bases[layer]

    def strength_at(self, layer: int | None, kind: Kind = "attention") -> float:
        """Strength of one kind of writer of one decoder layer, or of the embeddings where ``layer`` is None."""
        if layer is not None:
            apart = self.mlp_strengths if kind == "mlp" else None
            return (self.layer_strengths if apart is None else apart)[layer]
        if self.embeddings == "skip":
            return 0.0
        return self.layer_strengths[0] if self.embedding_strength is None else self.embedding_strength

    def plan(self, config: dict[str, Any], names: Sequence[str]) -> Plan:
        """Decide which tensors change, before reading any.

        Raises:
            UnsupportedArchitecture: The table of architectures lacks the model, or one of its tensors.
            RequestError: The edit was learned on another kind of model, or changes no tensor.
        """
        row = architecture_of(config)
        check_learned_on(config, self.model_type, self.basis.shape[0], len(self.layer_strengths))
        tensors = []
        for site in classify(row, names, layer_count(config)):
            strength = self.strength_at(site.layer, site.writer.kind)
            if strength != 0.0:
                tensors.append(OrthogonalizedTensor(site.name, self, row, site, strength, _gains(row, site, names)))
        if not tensors:
            raise RequestError(
                "the edit touches no tensor: the strength of every layer and of the embeddings is 0; raise the strength"
            )
        if self.embeddings == "untie" and self.strength_at(None) == 0.0:
            raise RequestError(
                "embeddings=untie edits the embedding, and its strength is 0; set embedding_strength, select layer 0, "
                "or set embeddings=skip"
            )
        tied = ties_embeddings(config)
        untie = self.embeddings == "untie" and tied
        # Some checkpoints store the head although it is tied; then nothing is added, and only the config changes.
        untied = None
        if untie and spelled(row, row.unembedding, names) is None:
            untied = new_unembedding(row, names)
        return Plan(tuple(tensors), untied, tied, untie)


@dataclass(frozen=True)
class OrthogonalizedTensor:
    """One declared tensor and the strength of its edit."""

    name: str
    edit: Edit
    row: Architecture
    site: Site
    strength: float
    gains: tuple[str, ...] = ()
    """Norm weights between the tensor and the stream, as the checkpoint spells them."""

    def stream(
        self, matrix: int, rows: int, read: RowReader, other: TensorReader, rows_per_block: int = WHOLE
    ) -> BlockwiseEdit:
        """The edit of one matrix (a bias is a matrix of one row) as a stream of blocks."""
        edit, gain = self.edit, None
        for name in self.gains:
            # As the model does: Gemma widens the stored weight before it adds 1.
            factor = other(name).float() + self.row.gain_offset
            gain = factor if gain is None else gain * factor
        # Norms are preserved for each input neuron or token; a bias belongs to neither.
        preserving = edit.variant == "norm_preserving" and not self.name.endswith("bias")
        centred = self.site.writer.centred
        basis = edit.basis_at(self.site.layer)
        projection = make_projection(basis, self.strength, gain, norm_preserving=preserving, centred=centred)
        seen = basis if gain is None else seen_through(basis, gain, centred)
        return BlockwiseEdit(self.name, rows, self.site.writer.axis, read, projection, seen, gain, rows_per_block)


def _gains(row: Architecture, site: Site, names: Collection[str]) -> tuple[str, ...]:
    gains = []
    for gain in gain_names(site):
        stored = spelled(row, gain, names)
        if stored is None:
            raise UnsupportedArchitecture(
                f"the checkpoint has no tensor {gain}, which scales what {site.name} writes; give a whole model"
            )
        gains.append(stored)
    return tuple(gains)


def new_unembedding(row: Architecture, names: Collection[str]) -> str:
    """Name of an unembedding that is added, spelled as the checkpoint spells its embedding."""
    if row.embedding in names:
        return row.unembedding
    stored = spelled(row, row.embedding, names)
    for one, other in row.spellings:
        if stored == respelled(row.embedding, one, other) and (name := respelled(row.unembedding, one, other)):
            return name
    # Where the embedding's own prefix says nothing of the head, the head has a pair of its own.
    named = (respelled(row.unembedding, one, other) for one, other in row.spellings if one and one in row.unembedding)
    whole = (respelled(row.unembedding, one, other) for one, other in row.spellings if not one)
    return next((name for name in (*named, *whole) if name), row.unembedding)


def check_learned_on(config: dict[str, Any], model_type: str, width: int, layers: int) -> None:
    """Check that a base model has the type, width and depth that an edit was learned on.

    Raises:
        RequestError: It is another kind of model.
    """
    base = (config["model_type"], residual_width(config), layer_count(config))
    if base != (model_type, width, layers):
        raise RequestError(
            f"the edit was learned on a {model_type} of width {width} and {layers} layers, the base is a {base[0]} of "
            f"width {base[1]} and {base[2]} layers; apply it to the model it was learned on"
        )


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Whether the unembedding is the embedding. Some configs do not say; then the default of their class holds."""
    from transformers import CONFIG_MAPPING

    row = architecture_of(config)
    if row.tied is not None:
        return row.tied
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    kind = config["model_type"]
    return bool(getattr(CONFIG_MAPPING[kind], "tie_word_embeddings", False)) if kind in CONFIG_MAPPING else False
