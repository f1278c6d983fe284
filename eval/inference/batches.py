"""Batches of rows of like length, and going on with smaller ones where memory runs out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ...editing.errors import OutOfMemory, one_line
from ...editing.numerics.out_of_memory import give_back, memory_ran_out

log = logging.getLogger(__name__)
T = TypeVar("T")


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group items of similar length so that padded tokens stay within a budget; the longest first, to fail early."""
    order = _by_length(lengths)
    while order:
        batch = _first(order, lengths, budget)
        yield batch
        order = order[len(batch) :]


def read_in_batches(
    lengths: Sequence[int], budget: int, read: Callable[[list[int]], T], *, most: int | None = None
) -> Iterator[tuple[list[int], T]]:
    """The same batches, each with what ``read`` makes of it; where memory runs out, it and all after it are halved.

    Args:
        lengths: Tokens of each item.
        budget: Tokens of a batch, padding included.
        read: Takes the items of a batch, by their places. It may be called again for a part of them.
        most: Items of a batch.

    Raises:
        OutOfMemory: Memory runs out on a single item.

    Example:
        >>> for places, logits in read_in_batches([3, 5, 4], 8, lambda places: model_on(places)): ...
    """
    order, told = _by_length(lengths), False
    while order:
        batch = _first(order, lengths, budget)[:most]
        try:
            result = read(batch)
        except Exception as error:  # the kinds differ between devices; see ``memory_ran_out``
            if not memory_ran_out(error):
                raise
            if len(batch) == 1:
                raise OutOfMemory(_of_one(lengths[batch[0]], error)) from error
        else:
            order = order[len(batch) :]
            yield batch, result
            # A result that stays in this frame would take memory from the next.
            del result
            continue
        # Outside the handler, whose exception would keep the failed forward's tensors alive.
        give_back()
        budget = lengths[batch[0]] * (len(batch) // 2)
        if not told:
            log.warning("memory ran out on %d texts at once; reading goes on with half as many", len(batch))
            told = True


def _of_one(length: int, error: BaseException) -> str:
    return (
        f"memory ran out on one text of {length} tokens ({one_line(error, 120)}); use --dtype bfloat16, give shorter "
        "texts, close other programs on this device, or use a device with more memory"
    )


def _by_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _first(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[int]:
    """As many of the first items as fit, at least one."""
    count = max(1, budget // max(1, lengths[order[0]]))
    return list(order[:count])
