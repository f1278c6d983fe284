"""Concept ablation during fine-tuning: the stream loses a part of itself in every forward, and its gradient with it.

``h <- h - P (h - value)`` at chosen places, all positions, while the context lasts; nothing of it is in the weights. The
part may also be what an autoencoder's latents write where they fire.
Source: CAFT (Casademunt et al. 2025, section 3); modes and values as their authors and critics tell them apart.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..architectures import Architecture
from ..directions.sae_latents import SparseLatents
from ..directions.subspaces import Place, Subspace
from ..errors import EditError, RequestError
from ..modules import causal_model
from .residual_stream import change_input, change_output, decoder_layers

Mode = Literal["both", "activations", "gradients"]
Value = Literal["zero", "mean"]


Part = Callable[[Tensor], Tensor]
"""What of an activation is to be taken out, in fp32 or wider."""


def in_span(left: Tensor, right: Tensor, offset: Tensor, value: Value) -> Part:
    """``P (h - m)`` with ``P = left right^T`` and m the value that is left: 0 or the mean."""
    left, right = left.contiguous(), right.contiguous()

    def part(hidden: Tensor) -> Tensor:
        seen = hidden - offset.to(hidden) if value == "mean" else hidden
        return (seen @ right.to(hidden)) @ left.to(hidden).T

    return part


def ablation(part: Part, mode: Mode) -> Callable[[Tensor], Tensor]:
    """What a place's activations become without a part p of them; sg is the stop-gradient.

    ``both``: ``h - p(h)``; ``activations``: ``h - sg(p(h))``, gradients as before; ``gradients``: ``h - p(h) + sg(p(h))``,
    activations as before.
    """

    def change(hidden: Tensor) -> Tensor:
        # Products in fp32 or wider: in bf16 the projection itself would leave a third of a percent.
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        gone = part(wide)
        if mode == "gradients":
            return (wide - gone + gone.detach()).to(hidden.dtype)
        return (wide - (gone if mode == "both" else gone.detach())).to(hidden.dtype)

    return change


@dataclass
class Ablation:
    """An ablation that holds: how often each place was changed, and whether it is paused."""

    fired: dict[Place, int]
    paused: bool = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the stream as it is, to look at the model as it will be used."""
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
    """Ablate subspaces, or latents as far as they fire, in every forward while the context lasts.

    Hooks keep no state between forwards, so gradient checkpointing may run them twice.

    Raises:
        RequestError: The model is compiled, or has no such layer, or a place is shared with an oblique projector or latents.
        EditError: A place was never reached, so nothing was ablated there.
    """
    inner = causal_model(model)
    if hasattr(model, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) for m in inner.modules()):
        raise RequestError("hooks do not fire in compiled models; leave out torch.compile where concepts are ablated")
    running = Ablation({})
    fired = running.fired
    with ExitStack() as hooks:
        for place, part in _joined(concepts, value).items():
            fired[place] = 0
            change = ablation(part, mode)

            def counted(hidden: Tensor, place: Place = place, change: Callable[[Tensor], Tensor] = change) -> Tensor:
                if running.paused:
                    return hidden
                fired[place] += 1
                return change(hidden)

            hooks.callback(change_at(inner, row, place, counted).remove)
        yield running
    missed = [str(place) for place, count in fired.items() if not count]
    if missed:
        raise EditError(f"nothing passed the {missed[0]} while its concept was to be ablated; check layers and model")


def _joined(concepts: Sequence[Subspace | SparseLatents], value: Value) -> dict[Place, Part]:
    """What leaves each place: what several sources found there leaves together, whatever angle they have."""
    found: dict[Place, list[Subspace | SparseLatents]] = {}
    for concept in concepts:
        found.setdefault(concept.place, []).append(concept)
    return {place: _part(place, several, value) for place, several in found.items()}


def _part(place: Place, several: Sequence[Subspace | SparseLatents], value: Value) -> Part:
    if len(several) == 1 and isinstance(several[0], SparseLatents):
        if value == "mean":
            raise RequestError("latents that are taken out as far as they fire leave no mean behind; use value=zero")
        return several[0].written
    subspaces = [one for one in several if isinstance(one, Subspace)]
    if len(several) == len(subspaces) == 1:
        return in_span(*subspaces[0].projector(), subspaces[0].offset, value)
    if len(subspaces) < len(several) or any(one.readers is not None for one in subspaces):
        raise RequestError(
            f"an oblique projector or an autoencoder's latents share the {place} with another source; use one of them there"
        )
    whole = torch.linalg.qr(torch.cat([one.basis for one in subspaces], 1).double()).Q.float()
    return in_span(whole, whole, subspaces[0].offset, value)


def change_at(
    model: nn.Module, row: Architecture, place: Place, change: Callable[[Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Put ``change`` of its activations in the stead of a place's activations, until the handle is removed."""
    put = change_input if place.site == "input" else change_output
    return put(module_at(model, row, place), change)


def module_at(model: nn.Module, row: Architecture, place: Place) -> nn.Module:
    """The module whose input or output is a place.

    Raises:
        RequestError: The model has no such layer.
    """
    layers = decoder_layers(model, row)
    if not 0 <= place.layer < len(layers):
        raise RequestError(
            f"there is no layer {place.layer}; the model has layers 0 to {len(layers) - 1}. Were the directions learned on it?"
        )
    layer = layers[place.layer]
    names = {"attention": row.sublayers[0], "mlp": row.sublayers[-1]}
    return layer.get_submodule(names[place.site]) if place.site in names else layer
