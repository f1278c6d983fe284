"""A pack's questions, by split, and what is scored to answer them."""

from ..concept import SPLITS, Concept, Question
from .likelihood import Request


def split_of(question: Question) -> str:
    """The split a question is counted in: its own, with its group where it is to be forgotten."""
    return f"forget_{question.group}" if question.split == "forget" else question.split


def questions_by_split(concept: Concept, most: int = 0) -> dict[str, list[Question]]:
    """Questions of each split, at most ``most`` of one; 0 takes all."""
    by_split: dict[str, list[Question]] = {name: [] for name in SPLITS}
    for question in concept.questions:
        by_split[split_of(question)].append(question)
    return {name: items[: most or None] for name, items in by_split.items() if items}


def requests_of(question: Question) -> list[Request]:
    """One request a choice; they share their prompt's forward."""
    return [Request(question.prompt, f" {choice}") for choice in question.choices]
