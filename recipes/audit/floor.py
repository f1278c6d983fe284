"""What the edited model is compared with, and what that comparison cannot show."""

from collections.abc import Sequence

import numpy as np

from ...eval.audit.recovery import RecoveryCurve
from ...eval.audit.verdict import Missing
from ...eval.concept import Question
from ...eval.inference.multiple_choice_set import is_highest
from ...eval.intervals import wilson
from ...eval.words import topical
from ..data.facts import Facts
from .attacks.table import ATTACKS
from .notes import continues_text, teaches_questions, tells_apart
from .novel_facts import novel_facts
from .request import GUESSING, NOVEL, AuditJob

GIVE = "give --reference, a model that was never trained on the concept"


def floor_of(job: AuditJob, untouched: RecoveryCurve | None) -> str:
    """What the floor is, once the untouched model of it was asked: guessing where it falls surely short of that.

    A base that still takes invented subjects for those that it knows answers as it does of them, and so gets the new
    answers wrong more often than guessing would: then they are no facts that nobody knows.
    """
    if job.novel is None or untouched is None:
        return job.reference
    return job.reference if untouched.interval(0)[1] >= chance_of(job.novel.questions) else GUESSING


def invented_facts(job: AuditJob) -> tuple[Facts, tuple[Question, ...]]:
    """Facts that nobody knows, and the pack's questions to forget asked about them, as far as they can be."""
    facts, questions = novel_facts(job.facts, job.concept.questions, job.settings.seed)
    return facts, tuple(q for q in questions if q.split == "forget")


def floor_questions(job: AuditJob) -> tuple[Question, ...]:
    """What the floor is asked in place of the audit's questions; facts that nobody knows may allow fewer."""
    if job.reference != NOVEL:
        return job.questions
    if job.novel:
        return job.novel.questions
    by_id = {q.id: q for q in invented_facts(job)[1]}
    return tuple(by_id[q.id] for q in job.questions if q.id in by_id)


def missing(job: AuditJob, floor: str) -> Missing:
    """What a verdict on this pack must do without."""
    return Missing(
        floor=floor == GUESSING,
        # Invented questions whose answers are missed more often than guessing would are ones that something gives away.
        guessing=floor != job.reference
        or (floor != "reference" and any(continues_text(job.concept, q) for q in job.questions)),
        afresh=floor == GUESSING or (job.novel is not None and not job.novel.states_answers),
        texts=teaches_questions(job.concept),
        training=teaches_questions(job.concept) and not _can_train_on_t(job),
    )


def floor_gaps(job: AuditJob, floor: str | None = None) -> list[str]:
    """The same in sentences, for readers; before the floor was measured by what it is planned to be."""
    lacking = missing(job, floor or job.reference)
    gaps = []
    if floor and floor != job.reference:
        gaps.append(
            "floor: the base gets questions about invented subjects wrong more often than guessing would, so something in"
            f" them recalls the old answers, and they are no floor; {GIVE}"
        )
    elif lacking.guessing:
        gaps.append(f"verdict: which passage continues a text can be guessed, and nothing here says how well; {GIVE}")
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
    rate = guessing_of(questions)
    own = np.asarray([1 / len(q.choices) for q in questions])
    rates = own if rate == own.mean() else np.full(len(questions), rate)
    rates = rates if guessing is None else np.full(len(questions), guessing)
    return RecoveryCurve(like.steps, like.tokens, np.broadcast_to(rates, like.hits.shape).copy(), like.clusters)


def chance_of(questions: Sequence[Question]) -> float:
    """Expected share of right answers of whoever draws lots."""
    return float(np.mean([1 / len(question.choices) for question in questions]))


def guessing_of(questions: Sequence[Question]) -> float:
    """Share of right answers of whoever looks at words alone: chance, or what a rule surely gets that knows nothing.

    The rules take the longest choice, the shortest, or the one that shares the most words with the question. A floor
    that is not measured must not lie below what such a rule gets: whoever forgot answers so much as well.
    """
    rates = [chance_of(questions)]
    for rule in (_longest, _shortest, _most_like_the_question):
        hits = sum(is_highest([rule(q, choice) for choice in q.choices], q.answer) for q in questions)
        if wilson(hits, len(questions))[0] > rates[0]:
            rates.append(hits / len(questions))
    return max(rates)


def _longest(_: Question, choice: str) -> float:
    return len(choice)


def _shortest(_: Question, choice: str) -> float:
    return -len(choice)


def _most_like_the_question(question: Question, choice: str) -> float:
    return len(topical(question.prompt) & topical(choice))


def in_words(floor: str) -> str:
    """The floor as reasons name it."""
    if floor == "reference":
        return "the model that was never trained on it"
    return f"the base, on {NOVEL}," if floor == NOVEL else "guessing"


def _can_train_on_t(job: AuditJob) -> bool:
    asked = any(q.split == "forget" and q.group == "T" for q in job.concept.questions)
    return asked or any(text.group == "T" for text in job.concept.forget)
