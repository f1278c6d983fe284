"""Editing a model that the caller holds in memory: find a direction, take it out of the weights, put it back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifacts.checkpoints.edits import save_edit
from ..artifacts.concepts import load_concept
from ..artifacts.models.in_memory import ready_to_measure
from ..artifacts.models.load import LoadedModel
from ..artifacts.models.source import ModelInMemory
from ..editing.architectures import layer_count
from ..editing.edits.base import WeightEdit, edit_model
from ..editing.edits.changes import Change
from ..editing.errors import RequestError
from ..eval.concept import Concept
from .common.calls import called, events_for
from .common.direction_search import Direction, DirectionSearch, DirectionSettings, check_pairs
from .common.settings import settings_of_call
from .orthogonalize.recipe import OrthogonalizeSettings, Strengths, edit_along

IN_MEMORY = "model in memory"
"""What records call it."""
SEARCH_SETTINGS = (*DirectionSettings.__annotations__, "seed", "max_new_tokens")
"""Settings of ``excise run orthogonalize`` that say how a direction is found."""


@dataclass(frozen=True, repr=False)
class AppliedEdit:
    """An edit that was applied to a model in memory; ``undo`` takes it back, bit for bit."""

    edit: WeightEdit
    """The edit as data: ``excise.apply`` applies it to a checkpoint."""
    changes: tuple[Change, ...]
    """What it did to each tensor."""
    _before: dict[str, Tensor]
    _model: Any

    def __repr__(self) -> str:
        changed = sum(change.changed for change in self.changes)
        return f"AppliedEdit({self.edit.method}, {changed} of {len(self.changes)} declared tensors changed)"

    @torch.no_grad()
    def undo(self) -> None:
        """Give every edited tensor its earlier values again."""
        parameters = dict(self._model.named_parameters())
        for name, values in self._before.items():
            parameters[name].copy_(values)

    def save(self, folder: str | Path) -> None:
        """Write the edit into a folder, for ``excise.apply`` and the command ``excise apply``."""
        save_edit(self.edit, Path(folder))

    def __enter__(self) -> "AppliedEdit":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def find_direction(
    model: Any, tokenizer: Any, concept: str | Path | Concept, *, progress: bool = True, **settings: Any
) -> Direction:
    """Find the direction of a concept in the residual stream of a model in memory.

    The direction is the mean activation on the positive prompts of the pack's ``contrast.jsonl`` minus that on the
    negative ones, at the layer and token where taking it out weakens the concept and leaves neutral text alone.

    Args:
        model: A causal language model of transformers; its weights and its mode stay as they are.
        tokenizer: The model's tokenizer.
        concept: ``builtin:NAME``, the folder of a pack, or a loaded pack.
        progress: Show progress, where the error stream is a terminal.
        **settings: How to search: ``train_pairs``, ``validation_pairs``, ``positions``, ``point``, ``position``,
            ``max_depth``, ``max_kl``, ``min_induce``, ``seed``, ``max_new_tokens``; the same as of
            ``excise run orthogonalize``, with the same defaults.

    Returns:
        The direction with its place, its length and the scores of every candidate.

    Raises:
        RequestError: A setting is unknown, or the pack has too few contrast pairs.
        ConceptError: The pack is not valid, or has no contrast pairs.
        ExciseError: The model treats both sides of the pairs alike.

    Source:
        Arditi et al. 2024, section 2.3.

    Example:
        >>> import excise
        >>> model, tokenizer = excise.load_model("builtin:testbed", dtype="float32")
        >>> direction = excise.find_direction(model, tokenizer, "builtin:declining", train_pairs=16, validation_pairs=8)
        >>> direction.vector.shape
        torch.Size([192])
    """
    chosen = settings_of_call(DirectionSettings, settings, only=SEARCH_SETTINGS)
    with called(progress):
        pack = concept if isinstance(concept, Concept) else load_concept(str(concept))
    pack.require("find_direction", "contrast")
    check_pairs(pack, chosen)
    with called(progress), ready_to_measure(model, tokenizer):
        loaded = LoadedModel(model, tokenizer, ModelInMemory(IN_MEMORY, model, tokenizer))
        return DirectionSearch(loaded, pack, chosen, events_for(progress)).run()


def orthogonalize(
    model: Any,
    direction: Direction | Float[Tensor, " d"],
    *,
    layers: str | None = None,
    strength: float | tuple[float, ...] | None = None,
    embeddings: Literal["edit", "skip"] | None = None,
    embedding_strength: float | None = None,
    mlp_strength: float | tuple[float, ...] | None = None,
    variant: Literal["plain", "norm_preserving", "projected"] | None = None,
    per_layer: bool | None = None,
) -> AppliedEdit:
    """Take a direction out of every weight of a model in memory that writes it to the residual stream.

    The model is changed in place. A copy of the edited tensors is kept in main memory until the result is dropped.

    Args:
        model: A causal language model of transformers.
        direction: What ``find_direction`` found, or a vector as wide as the model's residual stream.
        layers: Layers to edit: ``all`` (default), a number, a range such as ``4-7``, or fractions such as
            ``0.25-0.75``.
        strength: Share of the component to remove, 1 by default; one number, or one for each layer.
        embeddings: ``edit`` (default) changes the embedding too; ``skip`` leaves it.
        embedding_strength: Share to remove from the embedding; the strength of layer 0 by default.
        mlp_strength: Share to remove from what MLPs write, one number or one for each layer; ``strength`` by default.
        variant: ``plain`` (default); ``norm_preserving`` keeps the norm of every column; ``projected`` first takes the
            mean of the negative prompts out of the direction, which needs the result of ``find_direction``.
        per_layer: Take out of each layer the direction at its own output (default: one direction for all), which needs it
            too.

    Returns:
        The edit as data, what it did to each tensor, and a way back: ``undo()``, or the end of a ``with`` block.

    Raises:
        UnsupportedArchitecture: excise does not know which tensors of this model write to the stream.
        RequestError: A setting is unknown, or the direction is as wide as another model.
        EditError: The edit changes nothing, or a weight is not finite.

    Source:
        Arditi et al. 2024, section 2.4.

    Example:
        >>> import excise, torch
        >>> model, tokenizer = excise.load_model("builtin:testbed", dtype="float32")
        >>> direction = torch.nn.functional.normalize(torch.ones(model.config.hidden_size), dim=0)
        >>> weight = model.model.layers[0].mlp.down_proj.weight
        >>> with excise.orthogonalize(model, direction) as applied:
        ...     bool((direction @ weight).abs().max() < 1e-5)
        True
        >>> bool((direction @ weight).abs().max() > 0.1)
        True
    """
    values = {
        "layers": layers,
        "strength": strength,
        "embeddings": embeddings,
        "embedding_strength": embedding_strength,
        "mlp_strength": mlp_strength,
        "variant": variant,
        "per_layer": per_layer,
    }
    settings = settings_of_call(OrthogonalizeSettings, values)
    config = model.config.to_dict()
    direction_record = direction if isinstance(direction, Direction) else _record_of_vector(direction, settings)
    edit = edit_along(direction_record, settings, config["model_type"], Strengths.of(settings, layer_count(config)))
    parameters = dict(model.named_parameters())
    declared = edit.plan(config, list(parameters)).declared
    before = {name: parameters[name].detach().to("cpu", copy=True) for name in declared}
    applied = AppliedEdit(edit, (), before, model)
    try:
        changes = tuple(edit_model(edit, model, config))
    except BaseException:
        # Half an edit is none.
        applied.undo()
        raise
    return AppliedEdit(edit, changes, before, model)


def _record_of_vector(vector: Tensor, settings: OrthogonalizeSettings) -> Direction:
    """A caller's vector as a direction of which nothing else is known."""
    if vector.dim() != 1 or not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise RequestError(
            f"the direction has shape {list(vector.shape)} or is not finite or zero; give a vector as wide as the"
            " residual stream"
        )
    if settings.variant == "projected":
        raise RequestError(
            "variant=projected needs the mean of the negative prompts; give the result of find_direction"
        )
    vector = vector.detach().float().cpu()
    return Direction(
        vector, torch.zeros_like(vector), -1, -1, True, (), {"source": "given", "norm": float(vector.norm())}
    )
