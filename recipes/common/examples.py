"""Training sequences: batches, likelihoods of their scored tokens, and the order in which they are read."""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...editing.errors import EditError
from ...editing.modules import final_hidden, unembedding
from ...editing.training.packing import packed, read_packed
from ...editing.training.soft_targets import SoftTargets, soft_divergence
from ...eval.inference.likelihood import pad_right
from .tokens import Row
from .trainer import Terms


@dataclass(frozen=True)
class Example:
    """A sequence; what is scored are its tokens from ``start`` on."""

    ids: Row
    start: int


def example_batch(
    examples: Sequence[Example],
    *,
    in_one_row: bool = False,
    by_length: bool = True,
    every: bool = True,
    owners: Sequence[int] | None = None,
    ends: Collection[int] | None = None,
) -> dict[str, Any]:
    """Sequences as one forward reads them; in one row the shortest first, or, without ``by_length``, as they come.

    Of each scored token ``rows`` holds the sequence, and ``places`` the position that predicts it: in its sequence, or,
    where they stand in one row without padding, in that row. There ``where`` holds the place of every token that is read,
    one sequence after another.

    Args:
        every: In one row, read the last tokens too, which predict nothing that is scored.
        owners: In one row, those of different owners share no tokens; the numbers 0 and following, in order.
        ends: As ``packed`` takes it.
    """
    lengths = torch.tensor([len(example.ids) - example.start for example in examples])
    rows = torch.repeat_interleave(torch.arange(len(examples)), lengths)
    # The position before a token predicts it.
    places = torch.cat([torch.arange(example.start - 1, len(example.ids) - 1) for example in examples])
    scored = {
        "lengths": lengths,
        "rows": rows,
        "tokens": torch.tensor([token for example in examples for token in example.ids[example.start :]]),
    }
    if not in_one_row:
        ids = [example.ids for example in examples]
        return {**pad_right(ids, torch.device("cpu")), **scored, "places": places}
    # Of a sequence of which nothing is scored, one token is read all the same.
    ids = [example.ids if every else example.ids[: max(1, len(example.ids) - 1)] for example in examples]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]) if by_length else index)
    ordered = None if owners is None else [owners[index] for index in order]
    inputs = packed([ids[index] for index in order], ordered, ends=ends)
    pieces = inputs["where"].split([len(ids[index]) for index in order])
    where = torch.cat([pieces[place] for place in sorted(range(len(order)), key=order.__getitem__)])
    begins = torch.tensor([0, *accumulate(map(len, ids[:-1]))])
    return {**inputs, **scored, "places": where[begins[rows] + places], "where": where}


def scored_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Float[Tensor, "n d"]:
    """What the unembedding reads where a token is scored."""
    if "blocks" in batch:
        return read_packed(model, batch)[batch["places"]]
    hidden = final_hidden(model, {key: batch[key] for key in ("input_ids", "attention_mask")})
    return hidden[batch["rows"], batch["places"]]


def sequence_nll(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Summed negative log-likelihood of each row's scored tokens, in nats."""
    nats = scored_nats(model, batch)
    return nats.new_zeros(len(batch["lengths"])).index_add(0, batch["rows"], nats)


def scored_nats(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Negative log-probability of each scored token of a batch, in nats."""
    return token_nats(scored_hidden(model, batch), model, batch["tokens"])


def token_nats(hidden: Tensor, model: nn.Module, tokens: Tensor) -> Tensor:
    """Negative log-probability of each token, in nats: the divergence from a certain one."""
    log_p = torch.zeros(len(tokens), 1, device=tokens.device)
    certain = SoftTargets(tokens[:, None], log_p, torch.full((len(tokens),), -torch.inf, device=tokens.device))
    return soft_divergence(hidden, unembedding(model), certain)


def spread(values: Sequence[Any], count: int, seed: str) -> list[Any]:
    """At most ``count`` of the values, drawn evenly."""
    return list(values) if len(values) <= count else random.Random(seed).sample(list(values), k=count)


T = TypeVar("T")


def chunked(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The values in order, ``size`` at a time; the last ones may be fewer."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def cycled(rows: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """``count`` rows: all of them in a shuffled order, again and again.

    Raises:
        EditError: There is no row.
    """
    if not rows:
        raise EditError(
            "no sequence is left to train on: all are shorter than two tokens, or end within their question; give longer"
            " texts"
        )
    order: list[T] = []
    while len(order) < count:
        order += rng.sample(list(rows), k=len(rows))
    return order[:count]


FORWARD = 96
"""What one more forward costs, in tokens of padding it must save."""


def split_by_length(lengths: Sequence[int], most: int = 4) -> list[int]:
    """Sizes of consecutive parts of rows sorted by length, each padded to its longest, at the least cost in tokens."""
    n = len(lengths)
    # best[k][end]: least cost of the first ``end`` rows in k parts, and where the last part begins.
    best: list[list[tuple[int, int]]] = [[(0, 0)] + [(1 << 60, 0)] * n]
    for _ in range(most):
        before = best[-1]
        cheapest = [
            min((before[start][0] + (end - start) * lengths[end - 1] + FORWARD, start) for start in range(end))
            for end in range(1, n + 1)
        ]
        best.append([(1 << 60, 0), *cheapest])
    count = min(range(1, most + 1), key=lambda k: best[k][n][0])
    sizes, end = [], n
    for k in range(count, 0, -1):
        start = best[k][end][1]
        sizes.append(end - start)
        end = start
    return sizes[::-1]


def completion_loss(model: Any, batch: dict[str, Any]) -> Terms:
    """Mean over sequences of the completion's negative log-likelihood, in nats a token."""
    return {"completion": (sequence_nll(model, batch) / batch["lengths"]).mean()}
