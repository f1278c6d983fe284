"""Concept ablation during fine-tuning: the stream loses a subspace in every forward, and its gradient with it.

``h <- h - P (h - value)`` at chosen places, all positions, while the context lasts; nothing of it is in the weights.
Source: CAFT (Casademunt et al. 2025, section 3); modes and values as their authors and critics tell them apart.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .activations import change_input, change_output, decoder_layers
from .adapters import causal_model
from .architectures import Architecture
from .errors import EditError, RequestError
from .subspaces import Place, Subspace

Mode = Literal["both", "activations", "gradients"]
Value = Literal["zero", "mean"]


def ablation(
    left: Tensor, right: Tensor, offset: Tensor, mode: Mode, value: Value
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """What a place's activations become; with sg the stop-gradient, P = left right^T and m the value (0 or the mean).

    ``both``: ``h - P (h - m)``; ``activations``: ``h - sg(P (h - m))``, gradients as before; ``gradients``:
    ``h - P h + sg(P h)``, activations as before.
    """
    left, right = left.contiguous(), right.contiguous()

    def change(hidden: Tensor) -> Tensor:
        # Products in fp32 or wider: in bf16 the projection itself would leave a third of a percent.
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        write, read = left.to(wide), right.to(wide)
        if mode == "gradients":
            part = (wide @ read) @ write.T
            return (wide - part + part.detach()).to(hidden.dtype)
        seen = wide - offset.to(wide) if value == "mean" else wide
        part = (seen @ read) @ write.T
        return (wide - (part if mode == "both" else part.detach())).to(hidden.dtype)

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
    model: nn.Module, row: Architecture, subspaces: Sequence[Subspace], mode: Mode = "both", value: Value = "zero"
) -> Iterator[Ablation]:
    """Ablate subspaces in every forward while the context lasts.

    Hooks keep no state between forwards, so gradient checkpointing may run them twice.

    Raises:
        RequestError: The model is compiled, or has no such layer, or two oblique projectors share a place.
        EditError: A place was never reached, so nothing was ablated there.
    """
    inner = causal_model(model)
    if hasattr(model, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) for m in inner.modules()):
        raise RequestError("hooks do not fire in compiled models; leave out torch.compile where concepts are ablated")
    running = Ablation({})
    fired = running.fired
    with ExitStack() as hooks:
        for place, (left, right, offset) in _joined(subspaces).items():
            fired[place] = 0
            module, change = module_at(inner, row, place), ablation(left, right, offset, mode, value)

            def counted(hidden: Tensor, place: Place = place, change: Callable[[Tensor], Tensor] = change) -> Tensor:
                if running.paused:
                    return hidden
                fired[place] += 1
                return change(hidden)

            put = change_input if place.site == "input" else change_output
            hooks.callback(put(module, counted).remove)
        yield running
    missed = [str(place) for place, count in fired.items() if not count]
    if missed:
        raise EditError(f"nothing passed the {missed[0]} while its concept was to be ablated; check layers and model")


def _joined(subspaces: Sequence[Subspace]) -> dict[Place, tuple[Tensor, Tensor, Tensor]]:
    """One projector a place: what several sources found there leaves together, whatever angle they have."""
    found: dict[Place, list[Subspace]] = {}
    for subspace in subspaces:
        found.setdefault(subspace.place, []).append(subspace)
    joined = {}
    for place, parts in found.items():
        if len(parts) == 1:
            joined[place] = (*parts[0].projector(), parts[0].offset)
            continue
        if any(part.readers is not None for part in parts):
            raise RequestError(f"an oblique projector shares the {place} with another source; use one of them there")
        whole = torch.linalg.qr(torch.cat([part.basis for part in parts], 1).double()).Q.float()
        joined[place] = (whole, whole, parts[0].offset)
    return joined


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
