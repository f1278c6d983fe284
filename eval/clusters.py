"""Which items of a pack belong together, and drawing some of them at random.

Questions on one subject, wordings of one question, windows of one text and texts about one subject are right or wrong
together. A row's ``subject`` says what it is about; where it has none, the subject of another row that its text names is
taken. Rows about which neither is known count as independent of all others, unless their text is the same.
"""

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from .concept import Concept, ForgetText, Prompt, Question, RetainText
from .words import has_words

Item = ForgetText | RetainText | Question | Prompt
T = TypeVar("T")


def clusters_of(concept: Concept, rows: Sequence[Item]) -> tuple[str, ...]:
    """The subject of each row, or its text where no subject is known."""
    named = {question.subject for question in concept.questions} | {text.subject for text in concept.forget}
    names = sorted((name for name in named if name), key=len, reverse=True)
    return tuple(row.subject or _named(text_of(row), names) or text_of(row) for row in rows)


def text_of(row: Item) -> str:
    """What a model reads of a row."""
    return row.text if isinstance(row, ForgetText | RetainText) else row.prompt


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


def _named(text: str, names: Sequence[str]) -> str | None:
    """The first of the names that stands in a text as whole words."""
    return next((name for name in names if name in text and has_words(text, name)), None)
