"""Drawing some items at random, from as many subjects as can be."""

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


def drawn(rows: Sequence[T], clusters: Sequence[Hashable], count: int, seed: str) -> list[T]:
    """``count`` of the rows at random, in their order: each is as likely as any other, from as many subjects as can be.

    Subjects stand one after another in a random order, and a systematic sample of that row of items is taken.
    """
    if not count or len(rows) <= count:
        return list(rows)
    rng = random.Random(f"excise draw {seed}")
    by_cluster: dict[Hashable, list[int]] = {}
    for place in rng.sample(range(len(rows)), k=len(rows)):
        by_cluster.setdefault(clusters[place], []).append(place)
    line = [place for members in by_cluster.values() for place in members]
    step, start = len(line) / count, rng.random()
    return [rows[place] for place in sorted(line[int((number + start) * step)] for number in range(count))]
