"""Products of bfloat16 on processors that multiply fp32 faster: operands are widened for one product at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .wide import as_given

FEWEST = 64
"""Positions of a product from which on widening its weight pays."""


def faster_in_float32(weight: Tensor, positions: int) -> bool:
    """Whether a product with this weight takes less time in fp32, conversions included.

    Without matrix units (AMX), AVX512-BF16 takes twice as long as fp32 (``docs/measured.md``). Both add in fp32, in another
    order.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and positions >= FEWEST
        and not torch.cpu._is_amx_tile_supported()
    )


@contextmanager
def widened_products(model: nn.Module) -> Iterator[None]:
    """While this lasts, frozen linear modules make their products in fp32 where that is faster."""
    changed = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for module in changed:
        # On the instance, so that the class and all other models stay what they are.
        vars(module)["forward"] = partial(_forward, module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    trained = torch.is_grad_enabled() and module.weight.requires_grad
    if trained or x.dtype != module.weight.dtype or not faster_in_float32(module.weight, x.numel() // x.shape[-1]):
        return nn.functional.linear(x, module.weight, module.bias)
    with as_given(x.device):
        product: Tensor = _Widened.apply(x, module.weight, module.bias)
    return product


class _Widened(torch.autograd.Function):
    """A product with a frozen weight, in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        with as_given(gradient.device):
            return (gradient.float() @ weight.float()).to(gradient.dtype), None, None
