"""MUSE: verbatim and knowledge memorization, and how much membership still shows (Shi et al. 2024, section 3.1).

Everything is plain text without a chat template: passages as they stand, questions as ``Question: ...`` and ``Answer:``
after the pack's in-context examples. Replies are greedy; ROUGE-L F1 without stems, as the authors' code computes it.
"""

import numpy as np

from ...eval.concept import Concept, OpenQuestion
from ...eval.drawing import drawn
from ...eval.inference.encoding import encode
from ...eval.inference.likelihood import context_of
from ...eval.items import clusters_of
from ...eval.measurements.membership import above, as_auc, priv_leak, text_scores, texts
from ...eval.measurements.recitation import PASSAGE_TOKENS, knowledge_of, passages_of, verbatim
from ...eval.measurements.rouge import require_rouge
from ...eval.model_under_test import ModelUnderTest
from ...eval.resampling import Array, percentile_interval
from ...eval.statistics import Scores
from .figures import CUT, Figure, Raw, has_file, mean_of

FORMAT = (
    "Plain text without a chat template: passages as they stand, questions as 'Question: ...' and 'Answer:' after the"
    " pack's shots; ROUGE-L F1 of greedy replies, without stems."
)
PACKAGES = (require_rouge,)
"""Checks that what the suite imports is installed."""
SPLITS = ("forget", "retain")
ATTACK = "membership_min_k"
MEMBERS = "members"
"""Split of texts that were cut for tests of membership: MUSE's are windows of 2,048 tokens of Llama 2."""


def needs(concept: Concept) -> list[str]:
    """What the pack lacks."""
    there = {
        "passages of split forget (passages.jsonl)": any(row.split == "forget" for row in concept.passages),
        **{f"open questions of split {split}": bool(_questions(concept, split)) for split in SPLITS},
        "texts to forget (members.jsonl or forget.jsonl)": bool(concept.members) or has_file(concept, "forget"),
        "texts that no model was trained on (unseen.jsonl)": bool(concept.unseen),
    }
    return [what for what, has in there.items() if not has]


def _questions(concept: Concept, split: str, most: int = 0) -> list[OpenQuestion]:
    rows = [row for row in concept.open_questions if row.split == split]
    return drawn(rows, clusters_of(concept, rows), most, f"open questions {split}")


def measure(subject: ModelUnderTest) -> Raw:
    """VerbMem, KnowMem of both splits, and Min-K% of texts to forget and unseen ones."""
    raw = {f"VerbMem {one.split}": one for one in verbatim(subject)}
    for split in SPLITS:
        rows = _questions(subject.concept, split, subject.settings.questions)
        raw[f"KnowMem {split}"] = knowledge_of(subject, split, rows)
    members, others = texts(subject)
    raw["members"] = text_scores(subject, members, MEMBERS if subject.concept.members else "forget")[ATTACK]
    raw["others"] = text_scores(subject, others, "unseen")[ATTACK]
    raw[CUT] = _cut(subject)
    return raw


def _cut(subject: ModelUnderTest) -> Scores:
    """1 for each passage whose prompt does not fit the model's context with what is generated, else 0."""
    rows = passages_of(subject.concept, "forget", subject.settings.questions)
    room = context_of(subject.model) - min(PASSAGE_TOKENS, subject.settings.max_new_tokens)
    values = tuple(float(len(encode(subject.tokenizer, row.prompt)) > room) for row in rows)
    ids, ones = tuple(row.id for row in rows), (1.0,) * len(rows)
    return Scores(CUT, "forget", "share of prompts", "base", ids, values, ones)


def figures(raw: Raw, base: Raw | None, reference: Raw | None) -> list[Figure]:
    """The benchmark's table of one model."""
    found = mean_of("VerbMem, forget", raw["VerbMem forget"])
    found += mean_of("KnowMem, forget", raw["KnowMem forget"])
    found += mean_of("KnowMem, retain", raw["KnowMem retain"])
    if not raw["members"].ids or not raw["others"].ids:
        return found
    # The authors compare windows that were cut for this test; whole texts of a pack give another figure.
    which = "the benchmark's windows" if raw["members"].split == MEMBERS else "whole forget texts"
    if reference is not None:
        found.append(_priv_leak(raw, reference, which))
    return found + mean_of(f"AUC of Min-40%, {which} against unseen", as_auc(raw["members"], raw["others"]))


def _priv_leak(raw: Raw, reference: Raw, which: str) -> Figure:
    """PrivLeak; its interval draws forget texts and unseen ones, the same for both models."""
    members, others = raw["members"], raw["others"]
    pairs = [above(one["members"].totals, one["others"].totals) for one in (raw, reference)]

    def estimate(draws: list[Array]) -> Array:
        first, second = draws
        total = first.sum(1) * second.sum(1)
        model, known = (((first @ one) * second).sum(1) / total for one in pairs)
        return np.asarray(100.0 * (known - model) / np.maximum(1 - known, 1e-10))

    interval = percentile_interval([_subjects(members), _subjects(others)], estimate)
    value = priv_leak(*(float(one.mean()) for one in pairs))
    n = len(members.ids) + len(others.ids)
    return Figure(
        f"PrivLeak on {which}, near 0 is best", value, "percent", "base", n, interval, members.skipped + others.skipped
    )


def _subjects(scores: Scores) -> tuple[str, ...]:
    return scores.clusters or scores.ids
