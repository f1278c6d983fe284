"""Fake quantization: weights rounded in place as low-bit inference rounds them, and restored bit for bit afterwards.

Source: round-to-nearest, symmetric, in groups along the input (Dettmers and Zettlemoyer 2023, section 2).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..errors import EditError
from ..modules import is_conv1d, is_linear

GROUP = 64
"""Inputs that share one scale."""


def round_to_nearest(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Round a weight [..., n] to symmetric integers of ``bits`` bits, with one scale per group of inputs.

    Returns the rounded values in the weight's dtype. ``bits=16`` rounds to bfloat16 instead.
    """
    if bits == 16:
        return weight.bfloat16().to(weight.dtype)
    largest = 2 ** (bits - 1) - 1
    # A width that groups do not divide gets one scale per row.
    size = group if weight.shape[-1] % group == 0 else weight.shape[-1]
    grouped = weight.float().unflatten(-1, (-1, size))
    scale = grouped.abs().amax(-1, keepdim=True) / largest
    # A group of zeros has scale 0.
    rounded = (grouped / scale.clamp_min(1e-30)).round().clamp(-largest, largest) * scale
    return rounded.flatten(-2).to(weight.dtype)


def rounded_weights(model: nn.Module, bits: int) -> AbstractContextManager[int]:
    """Round every linear weight of the model to nearest, while the context lasts; yields the number that changed."""
    # Groups run along inputs, which are the first axis in GPT-2's Conv1D.
    transposed = {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}

    def rounded(name: str, weight: Tensor) -> Tensor:
        return round_to_nearest(weight.mT, bits).mT if name in transposed else round_to_nearest(weight, bits)

    return changed_weights(model, rounded)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the decoder's linear modules, by name; not the unembedding, which inference libraries keep."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if is_linear(module) and module is not output
    }


@contextmanager
def changed_weights(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Iterator[int]:
    """Replace every linear weight by ``change(name, weight)`` while the context lasts; yields the number that changed.

    Raises:
        EditError: A weight could not be restored.
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
    """Copy the old values back into the weights, and check that each is equal to them.

    Raises:
        EditError: A weight differs from its old value, for example because it is NaN.
    """
    for name, weight in weights.items():
        weight.copy_(before[name])
        if not torch.equal(weight, before[name]):
            raise EditError(f"{name} could not be restored to its old value; load the model again")
