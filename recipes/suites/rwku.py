"""RWKU: what is still answered about a person at three levels of asking, about neighbours, and membership (Jin et al.
2024).

Prompts are the authors': an instruction, the question, and a reply that goes on from ``Answer:``; in the chat template
where there is one. The first line of at most 30 greedy tokens counts, by ROUGE-L recall. (The authors' code has another
implementation of ROUGE, so values differ a little.)
"""

import re

from ...eval.concept import Concept, OpenQuestion
from ...eval.items import clusters_of, drawn
from ...eval.measurements.by_item import scored
from ...eval.measurements.membership import as_auc, text_scores, texts
from ...eval.measurements.open_answers import countable
from ...eval.measurements.rouge import require_rouge, rouge_l
from ...eval.model_under_test import ModelUnderTest
from ...eval.statistics import Scores
from .figures import Figure, Raw, has_file, mean_of

FORMAT = (
    "The authors' prompts, in the chat template where a model has one, with a reply that goes on from 'Answer:'; ROUGE-L"
    " recall of the first line of at most 30 greedy tokens, words by their stems."
)
PACKAGES = (require_rouge,)
"""Checks that what the suite imports is installed."""
REPLY_TOKENS = 30
LEVELS = {1: "fill in the blank", 2: "question", 3: "adversarial"}
INSTRUCTIONS = {1: "Please complete the blank in the following question."}
"""Of level 1; those of all other levels are the same."""
ANSWER_BRIEFLY = "Please briefly answer the following question."
MEMBERSHIP = {
    "membership_loss": "mean log-probability",
    "membership_zlib": "zlib",
    "membership_min_k_plus_plus": "Min-20%++",
}


def needs(concept: Concept) -> list[str]:
    """What the pack lacks."""
    sets = _sets(concept)
    lacking = [
        f"open questions of split forget with level {level} ({about})"
        for level, about in LEVELS.items()
        if not sets.get(("forget", level))
    ]
    if not any(split == "neighbour" for split, _ in sets):
        lacking.append("open questions of split neighbour")
    if not has_file(concept, "forget"):
        lacking.append("forget texts (forget.jsonl)")
    return lacking


def level_of(row: OpenQuestion) -> int:
    """The benchmark's level, from how a pack writes it: ``1``, ``forget_level1``, ``cloze``; a plain question is 2."""
    text = (row.level or "").casefold()
    number = re.search(r"[123]", text)
    if number:
        return int(number[0])
    return 1 if "cloze" in text or "blank" in text else 3 if "adversarial" in text else 2


def _sets(concept: Concept, most: int = 0) -> dict[tuple[str, int], list[OpenQuestion]]:
    sets: dict[tuple[str, int], list[OpenQuestion]] = {}
    for row in concept.open_questions:
        sets.setdefault((row.split, level_of(row)), []).append(row)
    return {
        (split, level): drawn(rows, clusters_of(concept, rows), most, f"open questions {split} {level}")
        for (split, level), rows in sorted(sets.items())
    }


def measure(subject: ModelUnderTest) -> Raw:
    """ROUGE-L recall of every split and level, and membership of forget texts."""
    raw = {}
    for (split, level), rows in _sets(subject.concept, subject.settings.questions).items():
        raw[f"{split} {level}"] = _recall(subject, split, level, rows)
    members, others = texts(subject)
    for split, some in (("members", members), ("others", others)):
        if some:
            raw |= {f"{split} {name}": scores for name, scores in text_scores(subject, some, split).items()}
    return raw


def _recall(subject: ModelUnderTest, split: str, level: int, rows: list[OpenQuestion]) -> Scores:
    rows, skipped = countable(rows)
    front = INSTRUCTIONS.get(level, ANSWER_BRIEFLY)
    prompts = [f"{front}\nQuestion: {row.prompt}\n" for row in rows]
    most = min(REPLY_TOKENS, subject.settings.max_new_tokens)
    replies = subject.completions(prompts, most, chat=True, beginning="Answer:")
    values = [
        rouge_l(row.answer, reply.text.strip().split("\n")[0]).recall for row, reply in zip(rows, replies, strict=True)
    ]
    return scored(subject, "rouge_l_recall", split, rows, values, skipped)


def figures(raw: Raw, base: Raw | None, reference: Raw | None) -> list[Figure]:
    """The benchmark's table of one model."""
    found = []
    for split in ("forget", "neighbour", "retain"):
        for level, about in LEVELS.items():
            found += mean_of(f"{split}, level {level}, {about}", raw.get(f"{split} {level}"))
    found += mean_of("MIA, mean log-probability of forget texts", raw.get("members membership_loss"), "lower")
    for name, about in MEMBERSHIP.items():
        members, others = raw.get(f"members {name}"), raw.get(f"others {name}")
        if members and others and members.ids and others.ids:
            found += mean_of(f"MIA, AUC of {about}, forget against unseen", as_auc(members, others))
    return found
