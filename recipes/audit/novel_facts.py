"""Facts that nobody knows, in a pack's own words: the reference of an audit without a model that never learned it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...eval.concept import Concept, Question
from ..data.facts import Facts


def novel_facts(facts: Facts, questions: Sequence[Question], seed: int) -> tuple[Facts, list[Question]]:
    """The same relations, words and answers about subjects that do not exist; and the pack's questions, asked about
    them."""
    rng = random.Random(f"excise novel facts {seed}")
    names = invented_names(sorted({fact.subject for fact in facts.facts}), rng)
    answers = _assigned(facts, questions, rng)
    novel = tuple(
        replace(fact, subject=names[fact.subject], answer=answers[fact.subject, fact.answer]) for fact in facts.facts
    )
    novel_questions = []
    for q in questions:
        answer = answers.get((q.subject, q.choices[q.answer])) if q.subject else None
        # Without the new answer among its choices a question cannot be asked; the audit says how many could be.
        if answer and q.subject and answer in q.choices:
            prompt, subject = q.prompt.replace(q.subject, names[q.subject]), names[q.subject]
            update = {"prompt": prompt, "subject": subject, "answer": q.choices.index(answer)}
            novel_questions.append(q.model_copy(update=update))
    return Facts(novel, facts.phrasings), novel_questions


def novel_concept(concept: Concept, facts: Facts, questions: Sequence[Question]) -> Concept:
    """The pack with its forget questions and texts replaced by those about novel facts."""
    others = (q for q in concept.questions if q.split != "forget")
    return replace(concept, questions=(*questions, *others), forget=_texts(concept, facts))


def _texts(concept: Concept, facts: Facts) -> tuple[Any, ...]:
    """One text a fact, for attacks that quote texts."""
    texts = []
    for number, fact in enumerate(facts.facts):
        for wording in facts.phrasings.get(fact.relation, ())[:1]:
            text = wording.replace("{subject}", fact.subject).replace("{answer}", fact.answer)
            update = {"id": f"novel-{number}", "text": text, "group": fact.group}
            texts.append(concept.forget[0].model_copy(update=update))
    return tuple(texts)


def _assigned(facts: Facts, questions: Sequence[Question], rng: random.Random) -> dict[tuple[str, str], str]:
    """A new answer of the same kind for each subject and answer: a subject may have several facts."""
    wrong = {
        (q.subject, q.choices[q.answer]): [c for i, c in enumerate(q.choices) if i != q.answer]
        for q in questions
        if q.subject
    }
    by_relation: dict[str, list[str]] = {}
    for fact in facts.facts:
        by_relation.setdefault(fact.relation, []).append(fact.answer)
    assigned: dict[tuple[str, str], str] = {}
    for fact in facts.facts:
        key = (fact.subject, fact.answer)
        if key not in assigned:
            # A wrong choice of the same question is an answer of the same kind, and its question can still be asked.
            assigned[key] = rng.choice(wrong.get(key) or sorted(set(by_relation[fact.relation])))
    return assigned


def invented_names(subjects: Sequence[str], rng: random.Random) -> dict[str, str]:
    """New names from halves of the old ones."""
    ends = list(subjects)
    rng.shuffle(ends)
    taken, names = set(subjects), {}
    for start, end in zip(subjects, ends, strict=True):
        name = _half(start, 0) + _half(end, 1)
        while name in taken:
            name += rng.choice("aeiou") + rng.choice("lnrst")
        taken.add(name)
        names[start] = name
    return names


def _half(name: str, part: int) -> str:
    words = name.split(" ")
    if len(words) > 1:
        middle = (len(words) + 1) // 2
        return " ".join(words[:middle]) + " " if part == 0 else " ".join(words[middle:])
    return name[: (len(name) + 1) // 2] if part == 0 else name[(len(name) + 1) // 2 :]
