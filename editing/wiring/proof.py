"""A row proved on a small copy: edited by its row, nothing along the direction is left in the stream.

The check reads the stream with hooks of its own on the decoder layers, and knows nothing of the row but where the
layers are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bench import bench_of

ENOUGH = 1e-5
"""Largest share of a component that may be left after an edit in float32."""


@dataclass(frozen=True)
class Residual:
    """How much of a direction the stream holds, at worst over places and tokens."""

    before: tuple[float, ...]
    """At the first layer's input and after every layer: the component's share of the stream."""
    after: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The largest share that is left, of what was there."""
        return max(after / max(before, 1e-12) for before, after in zip(self.before, self.after, strict=True))

    @property
    def place(self) -> str:
        """Where most is left."""
        ratios = [after / max(before, 1e-12) for before, after in zip(self.before, self.after, strict=True)]
        index = ratios.index(max(ratios))
        return f"layer {index - 1}" if index else "the embeddings"


def components(model: Any, inputs: dict[str, Tensor], direction: Tensor) -> tuple[float, ...]:
    """Root mean square of the cosine between the stream and a direction, at the first layer's input and after each."""
    width = direction.shape[0]
    streams: Sequence[Tensor] = bench_of(model, inputs, width).streams
    shares = []
    for stream in streams:
        rows = stream.reshape(-1, width).double()
        cosines = (rows @ direction.double()) / rows.norm(dim=1).clamp_min(1e-30)
        shares.append(float(cosines.square().mean().sqrt()))
    return tuple(shares)


def random_direction(width: int, seed: int = 17) -> Tensor:
    """A unit vector."""
    return torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
