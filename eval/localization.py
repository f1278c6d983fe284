"""Where a fact is computed: by how much each site, put back, restores an answer that another subject took away.

The model reads a prompt about one subject and the same prompt about another (symmetric token replacement). The metric
is the difference of the logits of both answers' first tokens. A site's effect is the share of the gap between both
prompts that comes back when the site's activation of the right prompt is put into the other one. Exact patching runs
the model once a site; attribution patching estimates all sites from one backward.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..editing.hooks.patching import STREAM, Site, patched, sites_of, sites_read
from ..editing.modules import final_hidden, unembedding
from ..editing.wiring.row import Architecture
from .inference.batches import read_in_batches
from .inference.likelihood import pad_right
from .intervals import Interval
from .ratios import ratio_interval

Group = Literal["subject", "between", "last"]
GROUPS: tuple[Group, ...] = ("subject", "between", "last")
"""Positions of a prompt: the subject's tokens, what stands between it and the last token, and the last token."""
TOKENS = 2048
"""Tokens read at once; a forward with gradients holds every layer's activations."""


@dataclass(frozen=True)
class Pair:
    """Two prompts of the same length that differ in the subject alone."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    subject: tuple[int, int]
    """Where they differ: the first position, and the one behind the last."""
    answer: int
    """First token of the answer to the clean prompt."""
    other: int
    """First token of the answer to the corrupted prompt."""
    name: str
    """The subject, by which intervals count."""

    def positions(self) -> dict[Group, range]:
        """Positions of each group."""
        start, end = self.subject
        last = len(self.clean) - 1
        return {"subject": range(start, min(end, last)), "between": range(end, last), "last": range(last, last + 1)}


@dataclass(frozen=True)
class Effect:
    """What one site does at some positions."""

    site: Site
    group: Group
    value: float
    """Share of the gap that it restores: 0 nothing, 1 all of it; below 0 it pushes the other way."""
    ci95: Interval | None


@dataclass
class _Table:
    """Logit differences by pair: with both prompts, and with each site patched."""

    clean: list[float] = field(default_factory=list)
    corrupted: list[float] = field(default_factory=list)
    restored: dict[tuple[Site, Group], list[float]] = field(default_factory=dict)

    def effects(self, clusters: Sequence[str]) -> list[Effect]:
        gaps = [clean - corrupted for clean, corrupted in zip(self.clean, self.corrupted, strict=True)]
        return [
            Effect(site, group, sum(values) / sum(gaps), ratio_interval(values, gaps, clusters))
            for (site, group), values in self.restored.items()
        ]


def known(model: Any, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of whose prompts the model answers each with its own subject's answer rather than the other's."""
    kept: dict[int, Pair] = {}
    for places, differences in _in_batches(model, pairs, lambda batch: _both(model, batch)):
        clean, corrupted = differences
        for place, right, other in zip(places, clean.tolist(), corrupted.tolist(), strict=True):
            if right > 0 > other:
                kept[place] = pairs[place]
    return [kept[place] for place in sorted(kept)]


def attribution(
    model: Any, row: Architecture, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda _: None
) -> list[Effect]:
    """Every site's effect to first order: (clean − corrupted activation) · gradient of the metric, on the corrupted run.

    Args:
        model: A causal language model in evaluation mode; its weights get no gradients.
        row: Its architecture.
        pairs: Prompts that the model answers rightly (``known``).
        advance: Told how many pairs were read.

    Source:
        Nanda 2023, attribution patching; Syed et al. 2023 (arXiv 2310.10348), equation 3.
    """
    sites = sites_of(model, row)

    def read(batch: Sequence[Pair]) -> tuple[Tensor, Tensor, dict[tuple[Site, Group], Tensor]]:
        groups = _groups(batch)
        with torch.no_grad(), sites_read(sites) as right:
            clean = _difference(model, batch, [pair.clean for pair in batch])
        with torch.enable_grad(), sites_read(sites) as other:
            corrupted = _difference(model, batch, [pair.corrupted for pair in batch])
            gradients = torch.autograd.grad(corrupted.sum(), [other[site] for site in sites])
        estimates = {}
        for site, gradient in zip(sites, gradients, strict=True):
            change = ((right[site] - other[site].detach()).float() * gradient.float()).sum(-1).cpu()
            for group, where in groups.items():
                estimates[site, group] = (change.reshape(where.shape) * where).sum(-1)
        return clean, corrupted.detach(), estimates

    return _summed(model, pairs, read, advance)


@torch.no_grad()
def exact(
    model: Any,
    row: Architecture,
    pairs: Sequence[Pair],
    *,
    remove: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Effect]:
    """Every site's effect by patching it: one forward a site and group of positions.

    Args:
        pairs: Prompts that the model answers rightly (``known``).
        remove: Put the corrupted activation into the clean prompt instead, and give the share of the gap that is lost:
            what the site is needed for (exact ablation by replacement), and not what it restores alone.

    Source:
        Meng et al. 2022 (arXiv 2202.05262), section 2.1, with replaced subjects (Zhang and Nanda 2023, arXiv 2309.16042).
    """
    sites = sites_of(model, row)

    def read(batch: Sequence[Pair]) -> tuple[Tensor, Tensor, dict[tuple[Site, Group], Tensor]]:
        rows = {"clean": [pair.clean for pair in batch], "corrupted": [pair.corrupted for pair in batch]}
        start, source = ("clean", "corrupted") if remove else ("corrupted", "clean")
        with sites_read(sites) as values:
            from_source = _difference(model, batch, rows[source])
        from_start = _difference(model, batch, rows[start])
        changes = {}
        for site, module in sites.items():
            for group, where in _groups(batch).items():
                with patched(module, values[site], where):
                    moved = _difference(model, batch, rows[start])
                changes[site, group] = from_start - moved if remove else moved - from_start
        clean, corrupted = (from_start, from_source) if remove else (from_source, from_start)
        return clean, corrupted, changes

    return _summed(model, pairs, read, advance)


def window(effects: Sequence[Effect], layers: int, share: float = 0.8) -> tuple[int, int]:
    """The fewest layers in a row whose sublayers restore at least ``share`` of what all restore, at all positions.

    Effects below 0 count as 0. Of equally many layers those that restore more win.

    Example:
        >>> window([Effect(Site(0, "mlp"), "subject", 0.1, None), Effect(Site(2, "mlp"), "last", 0.9, None)], 4)
        (2, 2)
    """
    mass = by_layer(effects, layers)
    total = sum(mass)
    for size in range(1, layers + 1):
        best = max(range(layers - size + 1), key=lambda start: sum(mass[start : start + size]))
        if sum(mass[best : best + size]) >= share * total:
            return best, best + size - 1
    return 0, layers - 1


def by_layer(effects: Sequence[Effect], layers: int) -> list[float]:
    """What each layer's sublayers restore together, at all positions; effects below 0 count as 0."""
    mass = [0.0] * layers
    for effect in effects:
        if effect.site.part != STREAM:
            mass[effect.site.layer] += max(0.0, effect.value)
    return mass


Read = Callable[[Sequence[Pair]], tuple[Tensor, Tensor, dict[tuple[Site, Group], Tensor]]]


def _summed(model: Any, pairs: Sequence[Pair], read: Read, advance: Callable[[int], None]) -> list[Effect]:
    table, names = _Table(), []
    for places, (clean, corrupted, changes) in _in_batches(model, pairs, read):
        names += [pairs[place].name for place in places]
        table.clean += clean.tolist()
        table.corrupted += corrupted.tolist()
        for key, values in changes.items():
            table.restored.setdefault(key, []).extend(values.tolist())
        advance(len(places))
    return table.effects(names)


def _in_batches(model: Any, pairs: Sequence[Pair], read: Callable[[Sequence[Pair]], Any]) -> Any:
    lengths = [len(pair.clean) for pair in pairs]
    return read_in_batches(lengths, TOKENS, lambda places: read([pairs[place] for place in places]))


@torch.no_grad()
def _both(model: Any, batch: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    rows = [pair.clean for pair in batch], [pair.corrupted for pair in batch]
    clean, corrupted = (_difference(model, batch, side) for side in rows)
    return clean, corrupted


def _difference(model: Any, batch: Sequence[Pair], rows: Sequence[tuple[int, ...]]) -> Float[Tensor, " batch"]:
    """Logit of the clean prompt's answer minus that of the corrupted one's, after each row, in fp32 on the CPU."""
    hidden = final_hidden(model, pad_right(rows, model.device))
    last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
    places = torch.arange(len(rows), device=hidden.device)
    logits = unembedding(model)(hidden[places, last]).float().cpu()
    answers, others = ([getattr(pair, name) for pair in batch] for name in ("answer", "other"))
    chosen = range(len(rows))
    return logits[chosen, answers] - logits[chosen, others]


def _groups(batch: Sequence[Pair]) -> Mapping[Group, Bool[Tensor, "batch positions"]]:
    width = max(len(pair.clean) for pair in batch)
    masks = {group: torch.zeros(len(batch), width, dtype=torch.bool) for group in GROUPS}
    for place, pair in enumerate(batch):
        for group, positions in pair.positions().items():
            masks[group][place, list(positions)] = True
    return masks
