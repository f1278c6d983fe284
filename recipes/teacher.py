"""The frozen model as a teacher: what it predicts in many contexts, each computed once."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifacts.kept import KeptTensors
from ..editing.adapters import Head, unembedding
from ..editing.soft_targets import LOGITS_BUDGET, SoftTargets, Streams, keep_streams, keep_top
from .prefixes import Row, final_hidden_states


@dataclass(frozen=True)
class Item:
    """A tokenized context: the last ``count`` positions of all its rows predict the same text."""

    ids: Row
    count: int
    experts: tuple[Row, ...]
    """In place of an expert the bare context can stand."""
    novices: tuple[Row, ...]


class Teacher:
    """A frozen model that remembers what it computed, on disk too where a place is given.

    What is remembered are final hidden states, from which distributions are exact: a sweep over the strength, the
    temperature, ranks, layers, rates or weights reads every context that it shares with an earlier run from disk.
    """

    def __init__(self, model: Any, advance: Callable[[int], None] = lambda _: None, kept: KeptTensors | None = None):
        self.model, self.advance, self.kept = model, advance, kept
        self._hidden: dict[Row, Tensor] = {}

    @property
    def head(self) -> Head:
        return unembedding(self.model)

    def streams(self, items: Sequence[Item], kept: int, temperature: float = 1.0) -> list[Streams]:
        """What bare, expert and novice predict at each item's positions.

        Several experts or novices count as their mean distribution.
        """
        wanted: dict[Row, int] = {}
        for item in items:
            for row in (item.ids, *item.experts, *item.novices):
                wanted[row] = max(item.count, wanted.get(row, 0))
        self._read(wanted)
        found: list[Streams | None] = [None] * len(items)
        # Items with the same novices stand together, so that their mixture is formed once.
        order = sorted(range(len(items)), key=lambda i: (items[i].novices, items[i].count))
        for some in self._portions(order, lambda i: (items[i].ids, *items[i].experts, *items[i].novices), wanted):
            read = _rows_of(items, some)
            said = _Said(dict(zip(read, self._log_p([(row, wanted[row]) for row in read], temperature), strict=True)))
            bare = torch.cat([said.of((items[i].ids,), items[i].count) for i in some])
            expert = torch.cat([said.of(items[i].experts or (items[i].ids,), items[i].count) for i in some])
            novice = torch.cat([said.of(items[i].novices, items[i].count) for i in some])
            together = keep_streams(bare, expert, novice, kept)
            for index, streams in zip(some, together.split([items[i].count for i in some]), strict=True):
                found[index] = streams
        return [streams for streams in found if streams is not None]

    def top(self, rows: Sequence[Row], firsts: Sequence[int], kept: int) -> list[SoftTargets]:
        """The frozen model's own distributions from position ``first`` of each row on."""
        counts = [len(row) - first for row, first in zip(rows, firsts, strict=True)]
        wanted: dict[Row, int] = {}
        for row, count in zip(rows, counts, strict=True):
            wanted[row] = max(count, wanted.get(row, 0))
        self._read(wanted)
        found: list[SoftTargets] = []
        for some in self._portions(range(len(rows)), lambda i: (rows[i],), wanted):
            found += [keep_top(log_p, kept) for log_p in self._log_p([(rows[i], counts[i]) for i in some], 1.0)]
        return found

    def forget(self) -> None:
        """Free what was remembered."""
        self._hidden.clear()

    def _read(self, wanted: dict[Row, int]) -> None:
        missing = {row: n for row, n in wanted.items() if row not in self._hidden or len(self._hidden[row]) < n}
        if not missing:
            return
        key = sorted(missing.items())
        kept = self.kept.get(key) if self.kept else None
        if kept is not None:
            parts = kept["hidden"].to(self.model.device).split([n for _, n in key])
            self._hidden.update(zip((row for row, _ in key), parts, strict=True))
            self.advance(len(key))
            return
        for row, hidden in final_hidden_states(self.model, missing):
            self._hidden[row] = hidden
            self.advance(1)
        if self.kept:
            self.kept.put({"hidden": torch.cat([self._hidden[row] for row, _ in key]).cpu()}, key)

    def _portions(
        self, order: Sequence[int], rows: Callable[[int], Sequence[Row]], counts: Mapping[Row, int]
    ) -> Iterator[list[int]]:
        """Consecutive items whose rows go through the unembedding together.

        It is larger than all that a few positions bring, so that they would mostly wait for it to be read.
        """
        # Some temporaries of a portion's shape are alive at once.
        most = max(1, LOGITS_BUDGET // (12 * int(self.model.config.vocab_size)))
        portion, seen, positions = list[int](), set[Row](), 0
        for index in order:
            new = sum(counts[row] for row in set(rows(index)) - seen)
            if portion and positions + new > most:
                yield portion
                portion, seen, positions = [], set(), 0
                new = sum(counts[row] for row in set(rows(index)))
            portion.append(index)
            seen.update(rows(index))
            positions += new
        if portion:
            yield portion

    @torch.no_grad()
    def _log_p(self, wanted: Sequence[tuple[Row, int]], temperature: float) -> list[Float[Tensor, "count v"]]:
        """Log-probabilities at the last ``count`` positions of each row."""
        hidden = torch.cat([self._hidden[row][-count:] for row, count in wanted])
        size = max(1, LOGITS_BUDGET // (4 * int(self.model.config.vocab_size)))
        parts = [(self.head(part).float() / temperature).log_softmax(-1) for part in hidden.split(size)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return list(whole.split([count for _, count in wanted]))


class _Said:
    """What some rows predict, and the mean distributions of several of them, each formed once."""

    def __init__(self, log_p: dict[Row, Float[Tensor, "count v"]]):
        self.log_p = log_p
        self._means: dict[tuple[tuple[Row, ...], int], Tensor] = {}

    def of(self, rows: tuple[Row, ...], count: int) -> Float[Tensor, "count v"]:
        if len(rows) == 1:
            return self.log_p[rows[0]][-count:]
        if (rows, count) not in self._means:
            total = self.log_p[rows[0]][-count:]
            for row in rows[1:]:
                total = torch.logaddexp(total, self.log_p[row][-count:])
            self._means[rows, count] = total - math.log(len(rows))
        return self._means[rows, count]


def _rows_of(items: Sequence[Item], some: Sequence[int]) -> list[Row]:
    """The rows of some items, each once."""
    return list(dict.fromkeys(row for i in some for row in (items[i].ids, *items[i].experts, *items[i].novices)))
