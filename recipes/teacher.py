"""The frozen model as a teacher: what it predicts in many contexts, each computed once."""

from collections.abc import Callable, Sequence
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
        self._mixed: tuple[tuple[tuple[Row, ...], int], Tensor] | None = None

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
        for index in sorted(range(len(items)), key=lambda i: (items[i].novices, items[i].count)):
            item = items[index]
            bare = self._log_p(item.ids, item.count, temperature)
            expert = self._mean(item.experts, item.count, temperature) if item.experts else bare
            found[index] = keep_streams(bare, expert, self._mean(item.novices, item.count, temperature), kept)
        return [streams for streams in found if streams is not None]

    def top(self, rows: Sequence[Row], firsts: Sequence[int], kept: int) -> list[SoftTargets]:
        """The frozen model's own distributions from position ``first`` of each row on."""
        counts = [len(row) - first for row, first in zip(rows, firsts, strict=True)]
        self._read(dict(zip(rows, counts, strict=True)))
        return [keep_top(self._log_p(row, count, 1.0), kept) for row, count in zip(rows, counts, strict=True)]

    def forget(self) -> None:
        """Free what was remembered."""
        self._hidden.clear()
        self._mixed = None

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

    @torch.no_grad()
    def _log_p(self, row: Row, count: int, temperature: float) -> Float[Tensor, "count v"]:
        hidden = self._hidden[row][-count:]
        size = max(1, LOGITS_BUDGET // (4 * int(self.model.config.vocab_size)))
        parts = [self.head(part).float() / temperature for part in hidden.split(size)]
        return torch.cat(parts).log_softmax(-1)

    def _mean(self, rows: tuple[Row, ...], count: int, temperature: float) -> Float[Tensor, "count v"]:
        if self._mixed is None or self._mixed[0] != (rows, count):
            total = self._log_p(rows[0], count, temperature)
            for row in rows[1:]:
                total = torch.logaddexp(total, self._log_p(row, count, temperature))
            self._mixed = (rows, count), total - torch.tensor(float(len(rows))).log()
        return self._mixed[1]
