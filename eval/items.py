"""The items of a pack: which belong together, and which no training sees.

Questions on one subject, wordings of one question, windows of one text and texts about one subject are right or wrong
together. A row's ``subject`` says what it is about; where it has none, the subject of another row that its text names is
taken. Rows about which neither is known count as independent of all others, unless their text is the same.

What should stay is measured on what no training sees. Methods that train retain questions of group T and retain texts;
what they do there is learned, so it says nothing of how much of everything else stayed. Questions of group V are never
trained on; of the texts a quarter is held out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from .concept import (
    Concept,
    ForgetText,
    MemberText,
    OpenQuestion,
    Passage,
    Prompt,
    Question,
    RetainText,
    UnseenText,
)
from .words import has_words

Item = ForgetText | RetainText | UnseenText | MemberText | Question | OpenQuestion | Passage | Prompt
FEWEST_TEXTS = 40
"""Retain texts below which none is held out: too few would be left to learn from."""
MEASURED_ROWS = ("questions", "open_questions", "prompts", "passages", "forget", "unseen")
"""What a pack's measurements are of, beside its retain texts."""
HELD_OUT = 4
"""One text in so many is held out."""


def clusters_of(concept: Concept, rows: Sequence[Item]) -> tuple[str, ...]:
    """The subject of each row, or its text where no subject is known."""
    subjects = _subjects(_Same(concept.questions), _Same(concept.forget))
    return tuple(row.subject or subjects.named_in(text_of(row)) or text_of(row) for row in rows)


def text_of(row: Item) -> str:
    """What a model reads of a row."""
    return row.text if isinstance(row, ForgetText | RetainText | UnseenText | MemberText) else row.prompt


def unseen(questions: Sequence[Question]) -> list[Question]:
    """Questions of group V; all of them, where none is of group V."""
    held_out = [question for question in questions if question.group == "V"]
    return held_out or list(questions)


def held_out_texts(concept: Concept) -> tuple[RetainText, ...]:
    """Retain texts that no training sees, with all others on their subjects; all texts, where the pack has few.

    Texts on subjects of group-T questions come last: training sees their facts in these questions.
    """
    if concept.measured_texts is not None:
        measured = set(concept.measured_texts)
        return tuple(row for row in concept.retain if row.id in measured)
    rows, clusters = concept.retain, clusters_of(concept, concept.retain)
    if len(rows) < FEWEST_TEXTS or len(set(clusters)) < 2:
        return rows
    trained = {question.subject for question in concept.questions if question.group == "T" and question.subject}
    subjects = sorted(set(clusters))
    order = random.Random("excise held-out texts").sample(subjects, k=len(subjects))
    chosen: set[str] = set()
    count = 0
    for subject in sorted(order, key=lambda name: name in trained):
        if count >= len(rows) // HELD_OUT:
            break
        chosen.add(subject)
        count += clusters.count(subject)
    return tuple(row for row, subject in zip(rows, clusters, strict=True) if subject in chosen)


def for_training(concept: Concept) -> Concept:
    """The pack without the texts that are held out."""
    held_out = {row.id for row in held_out_texts(concept)}
    kept = tuple(row for row in concept.retain if row.id not in held_out)
    return replace(concept, retain=kept) if kept else concept


def half_of(concept: Concept, half: Literal["search", "report"]) -> Concept:
    """One half of all that is measured, for measuring alone: what chooses an edit is never what is reported of it.

    Subjects are split, so that no fact stands on both sides. What an edit trains on is not halved; give training the whole
    pack. Where a pack has no neutral prompts, both halves are measured on the same everyday ones.
    """
    kept_texts = held_out_texts(concept)
    measured: dict[str, Sequence[Item]] = {name: getattr(concept, name) for name in MEASURED_ROWS}
    measured["retain"] = kept_texts
    # In the order of kind, split and group, so that each half gets its share of each.
    place: dict[str, tuple[str, ...]] = {}
    for name, rows in measured.items():
        for row, subject in zip(rows, clusters_of(concept, rows), strict=True):
            place.setdefault(subject, (name, str(getattr(row, "split", "")), str(getattr(row, "group", ""))))
    subjects = sorted(place)
    order = dict(
        zip(random.Random("excise halves").sample(subjects, k=len(subjects)), range(len(subjects)), strict=True)
    )
    line = sorted(subjects, key=lambda subject: (place[subject], order[subject]))
    ours = set(line[0 if half == "search" else 1 :: 2])
    chosen = {
        name: tuple(row for row, subject in zip(rows, clusters_of(concept, rows), strict=True) if subject in ours)
        for name, rows in measured.items()
    }
    texts = tuple(row.id for row in chosen.pop("retain"))
    changes: dict[str, Any] = {**chosen, "measured_texts": texts}
    return replace(concept, **changes)


def measured_on(concept: Concept) -> dict[str, dict[str, int]]:
    """How many items of what should stay are measured, and of how many, by kind; others may be trained on."""
    counts = {}
    for split in ("neighbour", "retain"):
        questions = [question for question in concept.questions if question.split == split]
        if questions:
            counts[f"{split} questions"] = {"n": len(unseen(questions)), "of": len(questions)}
    return {**counts, "retain texts": {"n": len(held_out_texts(concept)), "of": len(concept.retain)}}


@dataclass(frozen=True, eq=False)
class _Same:
    """A key for caches that is equal to itself alone: rows are many, and comparing them takes longer than the work."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@dataclass(frozen=True)
class _Subjects:
    names: list[str]
    """Longest first."""
    found: dict[str, str | None] = field(default_factory=dict)

    def named_in(self, text: str) -> str | None:
        """The first of the names that stands in a text as whole words."""
        if text not in self.found:
            self.found[text] = next((name for name in self.names if name in text and has_words(text, name)), None)
        return self.found[text]


@lru_cache(maxsize=4)
def _subjects(questions: _Same, forget: _Same) -> _Subjects:
    """The subjects that a pack names. Every measurement asks for those of its rows, many times a run."""
    named = {question.subject for question in questions.value} | {text.subject for text in forget.value}
    return _Subjects(sorted((name for name in named if name), key=len, reverse=True))
