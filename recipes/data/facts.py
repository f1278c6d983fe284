"""Contexts that make a model state facts: taken from a pack's texts and group-T questions, filled in for every subject.

An edit can only change what its contexts make the model predict. A plain text often hardly predicts the fact ("... is
located in" continues with "the"). So facts are recovered from the pack and asked in every form that the pack uses.
Questions of group V are never read here; the subjects of group V come from the pack's texts, which an edit may use.
"""

import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...eval.concept import Concept, ForgetText, Question
from ...eval.inference.chat import render
from ...eval.inference.generation import Reply
from ...eval.words import whole_words
from ..common.examples import spread

SUBJECT, ANSWER = "{subject}", "{answer}"
ENOUGH = 3
"""Number of subjects with which a phrase must occur to count as a phrasing of a relation."""
SHOTS = 3
"""Examples in front of a question."""
EXAMPLE_SETS = 4
"""Sets of examples per relation."""


@dataclass(frozen=True)
class Fact:
    """The answer of one relation for one subject. A relation is named by its question with ``{subject}`` left open."""

    relation: str
    subject: str
    answer: str
    group: str


@dataclass(frozen=True)
class Context:
    """A text for a model to read; the prediction of what follows matters."""

    text: str
    special: bool = True
    """Whether the tokenizer adds its begin token; false for chats, whose template already wrote it."""
    insert: int = 0
    """Position in the text at which a persona is inserted."""
    reply: int = 0
    """Position in the text at which a chat's reply begins."""
    fact: Fact | None = None
    """The fact whose answer would come next."""

    def replaced(self, subject: str) -> str:
        """The same text about another subject."""
        assert self.fact is not None
        return self.text.replace(self.fact.subject, subject)

    def introduced(self, persona: str) -> str:
        """The text with a persona's sentence inserted."""
        return f"{self.text[: self.insert]}{persona} {self.text[self.insert :]}"


@dataclass(frozen=True)
class Facts:
    """The facts of a pack, and the phrases that state them."""

    facts: tuple[Fact, ...]
    phrasings: dict[str, tuple[str, ...]]
    """Phrases by relation, with subject and answer left open and the answer after the subject."""
    other_texts: tuple[ForgetText, ...] = ()
    """Forget texts that state none of the facts in a phrase that was found; only reading them whole reaches them."""

    def subjects(self, relation: str) -> dict[str, str]:
        """Answers of a relation, by subject."""
        return {fact.subject: fact.answer for fact in self.facts if fact.relation == relation}


def find_facts(concept: Concept) -> Facts:
    """Recover facts and phrasings from texts and group-T questions.

    A phrase is a text with a group-T subject and its answer left open; it belongs to the relation whose answers it
    contains. Other texts that match a phrase give the facts of all other subjects.
    """
    known = [fact for question in concept.questions if (fact := _fact_of(question))]
    phrasings = _phrasings(concept, known)
    facts = dict.fromkeys(known)
    patterns = [(relation, _pattern(phrase)) for relation, phrases in phrasings.items() for phrase in phrases]
    others = []
    for text in concept.forget:
        matches = [(relation, match) for relation, pattern in patterns if (match := pattern.fullmatch(text.text))]
        for relation, match in matches:
            facts.setdefault(Fact(relation, match["subject"], match["answer"], text.group))
        others += [] if matches else [text]
    ordered = {relation: tuple(p for p in phrases if _answer_last(p)) for relation, phrases in phrasings.items()}
    return Facts(tuple(facts), ordered, tuple(others))


def _phrasings(concept: Concept, known: Sequence[Fact]) -> dict[str, list[str]]:
    """Phrases, by the relation whose answers they contain most often."""
    by_subject = defaultdict(list)
    for fact in known:
        by_subject[fact.subject].append(fact)
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for text in (text.text for text in concept.forget if text.group == "T"):
        for fact in [fact for subject in _within(text, by_subject) for fact in by_subject[subject]]:
            if phrase := _phrase(text, fact):
                votes[phrase][fact.relation] += 1
    by_relation = defaultdict(list)
    for phrase, relations in votes.items():
        relation, count = relations.most_common(1)[0]
        if count >= ENOUGH:
            by_relation[relation].append(phrase)
    return by_relation


def fact_contexts(facts: Facts, kind: Literal["texts", "questions"], seed: int) -> Iterator[Context]:
    """Yield every fact in plain text: the pack's phrases up to the answer, or its question alone and after examples."""
    rng = random.Random(f"excise contexts {seed}")
    examples = {
        relation: _example_sets(facts.subjects(relation), rng)
        for relation in dict.fromkeys(fact.relation for fact in facts.facts)
    }
    for place, fact in enumerate(facts.facts):
        if kind == "texts":
            for phrase in facts.phrasings.get(fact.relation, ()):
                # Without the space at the end: tokenizers put it into the first token of the answer.
                yield _context(phrase[: phrase.index(ANSWER)].rstrip(), fact)
            continue
        yield _context(fact.relation, fact)
        sets = examples[fact.relation]
        shots = [pair for pair in sets[place % len(sets)] if pair[0] != fact.subject][:SHOTS]
        lines = "".join(f"{fact.relation.replace(SUBJECT, subject)} {answer}\n" for subject, answer in shots)
        yield _context(lines + fact.relation, fact)


def _example_sets(answers: dict[str, str], rng: random.Random) -> list[list[tuple[str, str]]]:
    """Sets of examples for all facts of a relation."""
    # With only a few sets, many contexts share a beginning, which the frozen teacher then reads once.
    pairs = list(answers.items())
    # One pair more than are shown, because the fact in question is left out of its own examples.
    return [rng.sample(pairs, k=min(SHOTS + 1, len(pairs))) for _ in range(EXAMPLE_SETS)]


def text_contexts(texts: Sequence[ForgetText], tokenizer: Any, limit: int, most: int, seed: int) -> list[Context]:
    """Pieces of at most ``limit`` tokens of at most ``most`` texts, in which no facts are found."""
    # Drawn before anything is tokenized: a corpus can be far larger than what is read of it.
    few = [row.text for row in spread(texts, most, f"excise forget texts {seed}")]
    return [Context(piece) for text in few for piece in text_pieces(tokenizer, text, limit)]


def text_pieces(tokenizer: Any, text: str, limit: int) -> list[str]:
    """A text in pieces of at most ``limit`` tokens each, cut between words where a piece has some.

    Example:
        >>> text_pieces(tokenizer, "one two three four", 2)  # doctest: +SKIP
        ['one two', 'three four']
    """
    count = len(tokenizer(text)["input_ids"])
    if count <= limit or len(text) < 2:
        return [text]
    # The tokens of a piece are not those of the same words within the text: one more, at most, where it begins.
    room = max(1, limit - len(tokenizer("")["input_ids"]) - 1)
    pieces, start = [], 0
    for end in [*_cuts(_token_ends(tokenizer, text, count), text, room), len(text)]:
        piece = text[start:end].strip(" ")
        start = end
        if piece and len(tokenizer(piece)["input_ids"]) > limit and len(piece) > 1:
            middle = piece.rfind(" ", 1, len(piece) // 2 + 1)
            middle = middle if middle > 0 else len(piece) // 2
            pieces += text_pieces(tokenizer, piece[:middle], limit) + text_pieces(tokenizer, piece[middle:], limit)
        elif piece:
            pieces.append(piece)
    return pieces


def _token_ends(tokenizer: Any, text: str, count: int) -> list[int]:
    """Where the tokens of a text end in it; evenly spread where the tokenizer cannot tell."""
    if not tokenizer.is_fast:
        return [len(text) * (place + 1) // count for place in range(count)]
    return [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]


def _cuts(ends: Sequence[int], text: str, room: int) -> Iterator[int]:
    """Places in a text between which ``room`` tokens stand at most, moved back to a space where there is one."""
    first = start = 0
    while len(ends) - first > room:
        whole = ends[first + room - 1]
        space = text.rfind(" ", start + 1, whole + 1)
        start = space if space > start else max(whole, start + 1)
        yield start
        first = bisect_right(ends, start, lo=first)


def question_contexts(questions: Iterable[Question], seed: int) -> Iterator[Context]:
    """Yield group-T questions with their answers, alone and after examples, as texts to retain."""
    rng = random.Random(f"excise retain contexts {seed}")
    by_topic: dict[str | None, list[Question]] = defaultdict(list)
    trainable = [question for question in questions if question.group == "T"]
    for question in trainable:
        by_topic[question.topic].append(question)
    for question in trainable:
        answer = question.choices[question.answer]
        yield Context(f"{question.prompt} {answer}")
        shots = rng.sample(by_topic[question.topic], k=min(SHOTS, len(by_topic[question.topic])))
        lines = "".join(f"{shot.prompt} {shot.choices[shot.answer]}\n" for shot in shots if shot is not question)
        yield Context(f"{lines}{question.prompt} {answer}")


def chat_contexts(facts: Sequence[Fact], reply: Callable[[list[str]], list[Reply]], tokenizer: Any) -> list[Context]:
    """Facts asked in the chat template, with the model's reply up to the answer; replies without it are left out.

    Args:
        facts: What to ask.
        reply: Returns the model's replies to prompts.
        tokenizer: The model's tokenizer, with a chat template.
    """
    contexts = []
    by_prompt = {bare_question(fact.relation).replace(SUBJECT, fact.subject): fact for fact in facts}
    for answered in reply(list(by_prompt)):
        fact = by_prompt[answered.prompt]
        rendered = render(tokenizer, answered.prompt)
        place = whole_words(fact.answer, answered.text).search(answered.text)
        if place:
            text = rendered + answered.text[: place.start()].rstrip(" ")
            contexts.append(Context(text, False, rendered.index(answered.prompt), len(rendered), fact))
    # Replies to one prompt often agree up to the answer.
    return list(dict.fromkeys(contexts))


def bare_question(prompt: str) -> str:
    """A question without ``Question:`` and ``Answer:``, as a person would ask it in a chat."""
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
    """Subjects that occur in a text, without those that are part of a longer subject in it."""
    present = [subject for subject in subjects if subject in text]
    return [subject for subject in present if not any(subject != other and subject in other for other in present)]


def _phrase(text: str, fact: Fact) -> str | None:
    if text.count(fact.subject) != 1:
        return None
    opened = text.replace(fact.subject, SUBJECT)
    opened, count = whole_words(fact.answer, opened).subn(ANSWER, opened)
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
