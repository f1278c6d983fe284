"""The frozen model as a teacher: what it predicts in many contexts, each computed once."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...artifacts.checkpoints.tensor_cache import TensorCache
from ...editing.modules import Head, language_config, unembedding
from ...editing.training.edited_target import TargetEdit
from ...editing.training.soft_targets import (
    SoftTargets,
    Streams,
    join,
    keep_streams,
    keep_top,
    positions_at_once,
    total_variation,
    wide,
)
from ..common.prefix_cache import final_hidden_states
from ..common.tokens import Row
from .remembered import Pages

Span = tuple[int, int]
"""Positions from one to another, counted from a row's end: (-3, 0) are the last three."""
Place = tuple[int, Span]
"""An item, by its index, and some of its positions."""
Reading = tuple[Row, bool]
"""A row, and whether it is the trained expert that reads it."""
ExpertContext = Callable[[], AbstractContextManager[object]]
"""Makes a context while which a model is the trained expert."""

PART_BYTES = 256 << 20
"""Bytes of what was read that are written to one file of the cache."""


@dataclass(frozen=True)
class Item:
    """A tokenized context: the last ``count`` positions of all its rows predict the same text."""

    ids: Row
    count: int
    experts: tuple[Row, ...] = ()
    """In place of an expert the bare context can stand."""
    novices: tuple[Row, ...] = ()
    trained_expert: bool = False
    """The expert is another model than the teacher's own, trained to be one; it reads the bare context."""

    @property
    def readings(self) -> tuple["Reading", ...]:
        """All that is read for it, each once."""
        by_model = dict.fromkeys((row, False) for row in (self.ids, *self.experts, *self.novices))
        return (*by_model, (self.ids, True)) if self.trained_expert else tuple(by_model)

    @property
    def expert(self) -> tuple["Reading", ...]:
        """What the expert's mean distribution is of."""
        return tuple((row, self.trained_expert) for row in self.experts or (self.ids,))

    @property
    def novice(self) -> tuple["Reading", ...]:
        """What the novice's mean distribution is of."""
        return tuple((row, False) for row in self.novices)


@dataclass(frozen=True)
class Targets:
    """An item's edited distributions."""

    soft: SoftTargets
    disagreement: Float[Tensor, " count"]
    """Total variation distance between expert and novice, 0 to 1."""


@dataclass(frozen=True)
class Likelihoods:
    """What edited distributions say at an item's positions."""

    log_p: Float[Tensor, "edits count k"]
    """Log-probabilities of the tokens that were asked for, in nats."""
    likeliest: Int[Tensor, "edits count"]
    """The token that each prefers."""


class Teacher:
    """A frozen model that remembers what it computed, on disk too where a place is given.

    What is remembered are final hidden states, from which distributions are exact: a sweep over the strength, the
    temperature, ranks, layers, rates or weights reads every context that it shares with an earlier run from disk.
    """

    def __init__(self, model: Any, cache: TensorCache | None = None, expert: ExpertContext = nullcontext):
        """Args:
        expert: A context while which the model is the trained expert.
        """
        self.model, self.cache, self.expert = model, cache, expert
        self.advance: Callable[[int], None] = lambda _: None
        """Told how many rows were read; a stage of the run's progress takes its place."""
        self._hidden: dict[Reading, Tensor] = {}
        self._pages: Pages | None = None

    @property
    def head(self) -> Head:
        return unembedding(self.model)

    def streams(self, items: Sequence[Item], stored_tokens: int, temperature: float = 1.0) -> list[Streams]:
        """What bare, expert and novice predict at each item's positions.

        Several experts or novices count as their mean distribution.
        """
        store = _Store([item.count for item in items])
        for places, bare, expert, novice in self._contrasts(items, temperature):
            streams = keep_streams(bare, expert, novice, stored_tokens)
            store.put(places, (streams.ids, streams.bare, streams.expert, streams.novice))
        return [Streams(*tensors) for tensors in store.by_item()]

    def targets(self, items: Sequence[Item], edit: TargetEdit, stored_tokens: int) -> list["Targets"]:
        """The edited distribution at each item's positions: exact over the whole vocabulary, its likeliest tokens
        stored."""
        store = _Store([item.count for item in items])
        strengths = [edit.strengths(item.count, self.model.device) for item in items]
        for places, bare, expert, novice in self._contrasts(items, edit.temperature):
            # Spans count from the end, where a slice's end of 0 would be its beginning.
            along = torch.cat([strengths[i][start : end or None] for i, (start, end) in places])
            target = keep_top(edit.log_p(bare, expert, novice, along), stored_tokens)
            store.put(places, (target.ids, target.log_p, target.rest, total_variation(expert, novice)))
        return [Targets(SoftTargets(*parts), disagreement) for *parts, disagreement in store.by_item()]

    def likelihoods(
        self, items: Sequence[Item], tokens: Sequence[Int[Tensor, "count k"]], edits: Sequence[TargetEdit]
    ) -> list[Likelihoods]:
        """What each edited distribution says of some tokens at each item's positions, over the whole vocabulary.

        Args:
            tokens: For each item, the tokens asked for at each of its positions.
        """
        found = [
            Likelihoods(torch.empty(len(edits), *wanted.shape), torch.empty(len(edits), len(wanted), dtype=torch.long))
            for wanted in tokens
        ]
        for places, bare, expert, novice in self._contrasts(items, 1.0):
            sizes = [end - start for _, (start, end) in places]
            for number, edit in enumerate(edits):
                # One edit at a time: all of them over a whole vocabulary would not fit into memory.
                log_p = edit.log_p(bare, expert, novice)
                for (index, (start, end)), part in zip(places, log_p.split(sizes), strict=True):
                    span = slice(start, end or None)
                    found[index].log_p[number, span] = part.gather(-1, tokens[index][span].to(part.device)).cpu()
                    found[index].likeliest[number, span] = part.argmax(-1).cpu()
        return found

    def top(self, rows: Sequence[Row], firsts: Sequence[int], stored_tokens: int) -> list[SoftTargets]:
        """The frozen model's own distributions from position ``first`` of each row on."""
        items = [Item(row, len(row) - first) for row, first in zip(rows, firsts, strict=True)]
        store = _Store([item.count for item in items])
        for places, log_p in self._predictions(items, range(len(items)), 1.0):
            targets = join([keep_top(log_p.mean(((rows[i], False),), span), stored_tokens) for i, span in places])
            store.put(places, (targets.ids, targets.log_p, targets.rest))
        return [SoftTargets(*tensors) for tensors in store.by_item()]

    def read(self, items: Sequence[Item], but: Collection[Row] = ()) -> None:
        """Read what has not been read of some items, all at once; the model's own readings of rows ``but`` are left."""
        wanted: dict[Reading, int] = {}
        for item in items:
            for reading in item.readings:
                if reading[1] or reading[0] not in but:
                    wanted[reading] = max(item.count, wanted.get(reading, 0))
        missing = {one: n for one, n in wanted.items() if one not in self._hidden or len(self._hidden[one]) < n}
        self._read_or_recall({row: n for (row, trained), n in missing.items() if not trained})
        by_expert = {row: n for (row, trained), n in missing.items() if trained}
        if by_expert:
            # Never stored on disk: the cache knows of the base's weights, not of the expert's.
            with self.expert():
                self._read_now(by_expert, True)

    def remember(self, row: Row, hidden: Float[Tensor, "length d"], count: int) -> None:
        """What the model was read to have at the last ``count`` positions of a row, or more where more is
        remembered."""
        known = self._hidden.get((row, False))
        if known is None or len(known) < count:
            self._keep((row, False), hidden[len(hidden) - count :].clone())

    def forget(self) -> None:
        """Free what was remembered."""
        self._hidden.clear()
        if self._pages is not None:
            self._pages.clear()

    def _contrasts(
        self, items: Sequence[Item], temperature: float
    ) -> Iterator[tuple[list[Place], Tensor, Tensor, Tensor]]:
        """Some positions of some items, and what bare, expert and novice predict there [positions, v]."""
        # Items with the same novices stand together, so that their mixture is formed once.
        order = sorted(range(len(items)), key=lambda i: (items[i].novices, items[i].count))
        for places, log_p in self._predictions(items, order, temperature):
            bare = torch.cat([log_p.mean(((items[i].ids, False),), span) for i, span in places])
            expert = torch.cat([log_p.mean(items[i].expert, span) for i, span in places])
            novice = torch.cat([log_p.mean(items[i].novice, span) for i, span in places])
            yield places, bare, expert, novice

    def _predictions(
        self, items: Sequence[Item], order: Iterable[int], temperature: float
    ) -> Iterator[tuple[list[Place], "_Predictions"]]:
        """Which positions of which items, and what is predicted there; a bounded number at a time."""
        self.read(items)
        for places in self._portions(items, order):
            slots = list(dict.fromkeys((reading, span) for index, span in places for reading in items[index].readings))
            yield places, _Predictions(dict(zip(slots, self._log_p(slots, temperature), strict=True)))

    def _read_or_recall(self, missing: dict[Row, int]) -> None:
        """The model's own readings, from disk where they are there."""
        if not missing:
            return
        key = sorted(missing.items())
        # All or nothing: what is read in other batches differs in its last bits.
        if self.cache and self._recall(self.cache, key) == len(key):
            return
        self._read_now(missing, False)
        if self.cache:
            self.cache.put_parts(self._in_parts(key), key)

    def _recall(self, cache: TensorCache, key: Sequence[tuple[Row, int]]) -> int:
        """How many of the first rows were found on disk; fewer than all where a file is damaged."""
        found = 0
        for part in cache.get_parts(key) or ():
            hidden = part["hidden"].to(self.model.device)
            while len(hidden):
                row, count = key[found]
                # A copy, because a view would keep the whole part alive.
                self._keep((row, False), hidden[:count].clone())
                hidden, found = hidden[count:], found + 1
                self.advance(1)
        return found

    def _in_parts(self, key: Sequence[tuple[Row, int]]) -> Iterator[dict[str, Tensor]]:
        """What was read of some rows, in tensors of bounded size."""
        part: list[Tensor] = []
        for row, count in key:
            states = self._hidden[row, False]
            part.append(states[len(states) - count :].cpu())
            if sum(tensor.nbytes for tensor in part) >= PART_BYTES:
                yield {"hidden": torch.cat(part)}
                part = []
        if part:
            yield {"hidden": torch.cat(part)}

    def _keep(self, reading: Reading, hidden: Tensor) -> None:
        if self._pages is None:
            self._pages = Pages(self.model.device)
        self._hidden[reading] = self._pages.keep(hidden)

    def _read_now(self, missing: dict[Row, int], trained: bool) -> None:
        for row, hidden in final_hidden_states(self.model, missing):
            self._keep((row, trained), hidden)
            self.advance(1)

    def _portions(self, items: Sequence[Item], order: Iterable[int]) -> Iterator[list[Place]]:
        """Consecutive positions of items whose rows go through the unembedding together.

        It is larger than all that a few positions bring, so that they would mostly wait for it to be read.
        """
        most = positions_at_once(int(language_config(self.model).vocab_size), self.model.device)
        portion, seen, positions = list[Place](), set[tuple[Reading, Span]](), 0
        for index in order:
            readings, count = items[index].readings, items[index].count
            size = max(1, most // len(readings))
            for start in range(-count, 0, size):
                span = (start, min(start + size, 0))
                slots = {(reading, span) for reading in readings}
                more = len(slots - seen) * (span[1] - span[0])
                if portion and positions + more > most:
                    yield portion
                    portion, seen, positions = [], set(), 0
                    more = len(slots) * (span[1] - span[0])
                portion.append((index, span))
                seen |= slots
                positions += more
        if portion:
            yield portion

    @torch.no_grad()
    def _log_p(self, slots: Sequence[tuple[Reading, Span]], temperature: float) -> list[Float[Tensor, "count v"]]:
        """Log-probabilities at some positions of each row."""
        hidden = []
        for reading, (start, end) in slots:
            # More positions than these may be remembered; spans count from the end.
            states = self._hidden[reading]
            hidden.append(states[len(states) + start : len(states) + end].to(self.model.device))
        logits = wide(self.head(torch.cat(hidden)))
        log_p = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        return list(log_p.split([end - start for _, (start, end) in slots]))


class _Predictions:
    """What some rows predict, and the mean distributions of several of them, each formed once."""

    def __init__(self, log_p: Mapping[tuple[Reading, Span], Float[Tensor, "count v"]]):
        self.log_p = log_p
        self._means: dict[tuple[tuple[Reading, ...], Span], Tensor] = {}

    def mean(self, readings: tuple[Reading, ...], span: Span) -> Float[Tensor, "count v"]:
        """The mean distribution of some readings, as log-probabilities."""
        if len(readings) == 1:
            return self.log_p[readings[0], span]
        if (readings, span) not in self._means:
            total = self.log_p[readings[0], span]
            for reading in readings[1:]:
                total = torch.logaddexp(total, self.log_p[reading, span])
            self._means[readings, span] = total - math.log(len(readings))
        return self._means[readings, span]


class _Store:
    """Results for all positions of all items, in tensors that are allocated once.

    Tensors held one by one between temporaries many times their size would pin the memory around them.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts, self.ends = counts, list(accumulate(counts))
        self._tensors: tuple[Tensor, ...] = ()

    def put(self, places: Sequence[Place], results: tuple[Tensor, ...]) -> None:
        """Store the results for some positions, which follow one another in each tensor."""
        if not self._tensors:
            self._tensors = tuple(part.new_empty(self.ends[-1], *part.shape[1:]) for part in results)
        done = 0
        for index, (start, end) in places:
            begin, count = self.ends[index] + start, end - start
            for whole, part in zip(self._tensors, results, strict=True):
                whole[begin : begin + count] = part[done : done + count]
            done += count

    def by_item(self) -> list[tuple[Tensor, ...]]:
        """The results of each item."""
        return [
            tuple(part[end - count : end] for part in self._tensors)
            for count, end in zip(self.counts, self.ends, strict=True)
        ]
