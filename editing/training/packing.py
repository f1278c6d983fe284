"""Several sequences read as one row, without padding: each attends to itself alone, and its positions begin at 0.

All that a model does position by position it does on the row as it stands. Attention alone takes the sequences apart
again: those of like length stand below each other, padded to the longest of them, so that its cost is that of short
sequences and not of one long one. Tokens with which several sequences begin stand in the row once: nothing before them
differs, so neither does what is computed of them. What is computed is what padded rows give, up to rounding.

Example:
    >>> with packing(model) as can:
    ...     hidden = read_packed(model, packed([(5, 6), (7, 8, 9)])) if can else None  # [5, d]
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..modules import causal_model, final_hidden
from ..numerics.cpu_attention import PRODUCTS

PACKED = "excise_packed_"
"""Begins the names under which attention over packed rows is known; what follows is the attention that it rests on."""
RESTS_ON = ("sdpa", PRODUCTS)
BLOCK = 1 << 16
"""What one more block of sequences costs in attention, in scores of padding that it must save."""
MOST_BLOCKS = 4
CLOSE, CLOSE_IN_16_BITS = 1e-4, 0.03
"""How far a packed row's states may lie from those of its sequences alone, relative to their mean norm."""


@dataclass(frozen=True)
class Block:
    """Sequences that attention reads below each other."""

    length: int
    """Tokens of the longest."""
    taken: Tensor
    """Place in the row of every position of the block [sequences * length]; padding repeats a sequence's last."""


@dataclass(frozen=True)
class _Layout:
    """How a row is taken apart."""

    blocks: tuple[Block, ...]
    real: Tensor
    """Of each position of the row its place among the blocks' positions, one block after another [n]."""
    again: Tensor
    """Places there that repeat a position of the row, because sequences share it, and these positions [2, repeats]."""


_layout: ContextVar[_Layout | None] = ContextVar("_layout", default=None)


def packed(rows: Sequence[Sequence[int]], owners: Sequence[int] | None = None) -> dict[str, Any]:
    """Inputs of one row that holds all sequences in this order: ids, positions, and the blocks that attention reads.

    ``where`` holds of each token of all sequences, one after another, its place in the row; ``owned`` how many tokens
    each owner has there.

    Args:
        rows: Token ids.
        owners: Of each sequence a number, such as its attacker's; those of different owners share no tokens.

    Example:
        >>> inputs = packed([(5, 6, 7), (5, 6, 8)])
        >>> inputs["input_ids"].tolist(), inputs["where"].tolist()
        ([[5, 6, 7, 8]], [0, 1, 2, 0, 1, 3])
    """
    row = _shared(rows, owners or [0] * len(rows))
    # Sequences of like length stand in one block, wherever they stand in the row.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    blocks, first, before = [], 0, 0
    real: dict[int, int] = {}
    again: list[tuple[int, int]] = []
    for count in _block_sizes([len(rows[number]) for number in order]):
        numbers = order[first : first + count]
        longest = max(len(rows[number]) for number in numbers)
        taken: list[int] = []
        for number in numbers:
            places = row.places[number]
            for turn, place in enumerate(places, before + len(taken)):
                if real.setdefault(place, turn) != turn:
                    again.append((turn, place))
            taken += places + places[-1:] * (longest - len(places))
        blocks.append({"length": longest, "taken": torch.tensor(taken)})
        first, before = first + count, before + len(taken)
    return {
        "input_ids": torch.tensor(row.ids)[None],
        "position_ids": torch.tensor(row.positions)[None],
        "where": torch.tensor([place for places in row.places for place in places]),
        "owned": row.owned,
        "blocks": blocks,
        "real": torch.tensor([real[place] for place in range(len(row.ids))]),
        "again": torch.tensor(again, dtype=torch.long).reshape(-1, 2).mT.contiguous(),
    }


@dataclass(frozen=True)
class _Shared:
    """Tokens of all sequences, without what an earlier one of the same owner begins with."""

    ids: list[int]
    positions: list[int]
    places: list[list[int]]
    """Of each token of each sequence its place among ``ids``."""
    owned: list[int]
    """Tokens of each owner among ``ids``."""


def _shared(rows: Sequence[Sequence[int]], owners: Sequence[int]) -> _Shared:
    ids: list[int] = []
    positions: list[int] = []
    places: list[list[int]] = []
    known: dict[tuple[int, int], int] = {}
    owned = dict.fromkeys(owners, 0)
    for row, owner in zip(rows, owners, strict=True):
        # Places are 0 and more, so that what is below tells the owners' beginnings apart.
        at = -1 - owner
        places.append([])
        for position, token in enumerate(row):
            at = known.setdefault((at, token), len(ids))
            if at == len(ids):
                ids.append(token)
                positions.append(position)
                owned[owner] += 1
            places[-1].append(at)
    return _Shared(ids, positions, places, list(owned.values()))


def _block_sizes(lengths: Sequence[int]) -> list[int]:
    """Sizes of consecutive blocks with the fewest scores, padding among them; lengths come in order."""
    # Sequences of one length stand in one block: to divide them would save no padding.
    counts = [len([*some]) for _, some in groupby(lengths)]
    ends, each = list(accumulate(counts, initial=0)), sorted(set(lengths))
    best: list[tuple[int, list[int]]] = [(0, []), *[(1 << 62, [])] * len(counts)]
    for end in range(1, len(counts) + 1):
        for start in range(end):
            cost, sizes = best[start]
            size = ends[end] - ends[start]
            cost += size * each[end - 1] ** 2 + BLOCK
            if cost < best[end][0] and len(sizes) < MOST_BLOCKS:
                best[end] = cost, [*sizes, size]
    return best[-1][1]


@contextmanager
def packing(model: nn.Module) -> Iterator[bool]:
    """Let a model read packed rows while the context lasts; yields whether it can, which is tried out.

    It can where its attention is transformers' own, over queries, keys and values, and where nothing else mixes
    positions: state-space layers and short convolutions do, and so do positions that are counted in another way.
    """
    inner = causal_model(model)
    usual = getattr(inner.config, "_attn_implementation", None)
    if is_packing(inner):
        yield True
        return
    if usual not in RESTS_ON:
        yield False
        return
    _register(usual)
    inner.set_attn_implementation(PACKED + usual)
    try:
        yield inner.config._attn_implementation == PACKED + usual and agrees(inner)
    finally:
        inner.set_attn_implementation(usual)


def is_packing(model: Any) -> bool:
    """Whether a model reads packed rows now, inside ``packing``."""
    return str(getattr(causal_model(model).config, "_attn_implementation", "")).startswith(PACKED)


@contextmanager
def reading_packed(inputs: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """What a model is given to read a packed row; it is read inside this context.

    Args:
        inputs: Of ``packed``; other keys are left out.
    """
    blocks = tuple(Block(**block) for block in inputs["blocks"])
    token = _layout.set(_Layout(blocks, inputs["real"], inputs["again"]))
    try:
        ids = inputs["input_ids"]
        # With a mask, transformers does not look for where sequences begin, which would wait for the device.
        yield {"input_ids": ids, "position_ids": inputs["position_ids"], "attention_mask": torch.ones_like(ids)}
    finally:
        _layout.reset(token)


def read_packed(model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "n d"]:
    """Hidden states that the unembedding reads at every position of a packed row."""
    with reading_packed(inputs) as row:
        return final_hidden(model, row)[0]


@torch.no_grad()
def agrees(model: Any) -> bool:
    """Whether a model computes the same of packed rows as of each row alone."""
    generator, known = torch.Generator().manual_seed(0), int(model.get_input_embeddings().weight.shape[0])
    rows = [torch.randint(known, (length,), generator=generator).tolist() for length in (3, 5, 9)]
    # With a beginning that two of them share.
    rows[2][:2] = rows[1][:2]
    training = model.training
    model.eval()
    try:
        inputs = on_device(packed(rows), model.device)
        together = read_packed(model, inputs)
        together = together[inputs["where"]]
        alone = [final_hidden(model, {"input_ids": torch.tensor([row], device=model.device)})[0] for row in rows]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        # A decoder that takes no positions, or looks into the mask.
        return False
    finally:
        model.train(training)
    # On the processor: not every device has float64.
    together, wanted = together.cpu().double(), torch.cat(alone).cpu().double()
    # Of all positions' norm: the token that pads may have an embedding of 0.
    far = (together - wanted).norm(dim=-1) / wanted.norm(dim=-1).mean()
    return bool((far < (CLOSE_IN_16_BITS if model.dtype.itemsize == 2 else CLOSE)).all())


def recomputes(model: nn.Module) -> bool:
    """Whether a model computes activations again in its backward pass, where nothing says how its row is packed."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def on_device(value: Any, device: torch.device) -> Any:
    """A batch, or a part of one, with all its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(one, device) for key, one in value.items()}
    return [on_device(one, device) for one in value] if isinstance(value, list) else value


def _register(usual: str) -> None:
    """Make attention over packed rows known to transformers, resting on one that it knows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[usual]
    make_mask: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[usual]

    def attend_apart(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
    ) -> tuple[Tensor, None]:
        layout = _layout.get()
        if layout is None:
            return attend(module, query, key, value, attention_mask, **how)
        outputs = []
        for block, *states in zip(layout.blocks, *(_Apart.apply(x, layout) for x in (query, key, value)), strict=True):
            mask = None if attention_mask is None else attention_mask[..., : block.length, : block.length]
            outputs.append(attend(module, *states, mask, **how)[0])
        return _Joined.apply(layout, *outputs), None

    def mask_apart(*args: Any, **how: Any) -> Any:
        layout = _layout.get()
        if layout is None:
            return make_mask(*args, **how)
        # Padding comes last, and no position looks ahead: one mask suits all sequences, and mostly none is needed.
        longest = max(block.length for block in layout.blocks)
        kept = {name: how[name] for name in ("mask_function", "local_size", "device", "dtype", "config") if name in how}
        return sdpa_mask(batch_size=1, q_length=longest, kv_length=longest, **kept)

    AttentionInterface.register(PACKED + usual, attend_apart)
    AttentionMaskInterface.register(PACKED + usual, mask_apart)


class _Apart(torch.autograd.Function):
    """[1, heads, n, d] to each block's [sequences, heads, length, d]; what padding repeats gets no gradient from there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: _Layout) -> tuple[Tensor, ...]:
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
    def forward(ctx: Any, layout: _Layout, *outputs: Tensor) -> Tensor:
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
