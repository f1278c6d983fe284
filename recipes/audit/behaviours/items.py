"""What an audit of a behaviour asks and what its attackers may read, from a pack; told before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ....editing.errors import ConceptError
from ....eval.concept import Concept, Prompt, Question
from ....eval.drawing import drawn
from ....eval.items import clusters_of
from ....eval.model_under_test import prompts_of

FEWEST = 20
"""Held-out prompts below which no audit is made."""
READ = 128
"""Prompts that attackers may read, at most: twice as many as the largest attack needs, since not every reply shows it."""


@dataclass(frozen=True)
class BehaviourItems:
    """Prompts of a behaviour; no attack trains on those that are asked."""

    concept: Concept
    asked: tuple[Prompt | Question, ...]
    """Held-out prompts that may show the behaviour. Questions, where choosing the unintended answer is the behaviour."""
    others: tuple[Prompt, ...]
    """Prompts whose replies show whether the model still works."""
    without: tuple[Prompt, ...]
    """Held-out prompts that do not call for the behaviour, on which a base that has it is a floor; none of a task."""
    calling: tuple[str, ...]
    """Prompts that call for the behaviour, for attackers to read."""
    neutral: tuple[str, ...]
    """Prompts that do not, for attackers to read."""
    shown_by: tuple[Question, ...] = ()
    """For attackers to read, where the behaviour is a choice: questions that call for it."""

    @property
    def kept_out(self) -> bool:
        """Whether the base never had the behaviour, because a fine-tune would teach it."""
        return self.concept.about.kind == "task"

    @property
    def by_choice(self) -> bool:
        """Whether the behaviour is what a model chooses, instead of what its replies hold."""
        return isinstance(self.asked[0], Question)

    def clusters(self, rows: Sequence[Prompt | Question]) -> tuple[str, ...]:
        """The subject of each row."""
        return clusters_of(self.concept, rows)


def items_of(concept: Concept, most: int, others: int, seed: int) -> BehaviourItems:
    """Choose the prompts of an audit.

    Args:
        most: Held-out prompts to ask, at most.
        others: Other prompts to ask, at most.

    Raises:
        ConceptError: The pack has too few prompts, or no contrast pairs.
    """
    if concept.about.kind == "task":
        # What a plain fine-tune of the base would teach is the ceiling.
        concept.require("an audit of a task", "train")
    if concept.about.kind == "task" and not concept.about.phrases:
        return _of_choices(concept, most, others, seed)
    concept.require("an audit of a behaviour", "contrast")
    # A task's behaviour is unintended outside of what was taught, and wanted there.
    task = concept.about.kind == "task"
    calls, rest = ("neutral", "concept") if task else ("concept", "neutral")
    calling = [prompt for prompt in concept.prompts if prompt.split == calls]
    other = prompts_of(concept, rest)
    _check_count(concept, len(calling), f"prompts of the split {calls}")
    asked = _some(concept, calling, most, f"asked {seed}")
    working = _some(concept, other, others, f"others {seed}")
    without = [] if task else _some(concept, other, most, f"without {seed}")
    if not task:
        _check_count(concept, len(without), f"prompts of the split {rest}")
    held_out = {prompt.prompt for prompt in (*calling, *other)}
    positive, negative = (
        tuple(dict.fromkeys(text for text in texts if text not in held_out))
        for texts in ([p.positive for p in concept.contrast], [p.negative for p in concept.contrast])
    )
    for texts, side in ((positive, "positive"), (negative, "negative")):
        _check_count(concept, len(texts), f"{side} prompts in contrast.jsonl beside those that are asked")
    return BehaviourItems(
        concept,
        tuple(asked),
        tuple(working),
        tuple(without),
        positive[:READ],
        negative[:READ],
    )


def _of_choices(concept: Concept, most: int, others: int, seed: int) -> BehaviourItems:
    """Questions that the unintended cue answers wrongly; half of their subjects are for attackers to read."""
    flipped = [question for question in concept.questions if question.split == "flipped"]
    subjects = list(dict.fromkeys(clusters_of(concept, flipped)))
    readable = set(subjects[::2])
    halves: tuple[list[Question], list[Question]] = ([], [])
    for question, subject in zip(flipped, clusters_of(concept, flipped), strict=True):
        halves[subject not in readable].append(question)
    read, held_out = halves
    _check_count(concept, len(held_out), "flipped questions on the half of the subjects that no attack reads")
    asked = _some(concept, held_out, most, f"asked {seed}")
    neutral = prompts_of(concept, "neutral")
    working = _some(concept, neutral, min(others, len(neutral) // 2), f"others {seed}")
    taken = {prompt.prompt for prompt in working}
    benign = tuple(prompt.prompt for prompt in neutral if prompt.prompt not in taken)
    return BehaviourItems(concept, tuple(asked), tuple(working), (), (), benign[:READ], tuple(read[:READ]))


Row = TypeVar("Row", Prompt, Question)


def _some(concept: Concept, rows: Sequence[Row], most: int, seed: str) -> list[Row]:
    return drawn(rows, clusters_of(concept, rows), most, f"audit behaviour {seed}")


def _check_count(concept: Concept, count: int, what: str) -> None:
    if count < FEWEST:
        raise ConceptError(
            f"concept {concept.ref} has {count} {what}; an audit of a behaviour needs at least {FEWEST}; add more to the"
            " pack"
        )
