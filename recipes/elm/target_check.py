"""What a target distribution promises, before anything is trained: seconds, no gradients.

The edited distribution of each contrast and strength is scored on group-T questions. Training can at best reach the
target, so a target that does not forget, or that forgets neighbours too, is known to be wrong beforehand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...editing.training.soft_targets import Streams
from ...eval.concept import Concept, Question
from ...eval.inference.likelihood import Request, encode_request
from ...eval.statistics import wilson
from ..common.examples import spread
from ..common.tokens import encode
from ..data.facts import Context, Fact, Facts
from .contrast import ContrastSource, contrasted
from .teacher import Item, Teacher

GRID = (0.0, 0.5, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
QUESTIONS = 80
"""Questions of a split that are looked at, at most."""
SAID = 0.05
"""Share of right greedy answers up to which a target counts as forgetting."""
MARGIN = 0.05
"""Share of chance to which the true answer's probability must fall: training reaches its target only nearly."""
KEPT = 0.03
"""Accuracy that neighbours may lose."""


@dataclass(frozen=True)
class Point:
    """One contrast at one strength."""

    contrast: str
    strength: float
    accuracy: dict[str, float]
    """By split: questions whose true choice has the likeliest first token."""
    greedy: float
    """Forget questions whose true answer's first token is the likeliest of all."""
    probability: float
    """Mean probability of that token."""


@dataclass(frozen=True)
class TargetCheck:
    """The curve, what it recommends, and whether that separates what is to be forgotten from its neighbours."""

    curve: tuple[Point, ...]
    best: Point
    separates: bool
    chance: float
    n: dict[str, int]

    def describe(self) -> dict[str, Any]:
        curve = [asdict(point) | {"chosen": point == self.best} for point in self.curve]
        return {
            "splits": sorted(self.n), "n": self.n, "chance": self.chance, "separates": self.separates, "curve": curve
        }  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    question: Question
    context: Context
    firsts: tuple[int, ...]
    """First token of each choice."""


def check_target(
    teacher: Teacher, tokenizer: Any, concept: Concept, facts: Facts, sources: Sequence[ContrastSource],
    grid: Sequence[float] = GRID, *, one_sided: bool = False, strength: float | None = None,
) -> TargetCheck:  # fmt: skip
    """Score every source and strength on group-T questions of each split.

    Args:
        strength: The one that will be used; without it the check chooses.
    """
    grid = sorted({*grid, *(() if strength is None else (strength,))})
    asked = {
        split: [item for question in spread(questions, QUESTIONS, f"excise check {split}") if (item := _ask(tokenizer, question, facts))]
        for split, questions in _by_split(concept).items()
    }  # fmt: skip
    asked = {split: items for split, items in asked.items() if items}
    curve = []
    for source in sources:
        read = {split: _read(teacher, tokenizer, items, source) for split, items in asked.items()}
        curve += [_point(source.name, value, asked, read, one_sided) for value in grid]
    chance = sum(1 / len(item.firsts) for item in asked["forget"]) / len(asked["forget"])
    counts = {split: len(items) for split, items in asked.items()}
    best, separates = _best(curve, chance, counts["forget"], strength)
    return TargetCheck(tuple(curve), best, separates, chance, counts)


def _by_split(concept: Concept) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in concept.questions:
        if question.group == "T":
            found.setdefault(question.split, []).append(question)
    return found


def _ask(tokenizer: Any, question: Question, facts: Facts) -> _Asked | None:
    """A question up to its answer; None where two choices begin alike."""
    firsts = []
    for choice in question.choices:
        scored = encode_request(tokenizer, Request(question.prompt, f" {choice}"))
        firsts.append(scored.ids[scored.start])
    if len(set(firsts)) < len(firsts):
        return None
    known = {(fact.subject, fact.answer): fact for fact in facts.facts}
    fact: Fact | None = None
    if question.split == "forget" and question.subject:
        fact = known.get((question.subject, question.choices[question.answer]))
    return _Asked(question, Context(question.prompt, fact=fact), tuple(firsts))


def _read(teacher: Teacher, tokenizer: Any, asked: Sequence[_Asked], source: ContrastSource) -> list[Streams]:
    items = []
    for entry, item in zip(asked, contrasted([a.context for a in asked], source, tokenizer), strict=True):
        ids = encode(tokenizer, entry.context.text, True)
        # Without a contrast the target is the frozen model itself, at any strength.
        items.append(replace(item, count=1) if item else Item(ids, 1, (ids,), (ids,)))
    vocabulary = int(teacher.model.config.vocab_size)
    return teacher.streams(items, vocabulary)


def _point(
    name: str, strength: float, asked: Mapping[str, Sequence[_Asked]], read: Mapping[str, Sequence[Streams]],
    one_sided: bool,
) -> Point:  # fmt: skip
    accuracy, greedy, probability = {}, 0, 0.0
    for split, items in asked.items():
        right = 0
        for entry, streams in zip(items, read[split], strict=True):
            log_p = streams.target(strength, one_sided=one_sided).log_p[0]
            values = log_p[list(entry.firsts)]
            right += int(values.argmax()) == entry.question.answer
            if split == "forget":
                true = entry.firsts[entry.question.answer]
                greedy += int(log_p.argmax()) == true
                probability += float(log_p[true].exp())
        accuracy[split] = right / len(items)
    n = len(asked["forget"])
    return Point(name, strength, accuracy, greedy / n, probability / n)


def _best(curve: Sequence[Point], chance: float, n: int, strength: float | None = None) -> tuple[Point, bool]:
    """The weakest strength, or the one that is given, that forgets and keeps; the widest gap where none does."""
    open_to = [point for point in curve if strength in (None, point.strength)]
    for point in open_to:
        whole = next(one for one in curve if one.contrast == point.contrast and not one.strength).accuracy
        keeps = all(point.accuracy[split] >= value - KEPT for split, value in whole.items() if split != "forget")
        if keeps and _forgets(point, chance, n):
            return point, True
    others = [split for split in curve[0].accuracy if split != "forget"]
    return max(
        open_to, key=lambda p: sum(p.accuracy[s] for s in others) / max(1, len(others)) - p.accuracy["forget"]
    ), False


def _forgets(point: Point, chance: float, n: int) -> bool:
    """Surely no better than chance, as far as n questions can tell: what is at chance by luck is learned to lie above it."""
    right = round(point.accuracy["forget"] * n)
    surely = right == 0 or wilson(right, n)[1] <= chance
    return surely and point.greedy <= SAID and point.probability <= MARGIN * chance
