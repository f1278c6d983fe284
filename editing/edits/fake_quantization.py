"""Fake quantization: weights rounded in place as low-bit inference rounds them, and restored bit for bit afterwards.

Source: round-to-nearest, symmetric, in groups along the input (Dettmers and Zettlemoyer 2023, section 2).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import architecture_of
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


def rounded_weights(
    model: nn.Module, bits: int, stored: Callable[[str], Tensor | None] | None = None
) -> AbstractContextManager[int]:
    """Round weights to nearest while the context lasts; yields the number of tensors that changed.

    In 16 bits, bfloat16, these are all parameters. In fewer they are linear weights and experts, as low-bit inference
    rounds them; embeddings, norms and biases stay. ``stored`` is that of ``changed_weights``.
    """
    if bits == 16:
        every = dict(model.named_parameters())
        return changed_weights(model, lambda _, weight: round_to_nearest(weight, bits), every, stored)
    # Groups run along inputs, which are the first axis in GPT-2's Conv1D and in some experts.
    transposed = {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}
    experts = expert_weights(model)
    if experts and _experts_are_transposed(model):
        transposed |= experts.keys()

    def rounded(name: str, weight: Tensor) -> Tensor:
        return round_to_nearest(weight.mT, bits).mT if name in transposed else round_to_nearest(weight, bits)

    return changed_weights(model, rounded, linear_weights(model) | experts, stored)


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """Matrices of experts that one parameter holds together [experts, ..., ...], by name; no linear module has them."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}


def _experts_are_transposed(model: nn.Module) -> bool:
    """Whether experts stand as [inputs, outputs], which their shapes cannot tell."""
    config: Any = model.config
    row = architecture_of(config.to_dict())
    together = [writer for writer in row.writers if writer.pattern.endswith(".experts.down_proj")]
    return any(writer.axis == -1 for writer in together)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the decoder's linear modules, by name; not the unembedding, which inference libraries keep."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if is_linear(module) and module is not output
    }


@contextmanager
def changed_weights(
    model: nn.Module,
    change: Callable[[str, Tensor], Tensor],
    weights: Mapping[str, Tensor] | None = None,
    stored: Callable[[str], Tensor | None] | None = None,
) -> Iterator[int]:
    """Replace each weight by ``change(name, weight)`` while the context lasts; yields the number that changed.

    Args:
        weights: Which ones, by name; all linear weights by default.
        stored: Where old values may be read again, such as the model's checkpoint; None for a name that it lacks. A
            weight that is there bit for bit is not copied, so memory holds one old weight at a time. Without it memory
            holds all of them.

    Raises:
        EditError: A weight could not be restored.
    """
    weights = linear_weights(model) if weights is None else weights
    before: dict[str, Tensor] = {}
    bits: dict[str, int] = {}
    changed = 0
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                old = weight.detach().clone()
                if _is_stored(old, stored(name) if stored else None):
                    bits[name] = _bits(old)
                else:
                    before[name] = old
                weight.copy_(change(name, old))
                changed += not torch.equal(weight, old)
        yield changed
    finally:
        restore({name: weights[name] for name in before}, before)
        for name, expected in bits.items():
            assert stored is not None
            restore({name: weights[name]}, {name: _read(stored(name), weights[name])})
            if _bits(weights[name]) != expected:
                raise EditError(f"{name} is no longer what it was on disk; load the model again")


def _is_stored(old: Tensor, on_disk: Tensor | None) -> bool:
    return on_disk is not None and on_disk.shape == old.shape and torch.equal(_read(on_disk, old), old)


def _read(on_disk: Tensor | None, like: Tensor) -> Tensor:
    """A tensor as a checkpoint is loaded: in the dtype and at the place of the weight in memory."""
    assert on_disk is not None
    return on_disk.to(like.device, like.dtype)


@torch.no_grad()
def _bits(weight: Tensor) -> int:
    """A checksum of a weight's bits."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().contiguous().view(whole).sum(dtype=torch.int64))


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
