"""Concept ablation during fine-tuning: hooks remove a part of the activations, and of their gradient, in every forward.

``h <- h - P (h - value)`` at chosen places and all positions, while the context lasts; the weights do not change.
The removed part can also be the sum of what SAE latents write.
Source: CAFT (Casademunt et al. 2025, section 3). The modes separate the effect on activations from that on gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..directions.sae_latents import SparseLatents
from ..directions.subspaces import Place, Subspace
from ..errors import EditError, RequestError
from ..modules import causal_model
from ..numerics.wide import as_given
from ..wiring.row import Architecture
from .residual_stream import RowsAndPositions, change_input, change_output, decoder_layers, sublayers_of

Mode = Literal["both", "activations", "gradients"]
Value = Literal["zero", "mean"]


DEPENDENT = 1e-5
"""Share of the largest singular value below which directions count as dependent."""
Part = Callable[[Tensor], Tensor]
"""Maps activations [..., d] to the part that is removed from them, in fp32 or wider."""


def in_span(left: Tensor, right: Tensor, offset: Tensor, value: Value) -> Part:
    """The part ``P (h - m)`` with ``P = left right^T`` [d, d]; m is 0 (``zero``) or ``offset`` (``mean``)."""
    left, right = left.contiguous(), right.contiguous()

    def part(hidden: Tensor) -> Tensor:
        seen = hidden - offset.to(hidden) if value == "mean" else hidden
        return (seen @ right.to(hidden)) @ left.to(hidden).T

    return part


def ablation(part: Part, mode: Mode) -> Callable[[Tensor], Tensor]:
    """A function that removes the part p(h) from activations h. ``sg`` is the stop-gradient.

    ``both``: ``h - p(h)``; ``activations``: ``h - sg(p(h))``, gradients as before; ``gradients``: ``h - p(h) +
    sg(p(h))``, activations as before.
    """

    def change(hidden: Tensor) -> Tensor:
        # Products in fp32 or wider: in bf16 rounding would leave about 0.3% of the component in place.
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        with as_given(hidden.device):
            removed = part(wide)
        if mode == "gradients":
            return (wide - removed + removed.detach()).to(hidden.dtype)
        return (wide - (removed if mode == "both" else removed.detach())).to(hidden.dtype)

    return change


@dataclass
class Ablation:
    """A running ablation."""

    fired: dict[Place, int]
    """How often the activations of each place were changed."""
    paused: bool = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Switch the ablation off while the context lasts, to measure the model as it will be used."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


@contextmanager
def concept_ablated(
    model: nn.Module,
    row: Architecture,
    concepts: Sequence[Subspace | SparseLatents],
    mode: Mode = "both",
    value: Value = "zero",
) -> Iterator[Ablation]:
    """Ablate subspaces, or the writes of SAE latents, in every forward while the context lasts.

    Hooks keep no state between forwards, so gradient checkpointing may run them twice.

    Example:
        >>> with concept_ablated(model, row, [subspace]) as running:
        ...     train(model)
        ...     with running.pause():
        ...         evaluate(model)

    Args:
        model: A causal language model, with an adapter or without.
        row: The model's architecture.
        concepts: What is ablated, each at its place. Several subspaces at one place are ablated as one span.
        mode: Remove the part from activations and gradients (``both``), or from one of them.
        value: What replaces the removed component: ``zero``, or the ``mean`` that the subspace was centred on.

    Raises:
        RequestError: The model is compiled, or has no such layer, or a place is shared with an oblique projector or
            latents.
        EditError: Forwards ran and none reached a place, so nothing was ablated there.

    Source:
        CAFT (Casademunt et al. 2025, section 3).
    """
    inner = causal_model(model)
    # torch.compile(model) returns a wrapper; model.compile() leaves its mark on the modules.
    if hasattr(model, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) for m in inner.modules()):
        raise RequestError("hooks do not run in compiled models, so nothing would be ablated; leave out torch.compile")
    running = Ablation({})
    fired, forwards = running.fired, 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += not running.paused

    with ExitStack() as hooks:
        hooks.callback(inner.base_model.register_forward_pre_hook(count).remove)
        for place, part in _joined(concepts, value).items():
            fired[place] = 0
            change = ablation(part, mode)

            # Defaults bind the place and the change of this turn; a closure would see those of the last one.
            def counted(hidden: Tensor, place: Place = place, change: Callable[[Tensor], Tensor] = change) -> Tensor:
                if running.paused:
                    return hidden
                fired[place] += 1
                return change(hidden)

            hooks.enter_context(changed_at(inner, row, place, counted))
        yield running
    # Not reached after an error inside the context, which this error would hide. A run that was killed after its last
    # step has no forward left to take.
    missed = [str(place) for place, count in fired.items() if forwards and not count]
    if missed:
        raise EditError(
            f"no forward reached the {missed[0]}, so nothing was ablated there; check the layers and the model"
        )


def _joined(concepts: Sequence[Subspace | SparseLatents], value: Value) -> dict[Place, Part]:
    """The part that is removed at each place, from all concepts at that place together."""
    by_place: dict[Place, list[Subspace | SparseLatents]] = {}
    for concept in concepts:
        by_place.setdefault(concept.place, []).append(concept)
    return {place: _part(place, members, value) for place, members in by_place.items()}


def _part(place: Place, concepts: Sequence[Subspace | SparseLatents], value: Value) -> Part:
    if len(concepts) == 1 and isinstance(concepts[0], SparseLatents):
        if value == "mean":
            raise RequestError("value=mean does not work with SAE latents, whose writes have no mean; use value=zero")
        return concepts[0].written
    subspaces = [concept for concept in concepts if isinstance(concept, Subspace)]
    if len(concepts) == len(subspaces) == 1:
        return in_span(*subspaces[0].projector(), subspaces[0].offset, value)
    if len(subspaces) < len(concepts) or any(subspace.readers is not None for subspace in subspaces):
        raise RequestError(
            f"LEACE directions or SAE latents share the {place} with another source, and cannot be combined; "
            "choose one source for this place"
        )
    # One projector onto the joint span: subtracting each projection would remove a shared component twice.
    bases = torch.cat([subspace.basis for subspace in subspaces], 1).double()
    left, sizes, _ = torch.linalg.svd(bases, full_matrices=False)
    # Directions that lie in the others' span add nothing; a basis made of them would be arbitrary.
    span = left[:, sizes > DEPENDENT * sizes[0]].float()
    # The one point of the span whose component in each subspace is that subspace's mean.
    means = torch.cat([subspace.basis.double().T @ subspace.offset.double() for subspace in subspaces])
    return in_span(span, span, (torch.linalg.pinv(bases.T, rtol=DEPENDENT) @ means).float(), value)


@contextmanager
def changed_at(model: nn.Module, row: Architecture, place: Place, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the activations h [batch, positions, d] of a place by ``change(h)`` while the context lasts."""
    module = module_at(model, row, place)
    places = RowsAndPositions(decoder_layers(model, row)[place.layer])
    hook = change_input if place.site == "input" else change_output
    handle = hook(module, lambda hidden: change(places.of(hidden)).reshape(hidden.shape))
    try:
        yield
    finally:
        handle.remove()
        places.remove()


def module_at(model: nn.Module, row: Architecture, place: Place) -> nn.Module:
    """The module whose input (``input``) or output (other sites) is the place.

    Raises:
        RequestError: The model has no such layer.
    """
    layers = decoder_layers(model, row)
    if not 0 <= place.layer < len(layers):
        raise RequestError(
            f"there is no layer {place.layer}, the model has layers 0 to {len(layers) - 1}; "
            "use directions that were learned on this model"
        )
    layer = layers[place.layer]
    modules = [module for _, module in sublayers_of(layer, row)]
    return {"attention": modules[0], "mlp": modules[-1]}.get(place.site, layer)
