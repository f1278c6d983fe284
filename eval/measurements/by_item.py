"""Measurements that are one value an item, as the table names them."""

from collections.abc import Sequence

from ..items import Item
from ..model_under_test import ModelUnderTest
from ..statistics import Scores
from . import MEASUREMENTS


def scored(
    subject: ModelUnderTest,
    name: str,
    split: str,
    rows: Sequence[Item],
    values: Sequence[float],
    skipped: int = 0,
    *,
    exponential: bool = False,
) -> Scores:
    """One value of each row, each of the same weight, with the row's subject.

    Args:
        subject: The model that was measured.
        name: The measurement's name in the table.
        split: The split that the rows count in.
        rows: What was measured.
        values: One for each row.
        skipped: How many rows of the split could not be measured.
        exponential: The values are logarithms, of whose mean the exponential is told.
    """
    about = MEASUREMENTS[name]
    return Scores(
        name,
        split,
        about.unit,
        about.better(split, subject.concept.about.kind),
        tuple(row.id for row in rows),
        tuple(map(float, values)),
        (1.0,) * len(rows),
        exponential=exponential,
        skipped=skipped,
        clusters=subject.clusters(rows),
    )
