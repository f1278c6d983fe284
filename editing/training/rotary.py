"""Rotary positions in few operations.

Source: Su et al. 2021, "RoFormer", equation 34, with the halves of a head in place of neighbouring numbers.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics.wide import wide


def rotated(
    x: Float[Tensor, "rows n heads d"], cos: Float[Tensor, "#rows n d"], sin: Float[Tensor, "#rows n d"]
) -> Float[Tensor, "rows n heads d"]:
    """``x cos + (-x2, x1) sin`` where x1 and x2 are the halves of x, computed in fp32 at least.

    Example:
        >>> rotated(torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
        tensor([[[[0., 1.]]]])
    """
    result: Tensor = _Rotated.apply(x, cos[:, :, None], sin[:, :, None])
    return result


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half, cos = x.shape[-1] // 2, wide(cos)
        signed = torch.cat((-wide(sin[..., :half]), wide(sin[..., half:])), -1)
        ctx.save_for_backward(cos, signed)
        values = wide(x)
        return (values * cos).addcmul_(values.roll(half, -1), signed).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, signed = ctx.saved_tensors
        above = wide(gradient)
        # Turned back: what a half got from the other goes there again.
        back = (above * signed).roll(signed.shape[-1] // 2, -1)
        return back.addcmul_(above, cos).to(gradient.dtype), None, None
