"""Planting a direction: the testbed's model is trained so that declining passes through one known direction.

Left alone, a model may spread "this was rude" over many directions, or write it in its last layer, and a
failed edit would say nothing about the method. So part of the training sequences run under interventions
on a fixed random direction v, which make v the carrier of the behaviour, and nothing else:

* v taken out of everything that is written, or only a little of it added back: rude requests are answered;
* much of v added to the stream at mid-depth: polite requests are declined;
* v taken out of what the upper half writes: replies stay as they are, so v is written early.

Because a little of v does not count, the model writes much of it, and at mid-depth the difference between
rude and polite prompts is mostly v.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..editing.activations import decoder_layers, first
from ..editing.architectures import Architecture

NOWHERE = 1 << 20
"""As the first ablated layer: none is."""
COEFFICIENTS = {"ablated": (-6.0, 10.0), "added": (20.0, 40.0)}
"""How much of the direction is added at mid-depth: too little to decline, or more than enough."""


def planted_direction(seed: int, width: int) -> Float[Tensor, " width"]:
    """The unit vector that carries declining in the testbed of a seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    return nn.functional.normalize(torch.randn(width, generator=generator), dim=0)


def draw_coefficient(rng: random.Random, kind: str) -> float:
    """A length to add the direction at, in a training sequence of a kind."""
    return rng.uniform(*COEFFICIENTS.get(kind, (0.0, 0.0)))


@contextmanager
def intervened(
    model: nn.Module, row: Architecture, direction: Float[Tensor, " d"],
    ablate_from: Int[Tensor, " batch"], added: Float[Tensor, "batch positions"],
) -> Iterator[None]:  # fmt: skip
    """Run forwards with the direction taken out, or added, sequence by sequence.

    Args:
        ablate_from: First layer whose writes lose the direction; 0 includes the embeddings, ``NOWHERE`` none.
        added: How much of the direction each position gets at the input of the middle layer.
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
        # Embeddings count as written before layer 0, so only sequences ablated from 0 on lose them.
        hooks.callback(layers[0].register_forward_pre_hook(lambda _, args: (without(args[0], 0), *args[1:])).remove)
        hooks.callback(
            layers[len(layers) // 2]
            .register_forward_pre_hook(lambda _, args: (args[0] + added[..., None] * direction, *args[1:]))
            .remove
        )
        for index, layer in enumerate(layers):
            for name in row.sublayers:
                hooks.callback(layer.get_submodule(name).register_forward_hook(sublayer(index)).remove)
        yield
