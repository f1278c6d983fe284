"""Reading many rows that begin alike: what they share is computed once."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...editing.modules import causal_model
from ...editing.numerics.cpu_attention import products_everywhere
from ...editing.training.packing import is_packing, on_device, packed, read_packed
from ...eval.inference.batches import read_in_batches
from ...eval.inference.caches import repeats_cache
from ...eval.inference.likelihood import batch_budget, pad_right
from .tokens import Row

WORTH = 256
"""Tokens that a shared beginning must save before it is read apart: about what one more forward costs."""


READ = 1024
"""Tokens of one forward on a processor, at most: more at once would not be faster, and hold more memory."""


@torch.no_grad()
def final_hidden_states(model: Any, wanted: Mapping[Row, int]) -> Iterator[tuple[Row, Tensor]]:
    """Hidden states that the unembedding reads at the last ``count`` positions of each row [count, d].

    Personas, examples and chat templates stand before many texts; their keys and values are computed once. Inside
    ``packing``, so is all that any rows begin with.
    """
    if is_packing(model):
        yield from _read_as_one(model, wanted)
        return
    rows = list(wanted)
    decoder, device = causal_model(model).base_model, model.device
    groups = group_by_prefix(rows, list(wanted.values())) if repeats_cache(model) else [(0, [*range(len(rows))])]
    for shared, members in groups:
        cache = _read_prefix(decoder, rows[members[0]][:shared], device) if shared else None
        lengths = [len(rows[index]) - shared for index in members]

        def read(
            batch: list[int], cache: DynamicCache | None = cache, shared: int = shared, members: list[int] = members
        ) -> Tensor:
            return _read_rest(decoder, cache, shared, [rows[members[place]][shared:] for place in batch], device)

        for batch, hidden in read_in_batches(lengths, _budget(model), read):
            for row, states in zip([rows[members[place]] for place in batch], hidden, strict=True):
                end = len(row) - shared
                # A copy, because a view would keep the states of the whole batch alive.
                yield row, states[end - wanted[row] : end].clone()


def _budget(model: Any) -> int:
    return 4 * batch_budget(model) if model.device.type == "cuda" else READ


def _read_as_one(model: Any, wanted: Mapping[Row, int]) -> Iterator[tuple[Row, Tensor]]:
    for rows in by_beginning(wanted, _budget(model)):
        lengths = [len(row) for row in rows]

        @products_everywhere()
        def read(batch: list[int], rows: list[Row] = rows) -> list[Tensor]:
            inputs = packed([rows[place] for place in batch])
            states = read_packed(model, on_device(inputs, model.device))
            places = inputs["where"].split([len(rows[place]) for place in batch])
            counts = [wanted[rows[place]] for place in batch]
            return [
                states[one[len(one) - count :].to(states.device)] for one, count in zip(places, counts, strict=True)
            ]

        # All at once, unless memory runs out.
        for batch, hidden in read_in_batches(lengths, len(rows) * max(lengths), read):
            yield from zip([rows[place] for place in batch], hidden, strict=True)


def by_beginning(rows: Iterable[Row], budget: int) -> Iterator[list[Row]]:
    """Rows in parts of so many distinct beginnings, and of twice as many tokens, at most; those that begin alike
    stand side by side.

    Example:
        >>> [*by_beginning([(1, 2, 3), (4, 5), (1, 2, 4)], 4)]
        [[(1, 2, 3), (1, 2, 4)], [(4, 5)]]
    """
    part: list[Row] = []
    distinct = total = 0
    for row in sorted(rows):
        # Sorted, what a row shares with all before it is what it shares with the last.
        new = len(row) - (_common(part[-1], row) if part else 0)
        if part and (distinct + new > budget or total + len(row) > 2 * budget):
            yield part
            part, distinct, total, new = [], 0, 0, len(row)
        part.append(row)
        distinct, total = distinct + new, total + len(row)
    if part:
        yield part


def group_by_prefix(rows: Sequence[Row], counts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Rows in groups that begin alike: how many tokens a group shares, and its members.

    What is shared ends before the last ``count`` positions of each member, whose states are wanted. Rows whose
    beginnings are not worth reading apart form one group that shares nothing.
    """
    alone: list[int] = []
    groups: list[tuple[int, list[int]]] = []
    shared, members = 0, list[int]()

    def close() -> None:
        if shared * (len(members) - 1) >= WORTH:
            groups.append((shared, members))
        else:
            alone.extend(members)

    # Sorted by their tokens, rows that begin alike stand side by side.
    for index in sorted(range(len(rows)), key=lambda i: rows[i]):
        free = len(rows[index]) - counts[index]
        common = min(shared, free, _common(rows[members[-1]], rows[index])) if members else 0
        # A second member says what there is to share; a further one must not cost more than it brings.
        if len(members) == 1:
            common = min(free, len(rows[members[0]]) - counts[members[0]], _common(rows[members[0]], rows[index]))
        if members and common and common * len(members) >= shared * (len(members) - 1):
            shared, members = common, [*members, index]
        else:
            close()
            shared, members = 0, [index]
    close()
    return ([(0, alone)] if alone else []) + groups


def _common(one: Row, other: Row) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


@products_everywhere()
def _read_prefix(decoder: Any, prefix: Row, device: torch.device) -> DynamicCache:
    cache = DynamicCache(config=decoder.config)
    decoder(input_ids=torch.tensor([prefix], device=device), past_key_values=cache, use_cache=True)
    return cache


@products_everywhere()
def _read_rest(
    decoder: Any, cache: DynamicCache | None, shared: int, rows: Sequence[Row], device: torch.device
) -> Tensor:
    inputs = pad_right(rows, device)
    if cache is None:
        hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        return hidden.to(device)
    # A forward appends to its cache, and further batches need the prefix alone.
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(len(rows))
    before = torch.ones(len(rows), shared, dtype=torch.long, device=device)
    inputs["attention_mask"] = torch.cat([before, inputs["attention_mask"]], -1)
    output = decoder(**inputs, past_key_values=repeated, use_cache=True)
    hidden = output.last_hidden_state
    return hidden.to(device)
