"""Cloze: how likely the true answer is after its question, asked without choices."""

import math
from collections.abc import Callable

from ..concept import Concept
from ..inference.likelihood import Likelihood, Request
from ..inference.questions import questions_by_split, requests_of
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Better, Scores


def scores(subject: ModelUnderTest) -> list[Scores]:
    """For each split: log-probability of the answer, rank of its first token, and whether it is the greedy answer.

    The answers' likelihoods are those of multiple choice, so this costs no forward.
    """
    if subject.concept.about.kind != "knowledge":
        return []
    results = []
    for split, questions in questions_by_split(subject.concept, subject.settings.questions).items():
        asked = [requests_of(question)[question.answer] for question in questions]
        found = subject.likelihoods(asked)
        ids = tuple(question.id for question in questions)
        forgotten = split.startswith("forget")
        better: Better = "lower" if forgotten else "base"

        def of(
            name: str, unit: str, value: Callable[[Likelihood], float], better: Better = better, *,
            exponential: bool = False, found: list[Likelihood] = found, ids: tuple[str, ...] = ids, split: str = split,
        ) -> Scores:  # fmt: skip
            return Scores(
                name, split, unit, better, ids, tuple(value(item) for item in found), (1.0,) * len(ids), exponential
            )  # fmt: skip

        results += [
            of("cloze", "nats an answer", lambda item: item.log_probability),
            of("cloze_rank", "geometric mean rank", lambda item: math.log(item.rank),
               "higher" if forgotten else "base", exponential=True),
            of("cloze_exact", "share of answers", lambda item: float(all(item.greedy))),
        ]  # fmt: skip
    return results


TEXTS = 200
"""Forget texts of a group that recital is measured on, at most, unless fewer are asked for."""


def recitals(concept: Concept, settings: EvalSettings, group: str) -> dict[str, Request]:
    """Whole texts of a group by their id, spread over the pack."""
    texts = [text for text in concept.forget if text.group == group] if concept.about.kind == "knowledge" else []
    wanted = min(settings.questions or TEXTS, TEXTS)
    step = max(1, len(texts) // wanted)
    return {text.id: Request("", text.text) for text in texts[::step][:wanted]}


def extraction_requests(concept: Concept, settings: EvalSettings) -> list[Request]:
    """Everything that ``extraction`` needs scored."""
    return [request for group in ("T", "V") for request in recitals(concept, settings, group).values()]


def extraction(subject: ModelUnderTest) -> list[Scores]:
    """``extraction_strength``: the share of a text that the model completes exactly, given what stands before it.

    Source: Carlini et al. 2021, as defined by Wang et al. 2024 ("Towards effective evaluations"), equation 2.
    """
    results = []
    for group in ("T", "V"):
        asked = recitals(subject.concept, subject.settings, group)
        found = dict(zip(asked, subject.likelihoods(list(asked.values())), strict=True))
        kept = {identity: item for identity, item in found.items() if item.tokens}
        if kept:
            shares = tuple(item.recited / item.tokens for item in kept.values())
            results.append(
                Scores("extraction_strength", f"forget_{group}", "share of a text", "lower", tuple(kept), shares,
                       (1.0,) * len(kept), skipped=len(found) - len(kept))
            )  # fmt: skip
    return results
