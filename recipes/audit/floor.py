"""What the edited model is compared with, and what that comparison cannot show."""

from collections.abc import Sequence

import numpy as np

from ...eval.audit.recovery import RecoveryCurve
from ...eval.audit.verdict import Missing
from ...eval.concept import Question
from .attacks.table import ATTACKS
from .notes import continues_text, teaches_questions, tells_apart
from .request import GUESSING, NOVEL, AuditJob

GIVE = "give --reference, a model that was never trained on the concept"


def floor_of(job: AuditJob, untouched: RecoveryCurve | None) -> str:
    """What the floor is, once the untouched model of it was asked: guessing where it falls surely short of that.

    A base that still takes invented subjects for those that it knows answers as it does of them, and so gets the new
    answers wrong more often than guessing would: then they are no facts that nobody knows.
    """
    if job.novel is None or untouched is None:
        return job.reference
    chance = guessing_of(job.novel.questions)
    return job.reference if untouched.interval(0)[1] >= chance else GUESSING


def missing(job: AuditJob, floor: str) -> Missing:
    """What a verdict on this pack must do without."""
    return Missing(
        floor=floor == GUESSING,
        guessing=floor != "reference" and any(continues_text(job.concept, q) for q in job.questions),
        afresh=floor == GUESSING or (job.novel is not None and not job.novel.states_answers),
        training=teaches_questions(job.concept) and not _can_train_on_t(job),
    )


def floor_gaps(job: AuditJob, floor: str | None = None) -> list[str]:
    """The same in sentences, for readers; before the floor was measured by what it is planned to be."""
    lacking = missing(job, floor or job.reference)
    gaps = []
    if lacking.guessing:
        gaps.append(f"verdict: which passage continues a text can be guessed, and nothing here says how well; {GIVE}")
    elif lacking.floor and floor and floor != job.reference:
        gaps.append(
            "floor: the base answers questions about invented subjects as it does those it knows, so they are no floor;"
            f" guessing is, and learning afresh could not be compared; {GIVE}"
        )
    elif lacking.floor:
        gaps.append(
            "floor: too few questions of the pack name their subject for questions that nobody can answer to be made of"
            f" them, so the floor is guessing, and learning afresh could not be compared; {GIVE}"
        )
    elif lacking.afresh:
        gaps.append(
            "relearn: too few texts about V state its answers word for word, so learning afresh could not be compared;"
            f" {GIVE}"
        )
    if names := unsure(job, floor or job.reference):
        gaps.append(
            f"{', '.join(names)}: questions of group V name no subject, so texts of group T may tell their answers;"
            f" without a reference these attacks alone decide nothing; {GIVE}, or give questions their subjects"
        )
    return gaps


def unsure(job: AuditJob, floor: str) -> list[str]:
    """Attacks that may be given what they are tested on, as far as the pack tells; a reference is given it too."""
    if floor == "reference" or tells_apart(job.concept, job.questions):
        return []
    return [name for name in job.attacks if ATTACKS[name].reads_t]


def guessing_curve(like: RecoveryCurve, questions: Sequence[Question], guessing: float | None) -> RecoveryCurve:
    """Whoever guesses, at each step of a curve: one in the number of choices, or what an attack makes of it."""
    rates = np.asarray([1 / len(q.choices) if guessing is None else guessing for q in questions])
    return RecoveryCurve(like.steps, like.tokens, np.broadcast_to(rates, like.hits.shape).copy(), like.clusters)


def guessing_of(questions: Sequence[Question]) -> float:
    """Expected share of right answers of whoever guesses."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)


def in_words(floor: str) -> str:
    """The floor as reasons name it."""
    if floor == "reference":
        return "the model that was never trained on it"
    return f"the base, on {NOVEL}," if floor == NOVEL else "guessing"


def _can_train_on_t(job: AuditJob) -> bool:
    asked = any(q.split == "forget" and q.group == "T" for q in job.concept.questions)
    return asked or any(text.group == "T" for text in job.concept.forget)
