"""Questions that nobody can answer, made of a pack's questions: a floor for packs without facts in sentence frames.

The subject that a question names becomes an invented one, and one of its wrong choices becomes the right answer; texts
about the subject change with it. The base has read nothing of such a subject, so what it answers is guessing, and how
fast it learns the new answers is how fast such answers are learned afresh. Where a question does not name its subject
this cannot be done: the same question with another right answer would ask against what the base knows, which is neither
guessing nor learning afresh.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...eval.concept import Concept, ForgetText, OpenQuestion, Question
from ...eval.words import whole_words
from .held_apart import NamesIn
from .novel_facts import invented_names

FEWEST_SUBJECTS = 8
"""Subjects below which no names are invented: halves of so few names recall the names themselves."""
ASKED = 0.5
"""Share of a group's questions that must name their subject."""
TOLD = 0.9
"""Share of the questions whose answers texts about V must state word for word, so that learning can be compared."""


@dataclass(frozen=True)
class NovelPack:
    """A pack about subjects that do not exist."""

    concept: Concept
    questions: tuple[Question, ...]
    """Of group V, under the ids of the questions that they were made of."""
    states_answers: bool
    """Whether its texts about V, where it has any, state the new answers, so that they can be learned from them."""


def novel_pack(concept: Concept, questions: Sequence[Question], fewest: int, seed: int) -> NovelPack | None:
    """The pack with invented subjects and new answers.

    Args:
        questions: Those of group V that are asked.
        fewest: Questions that must be left.

    Returns:
        None where too few questions or subjects are named for that.
    """
    rng = random.Random(f"excise novel questions {seed}")
    forget = [q for q in concept.questions if q.split == "forget"]
    named = [q for q in forget if q.subject and whole_words(q.subject, q.prompt).search(q.prompt)]
    subjects = sorted({q.subject for q in named if q.subject})
    if len(subjects) < FEWEST_SUBJECTS:
        return None
    names = invented_names(subjects, rng)
    answers = _answers(named, rng)
    renamed = _Renamed(names, answers)
    novel = [made for q in named if (made := renamed.question(q))]
    by_id = {q.id: q for q in novel}
    asked = tuple(by_id[q.id] for q in questions if q.id in by_id)
    of_t = [q for q in forget if q.group == "T"]
    if len(asked) < max(fewest, ASKED * len(questions)) or sum(q.group == "T" for q in novel) < ASKED * len(of_t):
        return None
    texts = tuple(renamed.text(text) for text in concept.forget)
    others = [q for q in concept.questions if q.split != "forget"]
    open_questions = tuple(renamed.open_question(row) for row in concept.open_questions if row.id in by_id)
    changed = replace(concept, questions=(*novel, *others), forget=texts, open_questions=open_questions)
    return NovelPack(changed, asked, _states_answers(concept, [q for q in questions if q.id in by_id], renamed))


def _answers(questions: Iterable[Question], rng: random.Random) -> dict[tuple[str, str], str]:
    """A wrong choice as the new answer for each subject and answer: texts about it can then say the same."""
    assigned: dict[tuple[str, str], str] = {}
    for question in questions:
        answer = question.choices[question.answer]
        if question.subject:
            wrong = [choice for choice in question.choices if choice != answer]
            assigned.setdefault((question.subject, answer), rng.choice(wrong))
    return assigned


class _Renamed:
    """Puts invented subjects and new answers in the place of those of a pack."""

    def __init__(self, names: Mapping[str, str], answers: Mapping[tuple[str, str], str]):
        self.names, self.answers, self.named = names, answers, NamesIn(names)
        self.by_subject: dict[str, dict[str, str]] = {}
        for (subject, answer), new in answers.items():
            self.by_subject.setdefault(subject, {})[answer] = new

    def question(self, question: Question) -> Question | None:
        """None where the new answer is not among the choices, or two of them would be alike."""
        assert question.subject is not None
        new = self.answers[question.subject, question.choices[question.answer]]
        choices = tuple(self._renamed(choice) for choice in question.choices)
        if new not in question.choices or len(set(choices)) < len(choices):
            return None
        prompt, subject = self._renamed(question.prompt), self.names[question.subject]
        update = {"prompt": prompt, "choices": choices, "subject": subject, "answer": question.choices.index(new)}
        return question.model_copy(update=update)

    def open_question(self, row: OpenQuestion) -> OpenQuestion:
        """With its paraphrase about the invented subject; its answers stand in the question that was made of it."""
        return row.model_copy(update={"paraphrase": row.paraphrase and self._renamed(row.paraphrase)})

    def text(self, text: ForgetText) -> ForgetText:
        words = text.text
        if answers := self.by_subject.get(self.about(words) or "", {}):
            # In one pass, because the new answer of one question may be the old one of another.
            words = _one_of(answers).sub(lambda match: answers[match[0]], words)
        subject = self.names.get(text.subject or "", text.subject)
        return text.model_copy(update={"text": self._renamed(words), "subject": subject})

    def about(self, text: str) -> str | None:
        """The one subject that a text names."""
        present = self.named(text)
        return present[0] if len(present) == 1 else None

    def _renamed(self, text: str) -> str:
        present = dict.fromkeys(self.named(text))
        return _one_of(present).sub(lambda match: self.names[match[0]], text) if present else text


def _one_of(phrases: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of some phrases in whole words, the longest that fits."""
    return re.compile("|".join(whole_words(phrase).pattern for phrase in sorted(phrases, key=len, reverse=True)))


def _states_answers(concept: Concept, questions: Sequence[Question], renamed: _Renamed) -> bool:
    texts: dict[str, list[str]] = {}
    of_v = [text.text for text in concept.forget if text.group == "V"]
    for text in of_v:
        if subject := renamed.about(text):
            texts.setdefault(subject, []).append(text)

    def is_told(question: Question) -> bool:
        answer = whole_words(question.choices[question.answer])
        return any(answer.search(text) for text in texts.get(question.subject or "", ()))

    return not of_v or sum(map(is_told, questions)) >= TOLD * len(questions)
