"""Attention of a bfloat16 model on a processor, as matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PRODUCTS = "excise_products"
"""What the implementation is called in a model's configuration, in memory only."""

BLOCK = 4 << 20
"""Bytes of float32 scores that are held at a time, so that they stay in the processor's cache."""

_everywhere = ContextVar("everywhere", default=False)
Piece = tuple[slice, slice, slice]
"""Some rows, heads of keys and values, and queries."""


def attend_by_products(model: Any) -> None:
    """Let a bfloat16 model compute attention by matrix products wherever a gradient goes through it.

    On processors the fused kernel is slower, backward too (``benchmarks/attention.py``). Elsewhere nothing changes, bit for
    bit, except inside ``products_everywhere``. A model whose attention is not transformers' fused one is left alone.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return

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
        if attention_mask is None and causal and query.shape[2] > 1:
            attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        output = attention(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return output.transpose(1, 2), None

    AttentionInterface.register(PRODUCTS, attend)
    AttentionMaskInterface.register(PRODUCTS, sdpa_mask)
    model.set_attn_implementation(PRODUCTS)


@contextmanager
def products_everywhere() -> Iterator[None]:
    """Models that attend by products do so without a gradient, too."""
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
    """Softmax attention whose heads share keys and values in groups; softmax in float32, products in the inputs' dtype.

    Args:
        mask: [batch or 1, 1, queries, keys]: where to look if boolean, else what is added to the scores.
        block: Bytes of scores held at a time, about.

    Source:
        Dao et al. (2022), "FlashAttention", algorithms 2 and 4: probabilities are not kept but formed again backward.
    """
    if mask is not None and mask.dtype == torch.bool:
        # A query that may look nowhere, as padding, looks everywhere alike and stays finite.
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    output: Tensor = _Attention.apply(query, key, value, mask, scale, block)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, block: int
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        # As the projection that follows wants it.
        output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        for piece in _pieces(query, key, block):
            p = _probabilities(query, key, mask, scale, piece)
            _of(output, key, piece).copy_(
                (p.to(value.dtype) @ _flat(value[piece[:2]])).view_as(_of(output, key, piece))
            )
        ctx.save_for_backward(query, key, value, mask, output)
        ctx.scale, ctx.block = scale, block
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        for piece in _pieces(query, key, ctx.block):
            p = _probabilities(query, key, mask, ctx.scale, piece)
            rows, keys, values = (_flat(x) for x in (_of(query, key, piece), key[piece[:2]], value[piece[:2]]))
            out, down = (_flat(_of(tensor, key, piece)) for tensor in (output, gradient))
            of_value[piece[:2]] += (p.to(value.dtype).mT @ down).view_as(value[piece[:2]])
            # d softmax: p * (dp - sum(p * dp)), and the sum is that of the output times its gradient.
            change = (down @ values.mT).float().sub_((down.float() * out.float()).sum(-1, keepdim=True))
            change = change.mul_(p).mul_(ctx.scale).to(query.dtype)
            _of(of_query, key, piece).copy_((change @ keys).view_as(_of(query, key, piece)))
            of_key[piece[:2]] += (change.mT @ rows).view_as(key[piece[:2]])
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _pieces(query: Tensor, key: Tensor, block: int) -> Iterator[Piece]:
    """All rows, heads and queries, so many at once that their scores take no more than ``block`` bytes, about."""
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    of_query = 4 * heads // groups * keys
    some = max(1, min(queries, block // of_query))
    of_group = max(1, min(groups, block // (of_query * some)))
    rows = max(1, block // (of_query * some * groups))
    for row in range(0, batch, rows):
        for group in range(0, groups, of_group):
            for start in range(0, queries, some):
                yield slice(row, row + rows), slice(group, group + of_group), slice(start, start + some)


def _of(tensor: Tensor, key: Tensor, piece: Piece) -> Float[Tensor, "rows groups heads queries d"]:
    """A piece of a query, or of what has its shape."""
    rows, groups, queries = piece
    return tensor.unflatten(1, (key.shape[1], -1))[rows, groups, :, queries]


def _flat(tensor: Tensor) -> Float[Tensor, "n length d"]:
    """Rows and groups as one dimension; heads that share keys and their queries as another."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1, tensor.shape[-1])


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, piece: Piece) -> Tensor:
    """Where each query of a piece looks [rows * groups, heads * queries, keys], in float32."""
    rows, groups, queries = piece
    of_piece = _of(query, key, piece)
    scores = (_flat(of_piece) @ _flat(key[rows, groups]).mT).float().mul_(scale)
    if bias is not None:
        scores.view(*of_piece.shape[:-1], -1).add_(
            bias[rows if len(bias) > 1 else slice(None), :, queries].unsqueeze(1)
        )
    return scores.softmax(-1)
