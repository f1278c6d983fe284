"""Which attacks a pack has the data for; each of the others is a gap, with what the pack would need."""

from collections.abc import Mapping, Sequence

from ...eval.concept import Concept, Question
from ...eval.measurements.probe import ENOUGH
from ..data.facts import Facts
from .attacks.table import ATTACKS, Attack

NEEDS = {
    "T": "need texts or questions of group T; add some on other subjects than those of group V",
    "T texts": "needs texts of group T; add some on other subjects than those of group V",
    "T questions": "need questions of group T; add some on other subjects than those of group V",
    "T for a probe": f"needs {ENOUGH} questions of group T and of group V; add more to the pack",
    "wordings": (
        "needs the questions in other words; add texts that state answers of three or more subjects in the same"
        " sentence, or paraphrases to open_questions.jsonl"
    ),
    "related": "need questions of group T about neighbouring topics; add some with split: neighbour",
    "retain": "need texts to retain, or questions of group T on other topics; add retain.jsonl",
}
"""What attacks train on or look at, by the name it has in the table, with what to add to a pack that lacks it."""


def without_gaps(
    attacks: Sequence[str], concept: Concept, questions: Sequence[Question], facts: Facts
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The attacks that can be made, and a sentence for each kind of data that the others would need."""
    present = _present(concept, questions, facts)
    lacking: dict[str, list[str]] = {}
    for name in attacks:
        for need in _needs(ATTACKS[name]):
            if not present[need]:
                lacking.setdefault(need, []).append(name)
                break
    left_out = {name for names in lacking.values() for name in names}
    gaps = tuple(f"{', '.join(names)}: {NEEDS[need]}" for need, names in lacking.items())
    return tuple(name for name in attacks if name not in left_out), gaps


def _needs(attack: Attack) -> list[str]:
    # What is asked can always be taught.
    return [*attack.needs, *(source for source in attack.sources if source != "V")]


def _present(concept: Concept, questions: Sequence[Question], facts: Facts) -> Mapping[str, bool]:
    of_t = [q for q in concept.questions if q.group == "T"]
    asked_of_t = [q for q in of_t if q.split == "forget"]
    texts_of_t = [text for text in concept.forget if text.group == "T"]
    others = [q for q in of_t if q.split != "forget"]
    paraphrased = {row.id for row in concept.open_questions if row.paraphrase}
    return {
        "T": bool(asked_of_t or texts_of_t),
        "T texts": bool(texts_of_t),
        "T questions": bool(asked_of_t),
        "T for a probe": min(len(asked_of_t), len(questions)) >= ENOUGH,
        "wordings": bool(facts.phrasings) or any(q.id in paraphrased for q in questions),
        "related": any(q.split == "neighbour" for q in others),
        "retain": bool(concept.retain or others),
    }
