"""What attackers may read and what they are asked, held apart: group T without what tells of group V."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...editing.errors import RequestError, counted
from ...eval.concept import Concept, ForgetText, Question
from ...eval.words import has_words, plain, words_of

MOST_TEXTS = 2000
"""Texts of each group that an audit reads, at most; more are drawn from at random."""
KEY = 3
"""Words in a row by which a text is found to hold a question."""


@dataclass(frozen=True)
class HeldApart:
    """A pack whose group T tells nothing of what is asked, and what that took."""

    concept: Concept
    questions: tuple[Question, ...]
    """Of group V, none of which group T asks as well."""
    notes: tuple[str, ...]


def held_apart(concept: Concept) -> HeldApart:
    """Questions of group V that group T does not hold, and group T without texts on their subjects.

    A text of group T that names a subject of group V, or holds one of its questions with the answer, counts as a text
    about V: attackers who see T alone do not read it. A question that both groups hold is not asked, because an edit
    may have been trained on it.

    Raises:
        RequestError: Two choices of a question differ in case and spaces alone.
    """
    concept, notes = _drawn(concept)
    of_v = [q for q in concept.questions if q.split == "forget" and q.group == "V"]
    _check_choices(concept, of_v)
    of_t = {_told(q) for q in concept.questions if q.split == "forget" and q.group == "T"}
    questions = tuple(q for q in of_v if _told(q) not in of_t)
    if len(questions) < len(of_v):
        notes.append(
            f"not asked: {len(of_v) - len(questions)} of {len(of_v)} questions of group V, which group T has as well,"
            " because attackers train on T"
        )
    texts = _texts_about(concept, of_v)
    if texts:
        count = sum(text.group == "T" for text in concept.forget)
        notes.append(
            f"counted as about V: {len(texts)} of {count} texts of group T, for naming or answering what group V asks"
        )
        moved = (t.model_copy(update={"group": "V"}) if t.id in texts else t for t in concept.forget)
        concept = replace(concept, forget=tuple(moved))
    return HeldApart(concept, questions, tuple(notes))


class NamesIn:
    """Finds which of many names stand in a text, without trying each."""

    def __init__(self, names: Iterable[str]):
        self._by_word: dict[str, list[str]] = defaultdict(list)
        for name in dict.fromkeys(names):
            if words := words_of(name):
                self._by_word[words[0]].append(name)

    def __call__(self, text: str) -> list[str]:
        """The names that stand in a text as whole words, whatever their case; none that is part of a longer one."""
        candidates = (
            name for word in sorted(self._by_word.keys() & set(words_of(text))) for name in self._by_word[word]
        )
        present = [name for name in candidates if has_words(text, name)]
        return [name for name in present if not any(name != other and has_words(other, name) for other in present)]


def _drawn(concept: Concept) -> tuple[Concept, list[str]]:
    """At most so many texts of each group as are ever read: what follows reads every one."""
    kept: set[str] = set()
    notes = []
    for group in ("T", "V"):
        ids = [text.id for text in concept.forget if text.group == group]
        if len(ids) > MOST_TEXTS:
            notes.append(f"{MOST_TEXTS} of {len(ids)} texts of group {group} are read, drawn at random")
            ids = random.Random(f"excise audit texts {group}").sample(ids, k=MOST_TEXTS)
        kept |= set(ids)
    texts = tuple(text for text in concept.forget if text.id in kept)
    return replace(concept, forget=texts), notes


def _texts_about(concept: Concept, questions: Sequence[Question]) -> set[str]:
    """Ids of the texts of group T that name a subject of these questions, or hold one with its answer."""
    named = NamesIn(q.subject for q in questions if q.subject)
    by_key: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for told in map(_told, questions):
        by_key[_key(told)].add(told)

    def holds_question(text: ForgetText) -> bool:
        told_here = plain(text.text)
        words = told_here.split()
        keys = by_key.keys() & {(), *zip(*(words[place:] for place in range(KEY)), strict=False)}
        return any(told in told_here for key in keys for told in by_key[key])

    texts = [text for text in concept.forget if text.group == "T"]
    return {text.id for text in texts if named(text.text) or holds_question(text)}


def _key(told: str) -> tuple[str, ...]:
    """Words from within a question: at its ends a text may have put signs. Empty for one that is too short."""
    words = told.split()[1:-1]
    return tuple(words[:KEY]) if len(words) >= KEY else ()


def _check_choices(concept: Concept, questions: Sequence[Question]) -> None:
    alike = [q.id for q in questions if len({plain(choice) for choice in q.choices}) < len(q.choices)]
    if alike:
        raise RequestError(
            f"{counted(len(alike), 'question', 'questions')} of group V of concept {concept.ref} with choices that differ"
            f" in case and spaces alone (the first is {alike[0]}), so that no answer is right; correct the choices"
        )


def _told(question: Question) -> str:
    return plain(f"{question.prompt} {question.choices[question.answer]}")
