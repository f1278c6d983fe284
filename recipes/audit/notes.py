"""What of a pack is asked and read, in sentences, where its files alone do not say it."""

from collections.abc import Sequence

from ...eval.completed import CHOICES
from ...eval.concept import Concept, Question
from .attacks.table import ATTACKS


def notes_on(concept: Concept, questions: Sequence[Question], attacks: Sequence[str]) -> list[str]:
    """How questions were made, and what relearning reads."""
    notes = []
    if continued := [q for q in questions if continues_text(concept, q)]:
        notes.append(
            f"{len(continued)} of {len(questions)} questions of group V are made of texts: accuracy on them says which of"
            f" {CHOICES} passages continues a text, which a model may tell without having read it"
        )
    ids = {row.id for row in concept.open_questions if not row.perturbed_answers}
    if drawn := [q for q in questions if q.id in ids]:
        notes.append(
            f"the choices of {len(drawn)} of {len(questions)} questions of group V are made of other questions' answers"
        )
    if teaches_questions(concept) and any("V" in ATTACKS[name].sources for name in attacks):
        notes.append(
            "the pack has no texts about group V, so relearning reads its questions with their answers: the questions"
            " themselves are taught, and only how fast they are learned says anything"
        )
    return notes


def continues_text(concept: Concept, question: Question) -> bool:
    """Whether a question was made of a text, as the one that asks what continues it."""
    return question.id.startswith("continue-") and any(question.id == f"continue-{text.id}" for text in concept.forget)


def teaches_questions(concept: Concept) -> bool:
    """Whether nothing but its questions can be taught of group V."""
    return not any(text.group == "V" for text in concept.forget)


def tells_apart(concept: Concept, questions: Sequence[Question]) -> bool:
    """Whether no text of group T can tell what is asked: each question names its subject, and no such text does."""
    asked = [q for q in concept.questions if q.split == "forget" and q.group == "T"]
    told = {f"{q.prompt} {q.choices[q.answer]}" for q in asked}
    texts = [text for text in concept.forget if text.group == "T" and text.text not in told]
    return not texts or all(q.subject for q in questions)
