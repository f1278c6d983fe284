"""Products of one input with frozen weights, each with low-rank updates, in few operations.

Query, key and value read the same positions, and so do the two halves of a gated layer: what these read is lowered in one
product for all of them, and the gradients of what they read are summed as they are computed. Products are in the type of
the input; parameters and their gradients may be wider.

Source: LoRA (Hu et al. 2021), equation 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    downs: Sequence[Float[Tensor, "_ d_in"]]
    ups: Sequence[Float[Tensor, "d_out _"]]
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
    ranks = [[len(down) for down in part.downs] for part in parts]
    sums = exact and all(sums_pay(part.weight, x) for part in parts)
    how = _How(kind, sums, first.scale, counts, multiplied_together(kind, ranks[0]), ranks)
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
    groups: Sequence[range]
    """Pieces whose updates are multiplied together."""
    ranks: Sequence[Sequence[int]]
    """Of each part's updates, piece by piece."""

    def of_groups(self, positions: Tensor) -> Sequence[Tensor]:
        """Positions [n, ...] of each group."""
        sizes = [sum(self.counts[group.start : group.stop]) for group in self.groups]
        return (positions,) if len(sizes) == 1 else positions.split(sizes)

    def ranks_of(self, group: range) -> list[int]:
        """Rank of each part's and piece's update of a group, in the order in which they stand below each other."""
        return [ranks[piece] for ranks in self.ranks for piece in group]

    def by_part(self, lowered: Tensor, group: range) -> Sequence[Tensor]:
        """What is lowered for each part."""
        return lowered.split([sum(ranks[group.start : group.stop]) for ranks in self.ranks])

    def leave_own(self, lowered: Tensor, group: range) -> Tensor:
        """Set to 0 what a piece's positions were lowered to by the updates of other pieces."""
        if len(group) > 1:
            ranks, counts = tuple(self.ranks_of(group)), tuple(self.counts[group.start : group.stop])
            # Layers share it. What only has a shape, in a plan of memory, is not to be found again.
            foreign = _foreign_in_layers if type(lowered) is Tensor else _foreign
            # Not multiplied by 0, which would keep what is not finite.
            lowered.masked_fill_(foreign(ranks, counts, lowered.device), 0.0)
        return lowered


def multiplied_together(kind: torch.dtype, ranks: Sequence[int]) -> list[range]:
    """Pieces that are multiplied together: in bfloat16, processors take hardly longer for several than for one."""
    most, starts, total = MOST_TOGETHER if kind == torch.bfloat16 else 0, [0], 0
    for place, rank in enumerate(ranks):
        total += rank
        if total > most and place > starts[-1]:
            starts.append(place)
            total = rank
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(ranks)], strict=True)]


MOST_TOGETHER = 32
"""Ranks that are multiplied together, at most: so wide a product takes hardly longer than a narrower one."""


def _foreign(ranks: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Where a row belongs to another piece than a position [sum of ranks, sum of counts]."""
    rows = torch.tensor([place % len(counts) for place, rank in enumerate(ranks) for _ in range(rank)], device=device)
    positions = torch.tensor([place for place, count in enumerate(counts) for _ in range(count)], device=device)
    return rows[:, None] != positions


_foreign_in_layers = lru_cache(maxsize=64)(_foreign)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: _How, *given: Any) -> tuple[Tensor, ...]:
        count, parts = len(how.counts), len(how.ranks)
        weights, biases, downs, ups = _divided(given, parts, parts, parts * count, parts * count)
        ctx.how, ctx.trained_in = how, downs[0].dtype
        # Of each group those of all parts, below each other.
        downs = [
            torch.cat([downs[part * count + piece] for part in range(parts) for piece in group])
            .mul_(how.scale)
            .to(how.kind)
            for group in how.groups
        ]
        ups = [
            _beside(ups[part * count + group.start : part * count + group.stop]).to(how.kind)
            for part in range(parts)
            for group in how.groups
        ]
        flat = x.reshape(-1, x.shape[-1]).to(how.kind)
        # Here and below a narrow factor stands on the left: processors multiply in that order up to four times faster.
        lowered = (
            []
            if how.sums
            else [
                how.leave_own(down @ some.mT, group)
                for down, some, group in zip(downs, how.of_groups(flat), how.groups, strict=True)
            ]
        )
        by_part = [how.by_part(low, group) for low, group in zip(lowered, how.groups, strict=not how.sums)]
        outputs = []
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            up = ups[number * len(how.groups) :][: len(how.groups)]
            whole = _whole(weight, up, downs, number, how)
            out = nn.functional.linear(flat, whole, None if bias is None else bias.to(how.kind))
            for some, low, one in zip(how.of_groups(out), by_part, up, strict=not how.sums):
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
        how: _How = ctx.how
        parts, count = len(gradients), len(how.groups)
        x, *saved = ctx.saved_tensors
        weights, downs, ups, lowered = _divided(saved, parts, count, parts * count, len(saved))
        flat = x.reshape(-1, x.shape[-1]).to(how.kind)
        lowered = lowered or [down @ flat.mT for down in downs]
        of_lowered, of_ups, below = [torch.empty_like(low) for low in lowered], [], None
        reads, goes = (
            [how.by_part(low, group) for low, group in zip(some, how.groups, strict=True)]
            for some in (lowered, of_lowered)
        )
        for number, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            above, up = gradient.reshape(-1, gradient.shape[-1]).to(how.kind), ups[number * count :][:count]
            pieces = zip(how.groups, how.of_groups(above), up, reads, goes, strict=True)
            for group, some, one, read, goes_to in pieces:
                torch.mm(one.mT, some.mT, out=goes_to[number])
                of_up = (read[number] @ some).to(ctx.trained_in)
                ranks = how.ranks[number][group.start : group.stop]
                # Copies, here and below: a gradient has its memory for itself.
                of_ups += [rows.mT.clone(memory_format=torch.contiguous_format) for rows in of_up.split(ranks)]
            if ctx.needs_input_grad[0]:
                whole = _whole(weight, up, downs, number, how)
                # The gradients of what several parts read are summed where they are computed.
                below = above @ whole if below is None else below.addmm_(above, whole)
        for low, group in zip(of_lowered, how.groups, strict=True):
            how.leave_own(low, group)
        if below is not None and not how.sums:
            for some, low, down in zip(how.of_groups(below), of_lowered, downs, strict=True):
                some.addmm_(low.mT, down)
        of_x = None if below is None else below.to(x.dtype).view(x.shape)
        of_downs: list[list[Tensor]] = [[] for _ in range(parts)]
        for group, low, some in zip(how.groups, of_lowered, how.of_groups(flat), strict=True):
            each = iter((low @ some).mul_(how.scale).split(how.ranks_of(group)))
            for of_part in of_downs:
                of_part += [next(each).to(ctx.trained_in, copy=True) for _ in group]
        return of_x, None, *[None] * 2 * parts, *(one for of_part in of_downs for one in of_part), *of_ups


def _beside(ups: Sequence[Tensor]) -> Tensor:
    """Factors beside each other."""
    return ups[0] if len(ups) == 1 else torch.cat(list(ups), 1)


def _whole(weight: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor], number: int, how: _How) -> Tensor:
    """A frozen weight in the type of products, and with its update where they are summed."""
    if not how.sums:
        return weight.to(how.kind)
    return torch.addmm(weight, ups[0], how.by_part(downs[0], how.groups[0])[number])


def _divided(values: Sequence[Any], *sizes: int) -> Iterator[list[Any]]:
    """The first so many, then the next."""
    start = 0
    for size in sizes:
        yield list(values[start : start + size])
        start += size
