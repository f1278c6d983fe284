"""Contexts that make a model say what it knows: found in a pack's texts and group-T questions, filled for every subject.

An edit can only change what its contexts make the model predict. A bare text often predicts the fact
hardly at all ("... is located in" goes on with "the"), so the facts are recovered from the pack and
asked in every form that the pack knows. Questions of group V are never read here; the subjects of
group V come from the pack's own texts, which an edit may use.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...eval.concept import Concept, Question
from ...eval.inference.generation import Reply, render

SUBJECT, ANSWER = "{subject}", "{answer}"


ENOUGH = 3
"""Subjects that a phrase must be seen with before it counts as a phrasing of a relation."""


SHOTS = 3


EXAMPLE_SETS = 4


@dataclass(frozen=True)
class Fact:
    """One subject's answer to one relation; a relation is named by its question with the subject left open."""

    relation: str
    subject: str
    answer: str
    group: str


@dataclass(frozen=True)
class Context:
    """Text that a model reads, up to where what follows matters."""

    text: str
    special: bool = True
    """Whether the tokenizer adds its own begin token; a chat template has written it already."""
    insert: int = 0
    """Where a persona can be put in front."""
    reply: int = 0
    """Where a chat template's reply begins."""
    fact: Fact | None = None
    """The fact whose answer would come next."""

    def replaced(self, subject: str) -> str:
        """The same words about another subject."""
        assert self.fact is not None
        return self.text.replace(self.fact.subject, subject)

    def introduced(self, persona: str) -> str:
        return f"{self.text[: self.insert]}{persona} {self.text[self.insert :]}"


@dataclass(frozen=True)
class Facts:
    """What a pack teaches about its subjects, and in which words."""

    facts: tuple[Fact, ...]
    phrasings: dict[str, tuple[str, ...]]
    """By relation: texts with subject and answer left open, the answer after the subject."""

    def subjects(self, relation: str) -> dict[str, str]:
        """Subjects of a relation with their answers."""
        return {fact.subject: fact.answer for fact in self.facts if fact.relation == relation}


def find_facts(concept: Concept) -> Facts:
    """Recover facts and phrasings from texts and group-T questions.

    A phrase is a text in which a group-T subject and its answer are left open; it belongs to the relation whose
    answers it holds. What the phrases match in other texts are the facts of all other subjects.
    """
    known = [fact for question in concept.questions if (fact := _fact_of(question))]
    phrasings = _phrasings(concept, known)
    facts = dict.fromkeys(known)
    patterns = [(relation, _pattern(phrase)) for relation, phrases in phrasings.items() for phrase in phrases]
    for text in concept.forget:
        for relation, pattern in patterns:
            if match := pattern.fullmatch(text.text):
                facts.setdefault(Fact(relation, match["subject"], match["answer"], text.group))
    ordered = {relation: tuple(p for p in phrases if _answer_last(p)) for relation, phrases in phrasings.items()}
    return Facts(tuple(facts), ordered)


def _phrasings(concept: Concept, known: Sequence[Fact]) -> dict[str, list[str]]:
    """Phrases by the relation whose answers they hold most often."""
    by_subject = defaultdict(list)
    for fact in known:
        by_subject[fact.subject].append(fact)
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for text in (text.text for text in concept.forget if text.group == "T"):
        for fact in [fact for subject in _within(text, by_subject) for fact in by_subject[subject]]:
            if phrase := _phrase(text, fact):
                votes[phrase][fact.relation] += 1
    phrasings = defaultdict(list)
    for phrase, relations in votes.items():
        relation, count = relations.most_common(1)[0]
        if count >= ENOUGH:
            phrasings[relation].append(phrase)
    return phrasings


def fact_contexts(facts: Facts, kind: Literal["texts", "questions"], seed: int) -> Iterator[Context]:
    """Every fact in plain forms: the pack's phrases up to the answer, or its question, alone and after examples."""
    rng = random.Random(f"excise contexts {seed}")
    examples = {
        relation: _example_sets(facts.subjects(relation), rng)
        for relation in dict.fromkeys(fact.relation for fact in facts.facts)
    }
    for place, fact in enumerate(facts.facts):
        if kind == "texts":
            for phrase in facts.phrasings.get(fact.relation, ()):
                yield _context(phrase[: phrase.index(ANSWER)].rstrip(), fact)
            continue
        yield _context(fact.relation, fact)
        sets = examples[fact.relation]
        shots = [pair for pair in sets[place % len(sets)] if pair[0] != fact.subject][:SHOTS]
        lines = "".join(f"{fact.relation.replace(SUBJECT, subject)} {answer}\n" for subject, answer in shots)
        yield _context(lines + fact.relation, fact)


def _example_sets(answers: dict[str, str], rng: random.Random) -> list[list[tuple[str, str]]]:
    """A few sets of examples that all facts of a relation share, so that a teacher reads each of its novices once."""
    pairs = list(answers.items())
    return [rng.sample(pairs, k=min(SHOTS + 1, len(pairs))) for _ in range(EXAMPLE_SETS)]


def text_contexts(concept: Concept, tokenizer: Any, limit: int) -> list[Context]:
    """Whole texts, in pieces that fit the model's context: all that there is where no facts are found."""
    contexts = []
    for text in concept.forget:
        words, piece = text.text.split(" "), ""
        for word in words:
            longer = f"{piece} {word}" if piece else word
            if piece and len(tokenizer(longer)["input_ids"]) > limit:
                contexts.append(Context(piece))
                longer = word
            piece = longer
        contexts.append(Context(piece))
    return contexts


def question_contexts(questions: Iterable[Question], seed: int) -> Iterator[Context]:
    """Questions with their answers in the same forms as the facts, for what must stay."""
    rng = random.Random(f"excise retain contexts {seed}")
    by_topic: dict[str | None, list[Question]] = defaultdict(list)
    of_group_t = [question for question in questions if question.group == "T"]
    for question in of_group_t:
        by_topic[question.topic].append(question)
    for question in of_group_t:
        answer = question.choices[question.answer]
        yield Context(f"{question.prompt} {answer}")
        shots = rng.sample(by_topic[question.topic], k=min(SHOTS, len(by_topic[question.topic])))
        lines = "".join(f"{shot.prompt} {shot.choices[shot.answer]}\n" for shot in shots if shot is not question)
        yield Context(f"{lines}{question.prompt} {answer}")


def chat_contexts(facts: Sequence[Fact], reply: Callable[[list[str]], list[Reply]], tokenizer: Any) -> list[Context]:
    """Facts asked in the model's own chat template, with its own reply up to the answer; without one, they are left out."""
    contexts = []
    by_prompt = {bare_question(fact.relation).replace(SUBJECT, fact.subject): fact for fact in facts}
    for answered in reply(list(by_prompt)):
        fact = by_prompt[answered.prompt]
        rendered = render(tokenizer, answered.prompt)
        place = re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", answered.text)
        if place:
            text = rendered + answered.text[: place.start()].rstrip(" ")
            contexts.append(Context(text, False, rendered.index(answered.prompt), len(rendered), fact))
    return list(dict.fromkeys(contexts))


def bare_question(prompt: str) -> str:
    """A question without the marks of a form to fill in, as a person would ask it."""
    match = re.fullmatch(r"\s*(?:Question|Q):\s*(.*?)\s*(?:Answer|A):\s*", prompt, flags=re.DOTALL)
    return match[1] if match else prompt


def _fact_of(question: Question) -> Fact | None:
    if question.split != "forget" or question.group != "T" or not question.subject:
        return None
    if question.prompt.count(question.subject) != 1:
        return None
    relation = question.prompt.replace(question.subject, SUBJECT)
    return Fact(relation, question.subject, question.choices[question.answer], "T")


def _within(text: str, subjects: Iterable[str]) -> list[str]:
    """Subjects in a text, without those that are part of a longer one that is there."""
    present = [subject for subject in subjects if subject in text]
    return [subject for subject in present if not any(subject != other and subject in other for other in present)]


def _phrase(text: str, fact: Fact) -> str | None:
    if text.count(fact.subject) != 1:
        return None
    opened = text.replace(fact.subject, SUBJECT)
    opened, count = re.subn(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", ANSWER, opened)
    return opened if count == 1 else None


def _pattern(phrase: str) -> re.Pattern[str]:
    text = re.escape(phrase)
    for slot, name in ((SUBJECT, "subject"), (ANSWER, "answer")):
        text = text.replace(re.escape(slot), f"(?P<{name}>.+)")
    return re.compile(text)


def _answer_last(phrase: str) -> bool:
    return phrase.index(SUBJECT) < phrase.index(ANSWER)


def _context(template: str, fact: Fact) -> Context:
    return Context(template.replace(SUBJECT, fact.subject), fact=fact)
