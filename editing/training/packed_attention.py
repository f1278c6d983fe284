"""Attention over a packed row, which alone takes its sequences apart.

On a processor all of it is one function with its own backward pass: heads are gathered where products read them, and
probabilities are kept while they are small. Elsewhere the attention that the model would use reads the blocks.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..numerics.cpu_attention import added, attended, attended_back
from ..numerics.wide import wide

PACKED = "excise_packed_"
"""Begins the names under which attention over packed rows is known; what follows is the attention that it rests on."""


@dataclass(frozen=True)
class Block:
    """Sequences that attention reads below each other."""

    length: int
    """Tokens of the longest."""
    taken: Tensor
    """Place in the row of every position of the block [sequences * length]; padding repeats a sequence's last."""


@dataclass(frozen=True)
class Layout:
    """How a row is taken apart."""

    blocks: tuple[Block, ...]
    real: Tensor
    """Of each position of the row its place among the blocks' positions, one block after another [n]."""
    again: Tensor
    """Places there that repeat a position of the row, because sequences share it, and these positions [2, repeats]."""
    _by_heads: dict[int, "_ByHead"] = field(default_factory=dict)
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def by_head(self, heads: int) -> "_ByHead":
        """The same for single heads; found once for all layers."""
        if heads not in self._by_heads:
            self._by_heads[heads] = _by_head(self, heads)
        return self._by_heads[heads]

    def causal(self, length: int) -> Tensor:
        """What is added to scores so that no position looks ahead."""
        if length not in self._masks:
            self._masks[length] = added(torch.ones(1, 1, length, length, dtype=torch.bool).tril())
        return self._masks[length]


layout_now: ContextVar[Layout | None] = ContextVar("layout_now", default=None)
"""Of the row that is being read."""


def register(usual: str) -> None:
    """Make attention over packed rows known to transformers, resting on one that it knows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[usual]
    make_mask: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[usual]

    def attend_apart(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
    ) -> tuple[Tensor, None]:
        layout = layout_now.get()
        if layout is None:
            return attend(module, query, key, value, attention_mask, **how)
        if _is_plain(module, query, attention_mask, how):
            scale = query.shape[-1] ** -0.5 if how.get("scaling") is None else how["scaling"]
            return _InBlocks.apply(query, key, value, layout, attention_mask, scale), None
        outputs = []
        for block, *states in zip(layout.blocks, *(_Apart.apply(x, layout) for x in (query, key, value)), strict=True):
            mask = None if attention_mask is None else attention_mask[..., : block.length, : block.length]
            outputs.append(attend(module, *states, mask, **how)[0])
        return _Joined.apply(layout, *outputs), None

    def mask_apart(*args: Any, **how: Any) -> Any:
        layout = layout_now.get()
        if layout is None:
            return make_mask(*args, **how)
        # Padding comes last, and no position looks ahead: one mask suits all sequences, and mostly none is needed.
        longest = max(block.length for block in layout.blocks)
        kept = {name: how[name] for name in ("mask_function", "local_size", "device", "dtype", "config") if name in how}
        return sdpa_mask(batch_size=1, q_length=longest, kv_length=longest, **kept)

    AttentionInterface.register(PACKED + usual, attend_apart)
    AttentionMaskInterface.register(PACKED + usual, mask_apart)


def _is_plain(module: nn.Module, query: Tensor, mask: Tensor | None, how: dict[str, Any]) -> bool:
    """Whether it is softmax attention on a processor, with one mask for all heads."""
    causal = getattr(module, "is_causal", True) if how.get("is_causal") is None else how["is_causal"]
    masked = causal if mask is None else mask.shape[1] == 1
    return query.device.type == "cpu" and masked and not how.get("dropout") and how.get("position_bias") is None


@dataclass(frozen=True)
class _ByHead:
    """Places of heads: of a row's [n, heads], and of the blocks' [sequences, heads, length], each counted through."""

    taken: list[Tensor]
    """Of each block the places in the row of what it reads."""
    owned: list[Tensor]
    """The same, where what nobody reads of the block (padding, and what another sequence has) is beyond the row's end."""
    real: Tensor
    """Of each place in the row its place among the blocks'."""
    again: Tensor
    """Places among the blocks' that repeat one in the row, and these."""


def _by_head(layout: Layout, heads: int) -> _ByHead:
    n, each = len(layout.real), torch.arange(heads)
    owners = torch.full((sum(len(block.taken) for block in layout.blocks),), n)
    owners[layout.real] = torch.arange(n)
    taken, owned, places, start = [], [], [], 0
    for block in layout.blocks:
        shape, end = (-1, 1, block.length), start + len(block.taken)
        taken.append((block.taken.view(shape) * heads + each[:, None]).flatten())
        owned.append((owners[start:end].view(shape) * heads + each[:, None]).flatten())
        # Of [sequences, length, heads], where it lies in [sequences, heads, length].
        lies = torch.arange(start * heads, end * heads).view(-1, heads, block.length).transpose(1, 2)
        places.append(lies.reshape(-1, heads))
        start = end
    place = torch.cat(places)
    repeated, position = layout.again
    again = torch.stack((place[repeated].flatten(), (position[:, None] * heads + each).flatten()))
    return _ByHead(taken, owned, place[layout.real].flatten(), again)


class _InBlocks(torch.autograd.Function):
    """Softmax attention within each sequence: queries [1, heads, n, d], keys and values [1, groups, n, d] to
    [1, n, heads, d]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, mask: Tensor | None, scale: float
    ) -> Tensor:
        ctx.layout, ctx.scale, ctx.masks = layout, scale, [_mask_of(layout, block, mask) for block in layout.blocks]
        keep, kept, ctx.counts, outputs = any(ctx.needs_input_grad[:3]), [], [], []
        rows = [_rows(states) for states in (query, key, value)]
        heads, width = query.shape[1], value.shape[-1]
        for number, bias in enumerate(ctx.masks):
            queries, keys, values = (_block(one, layout, number) for one in rows)
            output = query.new_empty(*queries.shape[:3], width)
            some = attended(queries, keys, values, bias, scale, output, keep=keep)
            kept += some
            ctx.counts.append(len(some))
            outputs.append(output.view(-1, width))
        out = _below(outputs).index_select(0, layout.by_head(heads).real).view(1, -1, heads, width)
        ctx.save_for_backward(*rows, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *kept = ctx.saved_tensors
        rows = (query, key, value)
        layout, (n, heads, width) = ctx.layout, out.shape[1:]
        owned = layout.by_head(heads).owned
        # Where nobody reads there is no gradient: beyond the row's end stand zeros.
        above = torch.cat((gradient.reshape(-1, width), gradient.new_zeros(heads, width)))
        along = (wide(gradient) * wide(out)).sum(-1).view(-1, 1)
        along = torch.cat((along, along.new_zeros(heads, 1)))
        found: list[list[Tensor]] = [[], [], []]
        for number, bias in enumerate(ctx.masks):
            queries, keys, values = (_block(one, layout, number) for one in rows)
            p, kept = kept[: ctx.counts[number]], kept[ctx.counts[number] :]
            down, sums = (one.index_select(0, owned[number]).view(*queries.shape[:3], -1) for one in (above, along))
            gradients = attended_back(queries, keys, values, bias, p, down, sums, ctx.scale)
            for some, one in zip(found, gradients, strict=True):
                some.append(one.view(-1, one.shape[-1]))
        states = [_gathered(_below(some), layout, rows[number].shape[1]) for number, some in enumerate(found)]
        of_states = [one.view(1, n, -1, one.shape[-1]).transpose(1, 2).to(gradient.dtype) for one in states]
        return *of_states, None, None, None


def _rows(states: Tensor) -> Tensor:
    """[1, heads, n, d] to [n, heads, d]."""
    return states.transpose(1, 2).reshape(states.shape[2], states.shape[1], -1)


def _block(rows: Tensor, layout: Layout, number: int) -> Tensor:
    """What a block reads of [n, heads, d]: [sequences, heads, length, d]."""
    _, heads, width = rows.shape
    taken = layout.by_head(heads).taken[number]
    return rows.reshape(-1, width).index_select(0, taken).view(-1, heads, layout.blocks[number].length, width)


def _gathered(blocks: Tensor, layout: Layout, heads: int) -> Tensor:
    """Gradients of all blocks' heads to those of the row's [n * heads, d]; what several sequences read gets their sum."""
    places = layout.by_head(heads)
    rows = blocks.index_select(0, places.real)
    if places.again.numel():
        rows.index_add_(0, places.again[1], blocks.index_select(0, places.again[0]))
    return rows


def _mask_of(layout: Layout, block: Block, mask: Tensor | None) -> Tensor:
    return layout.causal(block.length) if mask is None else added(mask[..., : block.length, : block.length])


class _Apart(torch.autograd.Function):
    """[1, heads, n, d] to each block's [sequences, heads, length, d]; what padding repeats gets no gradient from there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        _, heads, n, width = states.shape
        ctx.real, ctx.again = layout.real.to(states.device), layout.again.to(states.device)
        flat = states.transpose(1, 2).reshape(n, -1)
        return tuple(
            flat.index_select(0, block.taken.to(states.device)).view(-1, block.length, heads, width).transpose(1, 2)
            for block in layout.blocks
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads, width = gradients[0].shape[1], gradients[0].shape[3]
        flat = _below([gradient.transpose(1, 2).reshape(-1, heads * width) for gradient in gradients])
        # That of padding is 0: no query looks at a padded key, and what a padded query finds is left out.
        whole = flat.index_select(0, ctx.real)
        places, positions = ctx.again
        if len(places):
            _add_rows(whole, positions, flat.index_select(0, places))
        return whole.view(1, -1, heads, width).transpose(1, 2), None


class _Joined(torch.autograd.Function):
    """Each block's [sequences, length, heads, d] to [1, n, heads, d], without padding."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *outputs: Tensor) -> Tensor:
        ctx.real, ctx.shapes = layout.real.to(outputs[0].device), [output.shape for output in outputs]
        heads, width = outputs[0].shape[2:]
        flat = _below([output.reshape(-1, heads * width) for output in outputs])
        return flat.index_select(0, ctx.real).view(1, -1, heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        heads, width = gradient.shape[2:]
        sizes = [shape[0] * shape[1] for shape in ctx.shapes]
        whole = gradient.new_zeros(sum(sizes), heads * width)
        whole.index_copy_(0, ctx.real, gradient.reshape(-1, heads * width))
        return None, *(part.view(shape) for part, shape in zip(whole.split(sizes), ctx.shapes, strict=True))


def _add_rows(whole: Tensor, positions: Tensor, more: Tensor) -> None:
    """Add rows to those at some positions, in an order that does not change from run to run."""
    if whole.device.type == "cpu":
        whole.index_add_(0, positions, more)
    else:
        # On GPUs the former adds in whatever order its threads arrive.
        whole.index_put_((positions,), more, accumulate=True)


def _below(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts below each other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
