"""What a target distribution promises, before anything is trained: seconds, no gradients.

The edited distribution of each contrast and strength is scored on group-T questions. Training can at best reach the
target, so a target that does not forget, or that forgets neighbours too, is known to be wrong beforehand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...editing.training.edited_target import TargetEdit
from ...eval.completed import continuation_questions
from ...eval.concept import Concept, Question
from ...eval.drawing import drawn
from ...eval.intervals import at_most_by_chance, holm
from ...eval.items import clusters_of
from .contrast import ContrastSource
from .erasure import Erasure
from .target_scores import Answered, read_questions, scored

GRID = (0.0, 0.5, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
QUESTIONS = 80
"""Questions of a split that are looked at, at most."""
GREEDY = 0.05
"""Share of right greedy answers up to which a target counts as forgetting."""
MARGIN = 0.05
"""Share of chance to which the true answer's probability must fall: training reaches its target only nearly."""
NEIGHBOUR_LOSS = 0.03
"""Accuracy that neighbours may lose."""
UNCHECKED = {"personas": 500.0, "reinforced": 5.0, "subjects": 1.5, "examples": 1.5}
"""Strength where nothing can be checked: as published (ELM, appendix D; Eldan and Russinovich 2023, section 2.1), and
what the check takes most often of the two others."""


@dataclass(frozen=True)
class Point:
    """One contrast at one strength."""

    contrast: str
    strength: float
    accuracy: dict[str, float]
    """By split: questions whose true choice the target prefers."""
    greedy: float
    """Forget questions whose true answer the target would say greedily."""
    probability: float
    """Mean probability of the true answer, as far as it is scored: its first token, or all of it."""


@dataclass(frozen=True)
class TargetCheck:
    """The curve, what it recommends, and whether that separates what is to be forgotten from its neighbours."""

    curve: tuple[Point, ...]
    """Empty where nothing could be checked."""
    best: Point
    """Of a check that could not be made the contrast and strength alone say something."""
    separates: bool
    chance: float | None
    n: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    """By split: questions that were drawn and could not be scored, because no contrast reaches their answer or the
    model's context does not hold them."""
    made_of: str = "questions"
    """``questions`` of the pack, or ``texts``: which passage continues a text."""

    @property
    def unchecked(self) -> str:
        """Why there was nothing to check, in one sentence; empty where there was."""
        if self.curve:
            return ""
        lost = self.left_out.get("forget", 0)
        reason = (
            f"none of {lost} forget questions of group T could be scored"
            if lost
            else "the pack has no forget question of group T, and too few texts of group T to make one"
        )
        return (
            f"The target could not be checked: {reason}. Contrast {self.best.contrast} was taken at strength"
            f" {self.best.strength:g}; whether that forgets shows in the measurements alone."
        )

    def describe(self) -> dict[str, Any]:
        """As ``eval.json`` holds it."""
        curve = [asdict(point) | {"chosen": point == self.best} for point in self.curve]
        return {
            "splits": sorted(self.n),
            "n": self.n,
            "left_out": self.left_out,
            "made_of": self.made_of,
            "chance": self.chance,
            "separates": self.separates,
            "unchecked": self.unchecked,
            "curve": curve,
        }


def check_target(erasure: Erasure, sources: Sequence[ContrastSource], grid: Sequence[float] = GRID) -> TargetCheck:
    """Score every source and strength on group-T questions of each split; the settings' strength is chosen if it is a
    number."""
    strength = None if erasure.settings.strength == "auto" else erasure.settings.strength
    grid = sorted({*grid, *(() if strength is None else (strength,))})
    questions, made_of = _questions(erasure.concept)
    readings, left_out = {}, {}
    for split, of_split in questions.items():
        readings[split] = read_questions(erasure, sources, of_split)
        left_out[split] = len(of_split) - len(next(iter(readings[split].values())))
    counts = {split: len(next(iter(by_source.values()))) for split, by_source in readings.items()}
    counts = {split: count for split, count in counts.items() if count}
    left_out = {split: count for split, count in left_out.items() if count}
    if not counts.get("forget"):
        name = sources[0].name
        point = Point(name, UNCHECKED[name] if strength is None else strength, {}, 0.0, 0.0)
        return TargetCheck((), point, False, None, counts, left_out, made_of)
    edits = [TargetEdit(value, one_sided=erasure.settings.one_sided) for value in grid]
    curve: list[Point] = []
    for source in sources:
        by_split = {split: scored(erasure.teacher, readings[split][source.name], edits) for split in counts}
        curve += [_point(source.name, value, by_split, place) for place, value in enumerate(grid)]
    chances = [1 / len(reading.question.choices) for reading in readings["forget"][sources[0].name]]
    best, separates = _best(curve, chances, strength)
    return TargetCheck(tuple(curve), best, separates, sum(chances) / len(chances), counts, left_out, made_of)


def _questions(concept: Concept) -> tuple[dict[str, list[Question]], str]:
    """Group-T questions of each split, drawn over subjects, and what those to forget are made of."""
    questions = [question for question in concept.questions if question.group == "T"]
    made_of = "questions"
    if not any(question.split == "forget" for question in questions):
        # What group V asks is never read here, so that texts of group T alone can stand in.
        questions += continuation_questions([row for row in concept.forget if row.group == "T"], "forget", "T")
        made_of = "texts"
    by_split: dict[str, list[Question]] = {}
    for question in questions:
        by_split.setdefault(question.split, []).append(question)
    chosen = {
        split: drawn(of_split, clusters_of(concept, of_split), QUESTIONS, f"check {split}")
        for split, of_split in by_split.items()
    }
    return chosen, made_of


def _point(name: str, strength: float, by_split: Mapping[str, Sequence[Sequence[Answered]]], place: int) -> Point:
    """One strength, by its place in the grid."""
    accuracy = {
        split: sum(answers[place].right for answers in of_split) / len(of_split) for split, of_split in by_split.items()
    }
    forget = [answers[place] for answers in by_split["forget"]]
    greedy, probability = sum(one.greedy for one in forget), sum(one.probability for one in forget)
    return Point(name, strength, accuracy, greedy / len(forget), probability / len(forget))


def _best(curve: Sequence[Point], chances: Sequence[float], strength: float | None = None) -> tuple[Point, bool]:
    """The weakest strength, or the one that was asked for, that forgets and keeps; the widest gap where none does."""
    open_to = [point for point in curve if strength in (None, point.strength)]
    forgetting = _forgetting(open_to, chances)
    for place, point in enumerate(open_to):
        # At strength 0 the target is the frozen model itself.
        whole = next(one for one in curve if one.contrast == point.contrast and not one.strength).accuracy
        keeps = all(
            point.accuracy[split] >= value - NEIGHBOUR_LOSS for split, value in whole.items() if split != "forget"
        )
        if keeps and place in forgetting:
            return point, True
    others = [split for split in curve[0].accuracy if split != "forget"]
    return (
        max(open_to, key=lambda p: sum(p.accuracy[s] for s in others) / max(1, len(others)) - p.accuracy["forget"]),
        False,
    )


def _forgetting(points: Sequence[Point], chances: Sequence[float]) -> set[int]:
    """Places of those that are surely below chance: what is at chance by luck is learned to lie above it.

    Each is held against the exact distribution of guesses, and all that may be chosen are tested together. Strength 0
    is none of them: there the target is the frozen model itself.
    """
    n, chance = len(chances), sum(chances) / len(chances)
    surely = holm(
        {
            place: at_most_by_chance(round(point.accuracy["forget"] * n), chances)
            for place, point in enumerate(points)
            if point.strength
        }
    )
    return {
        place for place in surely if points[place].greedy <= GREEDY and points[place].probability <= MARGIN * chance
    }
