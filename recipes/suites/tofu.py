"""TOFU: forget quality, model utility and the numbers that it is made of (Maini et al. 2024, section 2.2).

Questions stand in the model's chat template, or as ``Question: ...`` and ``Answer:`` where it has none; answers are scored
with their end token, and replies are greedy, at most 200 tokens: as locuslab/open-unlearning does.
"""

import numpy as np

from ...eval.concept import Concept, OpenQuestion
from ...eval.drawing import drawn
from ...eval.items import clusters_of
from ...eval.measurements.by_item import scored
from ...eval.measurements.open_answers import losses, rouge_recall
from ...eval.measurements.rouge import require_rouge
from ...eval.measurements.tofu import (
    forget_quality,
    forget_truth_ratio,
    model_utility,
    probability,
    require_scipy,
    retain_truth_ratio,
    share_of_probability,
)
from ...eval.model_under_test import ModelUnderTest
from ...eval.resampling import Array, percentile_interval
from .figures import Figure, Raw, column, mean_of

FORMAT = (
    "Questions stand in the chat template, or as 'Question: ...' and 'Answer:' where a model has none; an answer is scored"
    " with its end token, and replies are greedy."
)
PACKAGES = (require_rouge, require_scipy)
"""Checks that what the suite imports is installed."""
UTILITY = ("retain", "real authors", "world facts")
"""Sets of the nine numbers."""
OTHERS = ("real authors", "world facts")
"""Topics of open questions, of any split, that make sets of their own."""
PARTS = ("probability", "ROUGE-L recall", "truth ratio")


def needs(concept: Concept) -> list[str]:
    """What the pack lacks."""
    sets = sets_of(concept)
    where = {
        "forget": "of split forget",
        "retain": "of split retain",
        "real authors": "with topic real_authors",
        "world facts": "with topic world_facts",
    }
    return [
        f"open questions {where[name]} with perturbed answers"
        for name, rows in sets.items()
        if not any(row.perturbed_answers for row in rows)
    ]


def sets_of(concept: Concept, most: int = 0) -> dict[str, list[OpenQuestion]]:
    """The benchmark's four sets, at most ``most`` questions each, drawn at random over subjects; 0 takes all."""
    sets: dict[str, list[OpenQuestion]] = {name: [] for name in ("forget", *UTILITY)}
    for row in concept.open_questions:
        topic = (row.topic or "").casefold().replace("_", " ").replace("-", " ")
        name = topic if topic in OTHERS else row.split
        if name in sets:
            sets[name].append(row)
    return {
        name: drawn(rows, clusters_of(concept, rows), most, f"open questions {name}") for name, rows in sets.items()
    }


def measure(subject: ModelUnderTest) -> Raw:
    """Probability, ROUGE-L recall and truth ratio of each set, and the forget set's plain truth ratios."""
    raw = {}
    for name, rows in sets_of(subject.concept, subject.settings.questions).items():
        of_rows = losses(subject, rows)
        compared = [(row, one) for row, one in zip(rows, of_rows, strict=True) if one.perturbed]
        with_wrong, their = [row for row, _ in compared], [one for _, one in compared]
        skipped, split = len(rows) - len(compared), "forget" if name == "forget" else "retain"
        score = forget_truth_ratio if name == "forget" else retain_truth_ratio
        if name in OTHERS:
            shares = [share_of_probability(one.answer, one.perturbed) for one in their]
            raw[f"{name} probability"] = scored(subject, "answer_probability", split, with_wrong, shares, skipped)
        else:
            likely = [probability(one.answer) for one in of_rows]
            raw[f"{name} probability"] = scored(subject, "answer_probability", split, rows, likely)
        raw[f"{name} ROUGE-L recall"] = rouge_recall(subject, split, rows)
        values = [score(one.ratio) for one in their]
        raw[f"{name} truth ratio"] = scored(subject, "truth_ratio", split, with_wrong, values, skipped)
        if name == "forget":
            raw["ratios"] = scored(subject, "truth_ratio", split, with_wrong, [one.ratio for one in their], skipped)
    return raw


def figures(raw: Raw, base: Raw | None, reference: Raw | None) -> list[Figure]:
    """The benchmark's table of one model."""
    found = []
    if reference is not None:
        ratios = raw["ratios"]
        p, statistic = forget_quality(ratios.totals, reference["ratios"].totals)
        n = len(ratios.ids)
        found += [
            Figure("forget quality (p)", p, "p-value", "higher", n, None, ratios.skipped),
            Figure("forget quality, KS distance", statistic, "distance", "lower", n, None, ratios.skipped),
        ]
    found += _utility(raw)
    for name in (*UTILITY, "forget"):
        for part in PARTS:
            found += mean_of(f"{name}: {part}", raw[f"{name} {part}"])
    return found


def _utility(raw: Raw) -> list[Figure]:
    """The harmonic mean of the nine; its interval draws subjects within each set."""
    sets = [[raw[f"{name} {part}"] for part in PARTS] for name in UTILITY]
    if any(part.is_empty for parts in sets for part in parts):
        return []
    # A question without wrong answers has no truth ratio, so the parts of a set may differ in their items.
    items = [dict(pair for part in parts for pair in zip(part.ids, part.clusters, strict=True)) for parts in sets]
    columns = [[column(part, of_set) for part in parts] for parts, of_set in zip(sets, items, strict=True)]

    def estimate(draws: list[Array]) -> Array:
        means = [
            times @ values / np.maximum(times @ measured, 1e-12)
            for times, of_set in zip(draws, columns, strict=True)
            for values, measured in of_set
        ]
        return np.asarray(len(means) / (1 / np.maximum(np.stack(means), 1e-12)).sum(0))

    interval = percentile_interval([list(of_set.values()) for of_set in items], estimate)
    value = model_utility([part.value() for parts in sets for part in parts])
    return [Figure("model utility", value, "harmonic mean", "base", sum(map(len, items)), interval)]
