"""Attention on CPUs, computed as matrix products: of bfloat16 models, and of packed rows, where torch's fused kernel is
slower."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .wide import wide

PRODUCTS = "excise_products"
"""Name of this implementation in a model's config (in memory only)."""

BLOCK = 4 << 20
"""Bytes of float32 scores computed at a time, so that they stay in the CPU's cache."""

_everywhere = ContextVar("everywhere", default=False)
Piece = tuple[slice, slice, slice]
"""A part of the work: slices of the batch, of the key-value heads (groups), and of the queries."""


def attend_by_products(model: Any) -> None:
    """Make a bfloat16 model compute attention by matrix products in forwards that have a gradient.

    On CPUs the fused kernel is slower, forward and backward (``benchmarks/attention.py``). Forwards without a gradient
    stay the same bit for bit, except inside ``products_everywhere``. A model that does not use transformers' fused
    attention is not changed.
    """
    if model.config._attn_implementation != "sdpa":
        return
    make_products_known()
    model.set_attn_implementation(PRODUCTS)


def make_products_known() -> None:
    """Let transformers know this attention by its name, which a model that came from another process has already."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        wanted = trained or _everywhere.get()
        shared_mask = attention_mask is None or attention_mask.shape[1] == 1
        # ``attention`` has no dropout, no position bias and one mask for all heads; other calls stay with transformers.
        if not wanted or dropout or not shared_mask or rest.get("position_bias") is not None:
            output, _ = sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **rest,
            )
            return output, None
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # Where a flag of the fused kernel does the masking, transformers makes no causal mask.
        if attention_mask is None and causal and query.shape[2] > 1:
            attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        output = attention(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return output.transpose(1, 2), None

    AttentionInterface.register(PRODUCTS, attend)
    AttentionMaskInterface.register(PRODUCTS, sdpa_mask)


@contextmanager
def products_everywhere() -> Iterator[None]:
    """Use matrix products also in forwards without a gradient, while the context lasts."""
    before = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(before)


def attention(
    query: Float[Tensor, "batch heads queries d"],
    key: Float[Tensor, "batch groups keys d"],
    value: Float[Tensor, "batch groups keys d_value"],
    mask: Tensor | None,
    scale: float,
    block: int = BLOCK,
) -> Float[Tensor, "batch heads queries d_value"]:
    """Softmax attention with grouped heads; the softmax is float32, products are in the inputs' dtype.

    Args:
        query: Queries; each group of ``heads / groups`` heads shares one head of keys and values.
        key: Keys.
        value: Values.
        mask: [batch or 1, 1, queries, keys]: True where a query may attend if boolean, else a term added to the scores.
        scale: Factor of the scores, usually d ** -0.5.
        block: Approximate bytes of scores computed at a time.

    Source:
        Dao et al. 2022, "FlashAttention", algorithms 2 and 4: the backward pass computes probabilities again, unless
        they are small.
    """
    output: Tensor = _Attention.apply(query, key, value, None if mask is None else added(mask), scale, block)
    return output


def added(mask: Tensor) -> Tensor:
    """A mask as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    # With the smallest float instead of -inf, a fully masked query (padding) attends evenly and stays finite.
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, block: int
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        # This memory layout lets the output projection, which follows, read it without a copy.
        output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        kept = attended(query, key, value, mask, scale, output, block, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(query, key, value, mask, output, *kept)
        ctx.scale, ctx.block = scale, block
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, *kept = ctx.saved_tensors
        along = (gradient.float() * output.float()).sum(-1, keepdim=True)
        found = attended_back(query, key, value, mask, kept, gradient, along, ctx.scale, ctx.block)
        of_query, of_key, of_value = (one.to(query.dtype) for one in found)
        return of_query, of_key, of_value, None, None, None


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    output: Tensor,
    block: int = BLOCK,
    *,
    keep: bool,
) -> list[Tensor]:
    """Fill ``output`` with what ``attention`` computes of a mask that is added.

    Returns:
        The probabilities of each piece of the work, if they are to be kept and take no more memory than a few hidden
        states; else nothing.
    """
    keep, kept = keep and key.shape[2] <= KEPT * query.shape[-1], []
    for piece in _pieces(query, key, block):
        p = _probabilities(query, key, mask, scale, piece).to(value.dtype)
        _of(output, key, piece).copy_((p @ _flat(value[piece[:2]])).view_as(_of(output, key, piece)))
        if keep:
            kept.append(p)
    return kept


def attended_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kept: Sequence[Tensor],
    gradient: Tensor,
    along: Float[Tensor, "batch heads queries 1"],
    scale: float,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, and in float32 of keys and values; what ``attended`` did not keep is computed again.

    Args:
        along: Of each query the sum of gradient times output.
    """
    of_query = torch.empty_like(query)
    # Pieces of different queries add to the same keys and values; in bfloat16 the sum would lose small addends.
    of_key, of_value = (torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (key, value))
    for number, piece in enumerate(_pieces(query, key, block)):
        p = kept[number] if kept else _probabilities(query, key, mask, scale, piece).to(value.dtype)
        rows, keys, values = (_flat(x) for x in (_of(query, key, piece), key[piece[:2]], value[piece[:2]]))
        down = _flat(_of(gradient, key, piece))
        # Softmax gradient: p * (dp - sum(p * dp)). The sum equals sum(output * gradient), which needs no p.
        change = wide(down @ values.mT).sub_(_flat(_of(along, key, piece))).mul_(wide(p)).to(query.dtype)
        # Scaled here, where there is least of it.
        _of(of_query, key, piece).copy_((change @ keys).mul_(scale).view_as(_of(query, key, piece)))
        _put(of_key[piece[:2]], (change.mT @ rows).mul_(scale), first=piece[2].start == 0)
        _put(of_value[piece[:2]], p.mT @ down, first=piece[2].start == 0)
    return of_query, of_key, of_value


KEPT = 4
"""Keys for each number of a head's query, at most, up to which probabilities are kept for the backward pass: they take as
much memory as so many hidden states."""


def _put(place: Tensor, values: Tensor, *, first: bool) -> None:
    """Put what the first piece of queries gives, and add what the others do."""
    (place.copy_ if first else place.add_)(values.view_as(place))


def _pieces(query: Tensor, key: Tensor, block: int) -> Iterator[Piece]:
    """Divide batch, groups and queries into pieces whose scores take about ``block`` bytes at most."""
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    of_query = 4 * heads // groups * keys
    queries_at_once = max(1, min(queries, block // of_query))
    of_group = max(1, min(groups, block // (of_query * queries_at_once)))
    rows = max(1, block // (of_query * queries_at_once * groups))
    for row in range(0, batch, rows):
        for group in range(0, groups, of_group):
            for start in range(0, queries, queries_at_once):
                yield slice(row, row + rows), slice(group, group + of_group), slice(start, start + queries_at_once)


def _of(tensor: Tensor, key: Tensor, piece: Piece) -> Float[Tensor, "rows groups heads queries d"]:
    """A piece of a tensor with the shape of the query."""
    rows, groups, queries = piece
    return tensor.unflatten(1, (key.shape[1], -1))[rows, groups, :, queries]


def _flat(tensor: Tensor) -> Float[Tensor, "n length d"]:
    """Merge batch and groups into one dimension, and the heads of a group with their queries into another."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1, tensor.shape[-1])


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, piece: Piece) -> Tensor:
    """Attention probabilities of a piece [rows * groups, heads * queries, keys], in float32."""
    rows, groups, queries = piece
    of_piece = _of(query, key, piece)
    scores = wide(_flat(of_piece) @ _flat(key[rows, groups]).mT).mul_(scale)
    if bias is not None:
        scores.view(*of_piece.shape[:-1], -1).add_(
            bias[rows if len(bias) > 1 else slice(None), :, queries].unsqueeze(1)
        )
    return scores.softmax(-1)
