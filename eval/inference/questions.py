"""A pack's questions by split, and the requests that score their choices."""

from ..concept import SPLITS, Concept, Question
from ..drawing import drawn
from ..items import clusters_of, unseen
from .likelihood import Request


def split_of(question: Question) -> str:
    """The split that a question counts in: ``forget_T``, ``forget_V``, or the split that its line names."""
    return f"forget_{question.group}" if question.split == "forget" else question.split


def questions_by_split(concept: Concept, most: int = 0) -> dict[str, list[Question]]:
    """Questions by split, at most ``most`` per split, drawn at random over subjects; 0 takes all.

    Of what should stay, those that no training sees.
    """
    by_split: dict[str, list[Question]] = {name: [] for name in SPLITS}
    for question in concept.questions:
        by_split[split_of(question)].append(question)
    for name in ("neighbour", "retain"):
        by_split[name] = unseen(by_split[name])
    return {
        name: drawn(items, clusters_of(concept, items), most, f"questions {name}")
        for name, items in by_split.items()
        if items
    }


def requests_of(question: Question) -> list[Request]:
    """One request per choice; all of them share the forward of the prompt."""
    return [Request(question.prompt, f" {choice}") for choice in question.choices]
