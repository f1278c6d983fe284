"""How far a model moved from its base: KL(base || model) along the base's neutral replies and retain texts."""

from collections.abc import Sequence

import torch

from ..inference.generation import Reply
from ..inference.kept import Kept, divergences
from ..items import Item
from ..model_under_test import ModelUnderTest
from ..statistics import Scores
from . import MEASUREMENTS


def scores(subject: ModelUnderTest) -> list[Scores]:
    """Mean nats per token; nothing for the base itself, whose divergence is 0 by definition."""
    base = subject.base
    if base is None:
        return []
    return [
        _along(subject, "neutral", base.prompts, base.replies, base.distributions),
        _along(subject, "retain", base.rows, base.texts, base.text_distributions),
    ]


def _along(
    subject: ModelUnderTest, split: str, rows: Sequence[Item], replies: Sequence[Reply], expected: Sequence[Kept]
) -> Scores:
    nats = divergences(subject.model, replies, expected)
    row = MEASUREMENTS["kl_from_base"]
    totals, weights = tuple(float(item.sum()) for item in nats), tuple(float(len(item)) for item in nats)
    return Scores(
        "kl_from_base",
        split,
        row.unit,
        row.better(split),
        tuple(item.id for item in rows),
        totals,
        weights,
        clusters=subject.clusters(rows),
        as_one=float(torch.cat([item.rest for item in expected]).mean()) if expected else 0.0,
    )
