"""Several sequences read as one row, without padding: each attends to itself alone, and its positions begin at 0.

All that a model does position by position it does on the row as it stands. Attention alone takes the sequences apart
again: those of like length stand below each other, padded to the longest of them, so that its cost is that of short
sequences and not of one long one. Tokens with which several sequences begin stand in the row once: nothing before them
differs, so neither does what is computed of them. What is computed is what padded rows give, up to rounding.

Example:
    >>> with packing(model) as can:
    ...     hidden = read_packed(model, packed([(5, 6), (7, 8, 9)])) if can else None  # [5, d]
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..modules import causal_model, final_hidden
from ..numerics.cpu_attention import PRODUCTS
from .fewer_operations import fewer_operations
from .packed_attention import PACKED, Block, Layout, layout_now, register

RESTS_ON = ("sdpa", PRODUCTS)
BLOCK = 1 << 16
"""What one more block of sequences costs in attention, in scores of padding that it must save."""
MOST_BLOCKS = 4
SHORTEST = 16
"""Keys of a block, at least: of fewer than a vector holds, processors take the softmax number by number, which takes
ten times as long."""
GRAIN = 8
"""Of few shapes, lengths of blocks and tokens of owners are multiples of this."""
in_few_shapes: ContextVar[bool] = ContextVar("in_few_shapes", default=False)
"""Whether rows and blocks that are packed now are filled up to one of few lengths: processors compile a product in 16
bits anew for each shape, which takes as long as several products of a small model."""
CLOSE, CLOSE_IN_16_BITS = 1e-4, 0.03
"""How far a packed row's states may lie from those of its sequences alone, relative to their mean norm."""


def packed(
    rows: Sequence[Sequence[int]],
    owners: Sequence[int] | None = None,
    *,
    ends: Collection[int] | None = None,
    trained: bool = True,
) -> dict[str, Any]:
    """Inputs of one row that holds all sequences in this order: ids, positions, and the blocks that attention reads.

    ``where`` holds of each token of all sequences, one after another, its place in the row; ``owned`` how many tokens
    each owner has there; ``filling`` the places that hold no token of any, where ``in_few_shapes`` says so.

    Args:
        rows: Token ids.
        owners: Of each sequence a number, such as its attacker's; those of different owners share no tokens.
        ends: Owners that end what is multiplied together; by default each does.
        trained: Whether a gradient is taken. Without one a row is hardly filled up: it has a third of the products, and
            is often read again as it is.

    Example:
        >>> inputs = packed([(5, 6, 7), (5, 6, 8)])
        >>> inputs["input_ids"].tolist(), inputs["where"].tolist()
        ([[5, 6, 7, 8]], [0, 1, 2, 0, 1, 3])
    """
    few = in_few_shapes.get()
    owners = owners or [0] * len(rows)
    row = _shared(rows, owners, ends={*owners} if ends is None else ends, few=few, coarse=trained)
    # Sequences of like length stand in one block, wherever they stand in the row.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    blocks, first, before = [], 0, 0
    real: dict[int, int] = {}
    again: list[tuple[int, int]] = []
    # What fills the row up takes what nobody reads of a block: behind the shortest sequence, which comes first.
    unread = len(rows[order[0]])
    for count in _block_sizes([len(rows[number]) for number in order]):
        numbers = order[first : first + count]
        longest = _length(len(rows[numbers[-1]]), few=few)
        if row.filling and longest == unread:
            longest += GRAIN
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
        "real": torch.tensor([real.get(place, unread) for place in range(len(row.ids))]),
        "filling": torch.tensor(row.filling, dtype=torch.long),
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
    filling: list[int]
    """Places among ``ids`` that are of no sequence, behind the tokens of some owners."""


def _shared(
    rows: Sequence[Sequence[int]], owners: Sequence[int], *, ends: Collection[int], few: bool, coarse: bool
) -> _Shared:
    ids: list[int] = []
    positions: list[int] = []
    places: list[list[int]] = []
    known: dict[tuple[int, int], int] = {}
    owned = dict.fromkeys(owners, 0)
    filling: list[int] = []
    for number, (row, owner) in enumerate(zip(rows, owners, strict=True)):
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
        last = number + 1 == len(rows)
        if few and (last or (owners[number + 1] != owner and owner in ends)):
            more = -len(ids) % (_grain(len(ids)) if last and coarse else GRAIN)
            filling += range(len(ids), len(ids) + more)
            owned[owner] += more
            ids, positions = [*ids, *[0] * more], [*positions, *[0] * more]
    return _Shared(ids, positions, places, list(owned.values()), filling)


def _grain(tokens: int) -> int:
    """What the tokens of a row are a multiple of: between a sixteenth and an eighth of them, and at least ``GRAIN``."""
    return int(max(GRAIN, 1 << max(0, tokens.bit_length() - 4)))


def _length(longest: int, *, few: bool) -> int:
    """Keys of a block whose longest sequence has so many tokens."""
    return max(SHORTEST, -(-longest // GRAIN) * GRAIN if few else longest)


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
            cost += size * max(SHORTEST, each[end - 1]) ** 2 + BLOCK
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
    register(usual)
    inner.set_attn_implementation(PACKED + usual)
    few = in_few_shapes.set(inner.device.type == "cpu" and inner.dtype.itemsize == 2)
    try:
        with fewer_operations(model):
            yield inner.config._attn_implementation == PACKED + usual and agrees(inner)
    finally:
        in_few_shapes.reset(few)
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
    token = layout_now.set(Layout(blocks, inputs["real"], inputs["again"]))
    try:
        ids = inputs["input_ids"]
        # With a mask, transformers does not look for where sequences begin, which would wait for the device.
        mask = torch.ones_like(ids)
        if inputs["filling"].numel():
            mask[0, inputs["filling"]] = 0
        yield {"input_ids": ids, "position_ids": inputs["position_ids"], "attention_mask": mask}
    finally:
        layout_now.reset(token)


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
