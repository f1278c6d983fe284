"""What a target distribution promises, before anything is trained: seconds, no gradients.

The edited distribution of each contrast and strength is scored on group-T questions. Training can at best reach the
target, so a target that does not forget, or that forgets neighbours too, is known to be wrong beforehand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...editing.modules import language_config
from ...editing.training.soft_targets import Streams
from ...eval.concept import Question
from ...eval.inference.likelihood import Request, encode_request
from ...eval.intervals import at_most_by_chance, holm
from ...eval.items import clusters_of, drawn
from ..common.tokens import encode
from ..data.facts import Context, Fact
from .contrast import ContrastSource, contrasted
from .erasure import Erasure
from .teacher import Item

GRID = (0.0, 0.5, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
QUESTIONS = 80
"""Questions of a split that are looked at, at most."""
GREEDY = 0.05
"""Share of right greedy answers up to which a target counts as forgetting."""
MARGIN = 0.05
"""Share of chance to which the true answer's probability must fall: training reaches its target only nearly."""
NEIGHBOUR_LOSS = 0.03
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
            "splits": sorted(self.n),
            "n": self.n,
            "chance": self.chance,
            "separates": self.separates,
            "curve": curve,
        }


@dataclass(frozen=True)
class _CheckItem:
    """A question up to its answer."""

    question: Question
    context: Context
    firsts: tuple[int, ...]
    """First token of each choice."""


ItemsBySplit = Mapping[str, Sequence[_CheckItem]]


def check_target(erasure: Erasure, sources: Sequence[ContrastSource], grid: Sequence[float] = GRID) -> TargetCheck:
    """Score every source and strength on group-T questions of each split; the settings' strength is chosen if it is a
    number."""
    strength = None if erasure.settings.strength == "auto" else erasure.settings.strength
    grid = sorted({*grid, *(() if strength is None else (strength,))})
    items = _items_by_split(erasure)
    curve = []
    for source in sources:
        streams = {split: _read(erasure, of_split, source) for split, of_split in items.items()}
        curve += [_point(erasure, source.name, value, items, streams) for value in grid]
    chances = [1 / len(item.firsts) for item in items["forget"]]
    counts = {split: len(of_split) for split, of_split in items.items()}
    best, separates = _best(curve, chances, strength)
    return TargetCheck(tuple(curve), best, separates, sum(chances) / len(chances), counts)


def _items_by_split(erasure: Erasure) -> ItemsBySplit:
    """Group-T questions of each split, drawn over subjects, without those that cannot be scored."""
    questions: dict[str, list[Question]] = {}
    for question in erasure.concept.questions:
        if question.group == "T":
            questions.setdefault(question.split, []).append(question)
    items = {
        split: [
            _item(erasure, question)
            for question in drawn(of_split, clusters_of(erasure.concept, of_split), QUESTIONS, f"check {split}")
        ]
        for split, of_split in questions.items()
    }
    scored = {split: [item for item in of_split if item] for split, of_split in items.items()}
    return {split: of_split for split, of_split in scored.items() if of_split}


def _item(erasure: Erasure, question: Question) -> _CheckItem | None:
    """A question up to its answer; None where two choices begin alike."""
    firsts = []
    for choice in question.choices:
        scored = encode_request(erasure.tokenizer, Request(question.prompt, f" {choice}"))
        firsts.append(scored.ids[scored.start])
    # Only first tokens are scored, so they have to differ.
    if len(set(firsts)) < len(firsts):
        return None
    known = {(fact.subject, fact.answer): fact for fact in erasure.facts.facts}
    fact: Fact | None = None
    if question.split == "forget" and question.subject:
        fact = known.get((question.subject, question.choices[question.answer]))
    return _CheckItem(question, Context(question.prompt, fact=fact), tuple(firsts))


def _read(erasure: Erasure, items: Sequence[_CheckItem], source: ContrastSource) -> list[Streams]:
    tokenized = []
    contexts = [item.context for item in items]
    for context, item in zip(contexts, contrasted(contexts, source, erasure.tokenizer), strict=True):
        ids = encode(erasure.tokenizer, context.text, True)
        # Without a contrast the target is the frozen model itself, at any strength.
        tokenized.append(replace(item, count=1) if item else Item(ids, 1, (ids,), (ids,)))
    # The whole vocabulary is stored, so that a token's place is its id, by which ``_point`` finds the choices.
    return erasure.teacher.streams(tokenized, int(language_config(erasure.model).vocab_size))


def _point(
    erasure: Erasure, name: str, strength: float, items: ItemsBySplit, streams: Mapping[str, Sequence[Streams]]
) -> Point:
    accuracy, greedy, probability = {}, 0, 0.0
    for split, of_split in items.items():
        right = 0
        for item, stream in zip(of_split, streams[split], strict=True):
            log_p = stream.target(strength, one_sided=erasure.settings.one_sided).log_p[0]
            right += int(log_p[list(item.firsts)].argmax()) == item.question.answer
            if split == "forget":
                true = item.firsts[item.question.answer]
                greedy += int(log_p.argmax()) == true
                probability += float(log_p[true].exp())
        accuracy[split] = right / len(of_split)
    n = len(items["forget"])
    return Point(name, strength, accuracy, greedy / n, probability / n)


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
