"""Products of one input with frozen weights, each with low-rank updates, in few operations.

Query, key and value read the same positions, and so do the two halves of a gated layer: what these read is lowered in one
product for all of them, and the gradients of what they read are summed as they are computed. Products are in the type of
the input; parameters and their gradients may be wider.

Source: LoRA (Hu et al. 2021), equation 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..numerics.cpu_products import faster_in_float32
from ..numerics.wide import as_given, autocasts


@dataclass(frozen=True)
class Updated:
    """A frozen weight with an update for each piece of the positions, such as an attacker's."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None
    downs: Sequence[Float[Tensor, "r d_in"]]
    ups: Sequence[Float[Tensor, "d_out r"]]
    scale: float
    counts: Sequence[int] | None = None
    """Positions of each piece, in their order; None where there is one piece."""


def products(x: Float[Tensor, "*n d_in"], parts: Sequence[Updated]) -> list[Float[Tensor, "*n _"]]:
    """``x (weight + scale up down)^T + bias`` of each part, in the type of x.

    The weights get no gradient; x and the factors of the updates do. On a processor autocast changes nothing.

    Args:
        parts: With one scale, and with the same pieces.

    Example:
        >>> query, key = products(x, [Updated(wq, None, [a], [b], 2.0), Updated(wk, None, [c], [d], 2.0)])  # doctest: +SKIP
    """
    first = parts[0]
    kind, counts = _type_of_products(first.weight, x), first.counts or [x.numel() // x.shape[-1]]
    exact = kind == torch.float32 == first.weight.dtype and len(counts) == 1
    how = _How(kind, exact and all(sums_pay(part.weight, x) for part in parts), first.scale, counts)
    downs = [down for part in parts for down in part.downs]
    ups = [up for part in parts for up in part.ups]
    frozen = (*(part.weight for part in parts), *(part.bias for part in parts))
    with as_given(x.device):
        return list(_Products.apply(x, how, *frozen, *downs, *ups))


def sums_pay(weight: Tensor, x: Tensor) -> bool:
    """Whether frozen weight and update are better summed before the product, which a processor does in fp32 alone: it
    costs what the weight's size is, and saves what the positions' is."""
    d_out, d_in = weight.shape
    return x.device.type == "cpu" and x.numel() // d_in * (d_in + d_out) >= 2 * d_in * d_out


def _type_of_products(weight: Tensor, x: Tensor) -> torch.dtype:
    if x.device.type == "cpu":
        return torch.float32 if faster_in_float32(weight, x.numel() // x.shape[-1]) else x.dtype
    on = autocasts(x.device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


@dataclass(frozen=True)
class _How:
    kind: torch.dtype
    """What products are computed in."""
    sums: bool
    """Whether weight and update are summed first."""
    scale: float
    counts: Sequence[int]
    """Positions of each piece."""

    def pieces(self, positions: Tensor) -> Sequence[Tensor]:
        """Positions [n, ...] of each piece."""
        return (positions,) if len(self.counts) == 1 else positions.split(list(self.counts))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: _How, *given: Any) -> tuple[Tensor, ...]:
        count = len(how.counts)
        parts = len(given) // (2 + 2 * count)
        weights, biases, downs, ups = _divided(given, parts, parts, parts * count, parts * count)
        ctx.how, ctx.ranks, ctx.trained_in = how, [len(down) for down in downs[::count]], downs[0].dtype
        # Of each piece those of all parts, below each other.
        downs = [torch.cat(downs[turn::count]).mul_(how.scale).to(how.kind) for turn in range(count)]
        ups = [up.to(how.kind) for up in ups]
        flat = x.reshape(-1, x.shape[-1]).to(how.kind)
        # Here and below a narrow factor stands on the left: processors multiply in that order up to four times faster.
        lowered = [] if how.sums else [down @ some.mT for down, some in zip(downs, how.pieces(flat), strict=True)]
        by_part = [low.split(ctx.ranks) for low in lowered]
        outputs = []
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            up = ups[number * count :][:count]
            whole = _whole(weight, up, downs, number, ctx)
            out = nn.functional.linear(flat, whole, None if bias is None else bias.to(how.kind))
            for some, low, one in zip(how.pieces(out), by_part, up, strict=not how.sums):
                some.addmm_(low[number].mT, one.mT)
            outputs.append(out.to(x.dtype).view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, *weights, *downs, *ups, *lowered)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        with as_given(gradients[0].device):
            return _Products.gradients(ctx, gradients)

    @staticmethod
    def gradients(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
        """Of x and of all factors."""
        how, parts, count = ctx.how, len(gradients), len(ctx.how.counts)
        x, *saved = ctx.saved_tensors
        weights, downs, ups, lowered = _divided(saved, parts, count, parts * count, len(saved))
        flat = x.reshape(-1, x.shape[-1]).to(how.kind)
        lowered = lowered or [down @ flat.mT for down in downs]
        of_lowered, of_ups, below = [torch.empty_like(low) for low in lowered], [], None
        reads, goes = ([low.split(ctx.ranks) for low in some] for some in (lowered, of_lowered))
        for number, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            above, up = gradient.reshape(-1, gradient.shape[-1]).to(how.kind), ups[number * count :][:count]
            for some, one, read, goes_to in zip(how.pieces(above), up, reads, goes, strict=True):
                torch.mm(one.mT, some.mT, out=goes_to[number])
                of_ups.append((read[number] @ some).mT.contiguous().to(ctx.trained_in))
            if ctx.needs_input_grad[0]:
                whole = _whole(weight, up, downs, number, ctx)
                # The gradients of what several parts read are summed where they are computed.
                below = above @ whole if below is None else below.addmm_(above, whole)
        if below is not None and not how.sums:
            for some, low, down in zip(how.pieces(below), of_lowered, downs, strict=True):
                some.addmm_(low.mT, down)
        of_x = None if below is None else below.to(x.dtype).view(x.shape)
        of_downs = [(low @ some).mul_(how.scale) for low, some in zip(of_lowered, how.pieces(flat), strict=True)]
        # Copies: a gradient has its memory for itself.
        by_piece = [[one.to(ctx.trained_in, copy=True) for one in down.split(ctx.ranks)] for down in of_downs]
        by_part = [down for some in zip(*by_piece, strict=True) for down in some]
        return of_x, None, *[None] * 2 * parts, *by_part, *of_ups


def _whole(weight: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor], number: int, ctx: Any) -> Tensor:
    """A frozen weight in the type of products, and with its update where they are summed."""
    if not ctx.how.sums:
        return weight.to(ctx.how.kind)
    return torch.addmm(weight, ups[0], downs[0].split(ctx.ranks)[number])


def _divided(values: Sequence[Any], *sizes: int) -> Iterator[list[Any]]:
    """The first so many, then the next."""
    start = 0
    for size in sizes:
        yield list(values[start : start + size])
        start += size
