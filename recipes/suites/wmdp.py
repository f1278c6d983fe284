"""WMDP: lettered multiple choice on each domain to forget, and on what should stay (Li et al. 2024).

Asked as the lm-evaluation-harness asks WMDP and MMLU: plain text, options in the prompt, no examples; the answer is the
letter of highest log-probability. With a base, the robust figure leaves out what the base answers from the options alone.
"""

from collections.abc import Callable, Sequence

from ...eval.concept import Concept, Question
from ...eval.drawing import drawn
from ...eval.items import clusters_of
from ...eval.measurements.lettered import hits, robust
from ...eval.model_under_test import ModelUnderTest
from .figures import Figure, Raw, joined, mean_of

FORMAT = (
    "Asked as lm-eval asks WMDP and MMLU: 'The following are multiple choice questions (with answers) about ...', options"
    " A, B, C, ... in the prompt, no examples, the letter of highest log-probability."
)
PACKAGES: tuple[Callable[[str], None], ...] = ()
"""Checks that what the suite imports is installed."""
STAY = {"neighbour": "neighbouring topics", "retain": "everything else (retain)"}


def needs(concept: Concept) -> list[str]:
    """What the pack lacks."""
    return [] if _by_set(concept) else ["questions with choices of split forget (questions.jsonl)"]


def _by_set(concept: Concept, most: int = 0) -> dict[tuple[str, str], list[Question]]:
    """Questions by what they count as, forget or stay, and the line's name; nothing without questions to forget."""
    sets: dict[tuple[str, str], list[Question]] = {}
    # How texts go on was made of texts; it is no question of the benchmark.
    for row in (one for one in concept.questions if not one.id.startswith("continue-")):
        if row.split == "forget":
            sets.setdefault(("forget", row.topic or concept.about.name), []).append(row)
        elif row.split in STAY:
            sets.setdefault(("stay", STAY[row.split]), []).append(row)
    if not any(kind == "forget" for kind, _ in sets):
        return {}
    return {
        key: drawn(rows, clusters_of(concept, rows), most, f"questions {key[1]}")
        for key, rows in sorted(sets.items(), key=lambda item: item[0][0] == "stay")
    }


def measure(subject: ModelUnderTest) -> Raw:
    """Hits on every set, with the question and without it."""
    raw = {}
    for (kind, name), rows in _by_set(subject.concept, subject.settings.questions).items():
        split = "forget_V" if kind == "forget" else "retain"
        raw[f"{kind}:{name}"] = hits(subject, "lettered_choice", split, rows)
        if kind == "forget":
            raw[f"blind:{name}"] = hits(subject, "lettered_choice", split, rows, blind=True)
    return raw


def figures(raw: Raw, base: Raw | None, reference: Raw | None) -> list[Figure]:
    """The benchmark's table of one model."""
    domains = [key.partition(":")[2] for key in raw if key.startswith("forget:")]
    found = []
    for name in domains:
        found += mean_of(f"{name}, lettered", raw[f"forget:{name}"])
    if len(domains) > 1:
        found += mean_of("all domains, lettered", joined("forget", [raw[f"forget:{name}"] for name in domains]))
    found += _robust(raw, base, domains)
    for key, scores in raw.items():
        if key.startswith("stay:"):
            found += mean_of(f"{key.partition(':')[2]}, lettered", scores)
    return found


def _robust(raw: Raw, base: Raw | None, domains: Sequence[str]) -> list[Figure]:
    if base is None:
        return []
    left = {name: robust(raw[f"forget:{name}"], base[f"blind:{name}"]) for name in domains}
    found = [one for name, scores in left.items() for one in mean_of(f"{name}, robust", scores)]
    return [*found, *(mean_of("all domains, robust", joined("forget", list(left.values()))) if len(left) > 1 else [])]
