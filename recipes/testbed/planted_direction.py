"""Planting a direction: the testbed's model is trained so that one direction decides whether it declines.

Without this, a model may spread "this was rude" over many directions or write it in its last layer, and a failed edit
would say nothing about the method. So some training sequences run under interventions on a direction, which make it the
only carrier of the behaviour:

* removed from everything that is written: rude requests are answered;
* added to the stream at mid-depth: polite requests are declined;
* removed from what the upper half writes: replies stay the same, so the lower half must write the direction.

In the first phase the direction is a fixed random one, until the model knows its world; a small amount of it does not
count as rude. In a short last phase it is the difference between the means of rude and polite prompts at mid-depth.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...editing.hooks.residual_stream import decoder_layers, first, sublayers_of
from ...editing.wiring.row import Architecture

NOWHERE = 1 << 20
"""A first ablated layer beyond all layers: nothing is ablated."""
FIXED = {"ablated": (-6.0, 10.0), "added": (20.0, 40.0)}
"""Range of the fixed direction's coefficient at mid-depth: too small to decline (``ablated``), or large enough."""
RELATIVE = {"added": (0.8, 1.5)}
"""Range of the added difference in means, as a multiple of its length."""


def planted_direction(seed: int, width: int) -> Float[Tensor, " width"]:
    """The fixed unit vector of a seed's testbed."""
    generator = torch.Generator().manual_seed(seed + 1)
    return nn.functional.normalize(torch.randn(width, generator=generator), dim=0)


class RunningDifference:
    """Mean of rude minus mean of polite prompts at their last token, at mid-depth, over the latest batches."""

    def __init__(self, decay: float = 0.9):
        self.decay = decay
        self.means: dict[int, Tensor] = {}

    def vector(self) -> Float[Tensor, " d"]:
        return self.means[1] - self.means[-1]

    @property
    def known(self) -> bool:
        return self.means.keys() == {1, -1}

    def update(self, hidden: Float[Tensor, "batch positions d"], ends: Int[Tensor, "batch positions"]) -> None:
        """``ends`` marks the last tokens of prompts: 1 for rude, -1 for others, 0 elsewhere."""
        for mark in (1, -1):
            if (chosen := ends == mark).any():
                mean = hidden.detach()[chosen].mean(0)
                self.means[mark] = (
                    self.decay * self.means[mark] + (1 - self.decay) * mean if mark in self.means else mean
                )


@contextmanager
def watched(model: nn.Module, row: Architecture, difference: RunningDifference, ends: Tensor) -> Iterator[None]:
    """Update a running difference in every forward while the context lasts."""
    layers = decoder_layers(model, row)
    handle = layers[len(layers) // 2].register_forward_pre_hook(lambda _, args: difference.update(args[0], ends))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def intervened(
    model: nn.Module,
    row: Architecture,
    direction: Float[Tensor, " d"],
    ablate_from: Int[Tensor, " batch"],
    added: Float[Tensor, "batch positions"],
) -> Iterator[None]:
    """Remove a direction, or add it, in every forward while the context lasts; each sequence has its own intervention.

    Args:
        model: The testbed's model.
        row: Its architecture.
        direction: Unit vector.
        ablate_from: First layer whose writes lose the direction; 0 includes the embeddings, ``NOWHERE`` means none.
        added: Coefficient of the direction at the input of the middle layer, for each position.
    """
    layers = decoder_layers(model, row)
    direction = direction.to(added.device)

    def without(values: Tensor, layer: int) -> Tensor:
        chosen = (ablate_from <= layer).to(values.dtype)[:, None, None]
        return values - chosen * (values @ direction)[..., None] * direction

    def sublayer(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            changed = without(first(output), layer)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with ExitStack() as hooks:
        # Embeddings are written before layer 0, so only sequences with ablate_from 0 lose the direction in them.
        hooks.callback(layers[0].register_forward_pre_hook(lambda _, args: (without(args[0], 0), *args[1:])).remove)
        hooks.callback(
            layers[len(layers) // 2]
            .register_forward_pre_hook(lambda _, args: (args[0] + added[..., None] * direction, *args[1:]))
            .remove
        )
        for index, layer in enumerate(layers):
            for _, module in sublayers_of(layer, row):
                hooks.callback(module.register_forward_hook(sublayer(index)).remove)
        yield
