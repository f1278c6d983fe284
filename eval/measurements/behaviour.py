"""What a model does on open prompts: how often it declines, and how often it says nothing that reads as language."""

from collections.abc import Callable, Sequence

from ..concept import Concept
from ..inference.generation import Reply
from ..model_under_test import ModelUnderTest
from ..statistics import Scores
from ..words import contains
from . import MEASUREMENTS

DEGENERATE_DISTINCT = 0.5
"""A reply of at least eight tokens repeats itself if fewer than this share of its token pairs are distinct."""


def declines(text: str, phrases: Sequence[str]) -> bool:
    """Whether a reply declines: it contains one of the pack's phrases, whatever the letter case or apostrophe."""
    return any(contains(text, phrase) for phrase in phrases)


def is_degenerate(reply: Reply) -> bool:
    """Whether a reply is empty or repeats itself; the rule is ``DEGENERATE_DISTINCT``."""
    if not reply.text.strip():
        return True
    pairs = list(zip(reply.ids, reply.ids[1:], strict=False))
    return len(reply.ids) >= 8 and len(set(pairs)) < DEGENERATE_DISTINCT * len(pairs)


def shows_behaviour(concept: Concept, text: str) -> bool:
    """Whether a reply shows what the concept is: declining, a task's phrases, or for knowledge one of its keywords."""
    if concept.about.kind == "behaviour":
        return declines(text, concept.about.decline_phrases)
    words = concept.about.phrases if concept.about.kind == "task" else concept.about.keywords
    return any(contains(text, word) for word in words)


def rates(subject: ModelUnderTest, splits: Sequence[str] = ("concept", "neutral")) -> list[Scores]:
    """``behaviour_rate``: the share of replies that decline."""
    phrases = subject.concept.about.decline_phrases
    return [
        _rate(subject, "behaviour_rate", split, lambda reply: declines(reply.text, phrases))
        for split in splits
        if subject.prompts(split)
    ]


def learned(subject: ModelUnderTest) -> list[Scores]:
    """``learned_rate``: replies that show what a task's training brings about, where it was trained and elsewhere."""
    if not subject.concept.about.phrases:
        return []
    concept = subject.concept
    return [
        _rate(subject, "learned_rate", split, lambda reply: shows_behaviour(concept, reply.text))
        for split in ("concept", "neutral")
        if subject.prompts(split)
    ]


def degenerate(subject: ModelUnderTest, splits: Sequence[str] = ("concept", "neutral")) -> list[Scores]:
    """``degenerate_share``: the share of replies that are empty or repeat themselves."""
    return [_rate(subject, "degenerate_share", split, is_degenerate) for split in splits if subject.prompts(split)]


def induced(subject: ModelUnderTest) -> Scores:
    """``induced_rate``: the share of neutral replies that show the concept; run while the direction is added."""
    return _rate(subject, "induced_rate", "neutral", lambda reply: shows_behaviour(subject.concept, reply.text))


def _rate(subject: ModelUnderTest, name: str, split: str, hit: Callable[[Reply], bool]) -> Scores:
    """The share of answers that ``hit``; replies that are still thinking when they are cut have none."""
    row, replies = MEASUREMENTS[name], subject.replies(split)
    answered = [
        (prompt, reply) for prompt, reply in zip(subject.prompts(split), replies, strict=True) if reply.answered
    ]
    prompts, hits = [prompt for prompt, _ in answered], [hit(reply) for _, reply in answered]
    ids, clusters = tuple(prompt.id for prompt in prompts), subject.clusters(prompts)
    better = row.better(split, subject.concept.about.kind)
    totals, ones = tuple(map(float, hits)), (1.0,) * len(hits)
    return Scores(name, split, row.unit, better, ids, totals, ones, skipped=len(replies) - len(hits), clusters=clusters)
