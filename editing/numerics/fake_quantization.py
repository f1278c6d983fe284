"""Weights rounded as cheap inference rounds them, in place and back again, bit for bit.

Source: round-to-nearest, symmetric, in groups along the input (Dettmers and Zettlemoyer 2023, section 2).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..errors import EditError
from ..modules import is_conv1d, is_linear

GROUP = 64


def round_to_nearest(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """A weight [..., n] as symmetric integers of so many bits would hold it, with one scale for each group of inputs."""
    if bits == 16:
        return weight.bfloat16().to(weight.dtype)
    most = 2 ** (bits - 1) - 1
    size = group if weight.shape[-1] % group == 0 else weight.shape[-1]
    grouped = weight.float().unflatten(-1, (-1, size))
    scale = grouped.abs().amax(-1, keepdim=True) / most
    rounded = (grouped / scale.clamp_min(1e-30)).round().clamp(-most, most) * scale
    return rounded.flatten(-2).to(weight.dtype)


def rounded_weights(model: nn.Module, bits: int) -> AbstractContextManager[int]:
    """The model with every linear weight rounded to nearest, while the context lasts; groups run along inputs in any layout."""
    transposed = {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}

    def rounded(name: str, weight: Tensor) -> Tensor:
        return round_to_nearest(weight.mT, bits).mT if name in transposed else round_to_nearest(weight, bits)

    return changed_weights(model, rounded)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the linear modules inside the decoder; the unembedding is left as inference libraries leave it."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if is_linear(module) and module is not output
    }


@contextmanager
def changed_weights(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Iterator[int]:
    """Replace every linear weight by ``change(name, weight)`` while the context lasts; yields how many changed.

    Raises:
        EditError: A weight is not what it was afterwards.
    """
    weights = linear_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    changed = 0
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(change(name, before[name]))
                changed += not torch.equal(weight, before[name])
        yield changed
    finally:
        restore(weights, before)


@torch.no_grad()
def restore(weights: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Put weights back, and check that each is what it was."""
    for name, weight in weights.items():
        weight.copy_(before[name])
        if not torch.equal(weight, before[name]):
            raise EditError(f"{name} is not what it was before the attack; load the model again")
