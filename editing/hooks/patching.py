"""Activation patching: what one forward wrote at a site of the residual stream, put into another forward."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import EditError
from ..wiring.row import Architecture
from .residual_stream import change_output, decoder_layers, sublayers_of

STREAM = "stream"
"""The part of a site that is the residual stream after the whole layer."""


@dataclass(frozen=True, order=True)
class Site:
    """A place where activations are read and replaced."""

    layer: int
    part: str
    """A sublayer's name, as in the architecture's row, or ``stream``."""


def sites_of(model: nn.Module, row: Architecture) -> dict[Site, nn.Module]:
    """Every site of a model, layer by layer, with the module whose output it is."""
    sites: dict[Site, nn.Module] = {}
    for index, layer in enumerate(decoder_layers(model, row)):
        sites |= {Site(index, name): module for name, module in sublayers_of(layer, row)}
        sites[Site(index, STREAM)] = layer
    return sites


@contextmanager
def sites_read(sites: Mapping[Site, nn.Module]) -> Iterator[dict[Site, Tensor]]:
    """A dictionary that a forward fills with each site's activations; with gradients enabled they keep theirs.

    Raises:
        EditError: A hook did not run, as happens in a compiled model; raised when the context ends without error.
    """
    activations: dict[Site, Tensor] = {}

    def keep(site: Site, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # With frozen weights no graph exists until one is begun here.
            hidden = hidden.requires_grad_()
        activations[site] = hidden
        return hidden

    with ExitStack() as hooks:
        for site, module in sites.items():
            hooks.callback(change_output(module, lambda hidden, s=site: keep(s, hidden)).remove)  # type: ignore[misc]
        yield activations
    if missing := set(sites) - set(activations):
        raise EditError(
            f"no activation was read at {len(missing)} sites, the first of layer {min(missing).layer}; hooks do not run"
            " in compiled models, leave out torch.compile"
        )


@contextmanager
def patched(module: nn.Module, values: Tensor, where: Bool[Tensor, "batch positions"]) -> Iterator[None]:
    """Replace a module's output by ``values`` at the positions ``where``, until the context ends.

    Args:
        module: As ``sites_of`` gives it.
        values: The module's output in another forward of the same shape.
        where: Positions to replace.

    Source:
        Vig et al. 2020; Meng et al. 2022 (causal tracing).
    """

    def put(hidden: Tensor) -> Tensor:
        # Some decoders flatten rows and positions inside a layer.
        chosen = where.to(hidden.device).reshape(hidden.shape[:-1])
        return torch.where(chosen[..., None], values.to(hidden.device, hidden.dtype), hidden)

    handle = change_output(module, put)
    try:
        yield
    finally:
        handle.remove()
