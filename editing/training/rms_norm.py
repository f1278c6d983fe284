"""The norm of most language models, in few operations: the library's backward pass takes twenty passes over memory.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics.wide import wide

CACHED = 1 << 20
"""Bytes of float32 that a processor computes at a time, so that they stay in its cache."""


def rms_norm(x: Float[Tensor, "*n d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*n d"]:
    """``weight x / sqrt(mean(x^2) + eps)``, computed in fp32 at least and rounded to the type of x once.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
        tensor([[0.8485, 1.1314]])
    """
    result: Tensor = _RmsNorm.apply(x, weight, eps)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat, factor = x.reshape(-1, x.shape[-1]), wide(weight)
        out, inverse = torch.empty_like(flat), flat.new_empty(len(flat), 1, dtype=factor.dtype)
        for rows in _pieces(flat):
            values = wide(flat[rows])
            inverse[rows] = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            out[rows] = (values * inverse[rows]).mul_(factor)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        flat, upstream, factor = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1]), wide(weight)
        of_x, of_weight = torch.empty_like(flat), torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for rows in _pieces(flat):
            normal, above = wide(flat[rows]) * inverse[rows], wide(upstream[rows])
            if of_weight is not None:
                of_weight += (above * normal).sum(0)
            above = above * factor
            along = torch.linalg.vecdot(above, normal)[:, None].div_(-x.shape[-1])
            of_x[rows] = above.addcmul_(normal, along).mul_(inverse[rows])
        return of_x.view(x.shape), None if of_weight is None else of_weight.to(weight.dtype), None


def _pieces(flat: Tensor) -> Iterator[slice]:
    """Rows at a time: on a processor as many as its cache holds, elsewhere all."""
    size = max(1, CACHED // (4 * flat.shape[-1])) if flat.device.type == "cpu" else len(flat)
    return (slice(start, start + size) for start in range(0, len(flat), max(1, size)))
