"""What an audit's models answered in several formats, compared: the part of ``audit.json`` on formats."""

from collections.abc import Sequence

from ...eval.audit.formats import NONE, FormatVerdict, bits, judge_format
from ...eval.items import clusters_of
from .curve_store import UNTOUCHED, CurveStore, FormatAnswers
from .floor import floor_questions
from .formats import FORMATS, FormatQuestions
from .request import GUESSING, AuditJob, format_questions


def compare_formats(job: AuditJob, curves: CurveStore, attacks: Sequence[str], floor: str) -> list[FormatVerdict]:
    """A verdict for each format; none where no floor was measured.

    Args:
        attacks: Those that see neither group V nor the base.
    """
    base = curves.get("base", UNTOUCHED).formats
    if base is None or floor == GUESSING:
        return []
    asked = {subject: _of(curves, subject, attacks) for subject in ("edited", "reference")}
    questions, of_floor = (format_questions(job, some) for some in (job.questions, floor_questions(job)))
    clusters = [clusters_of(job.concept, some) for some in (questions, of_floor)]
    # Chances need no tokenizer.
    chances = FormatQuestions(questions, None).chances()
    found = []
    for name, about in FORMATS.items():
        edited = {attack: answers.values[name] for attack, answers in asked["edited"].items()}
        never = {attack: answers.values[name] for attack, answers in asked["reference"].items()}
        verdict = judge_format(name, about, chances[name], base.values[name], edited, never, *clusters)
        found += [verdict] if verdict else []
    return found


def format_gaps(found: Sequence[FormatVerdict]) -> list[str]:
    """Formats in which no question could be asked."""
    missing = [name.replace("_", " ") for name in FORMATS if found and name not in {one.name for one in found}]
    return [f"format {name}: no question names its subject, so none could be asked so" for name in missing]


def injected_bits(curves: CurveStore, attack: str) -> dict[str, float | None] | None:
    """Bits on each answer that edited model and floor gain by an attack, from the probability among the choices."""
    gained = {}
    for subject in ("edited", "reference"):
        if not curves.has(subject, UNTOUCHED, attack):
            return None
        before, after = (curves.get(subject, name).formats for name in (UNTOUCHED, attack))
        if before is None or after is None:
            return None
        gained[subject] = bits(before.values["cloze"], after.values["cloze"])
    return gained


def _of(curves: CurveStore, subject: str, attacks: Sequence[str]) -> dict[str, FormatAnswers]:
    """By attack that asked formats, and of the untouched model."""
    found = {name: curves.get(subject, name).formats for name in attacks}
    found[NONE] = curves.get(subject, UNTOUCHED).formats
    return {name: one for name, one in found.items() if one is not None}
