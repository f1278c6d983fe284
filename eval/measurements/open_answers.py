"""Answers to open questions: how likely they are, beside wrong ones of the same form, and what the model says instead.

Questions stand in the chat template, or as ``Question: ...`` and ``Answer:`` where there is none, and the end token of an
answer is scored with it, as open-unlearning does. Losses are means per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..completed import asked
from ..concept import Concept, OpenQuestion
from ..drawing import drawn
from ..inference.likelihood import Request
from ..items import clusters_of
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Scores
from . import tofu
from .by_item import scored
from .rouge import Rouge, is_countable, rouge_l

REPLY_TOKENS = 200
"""Greedy tokens of a reply to an open question (TOFU, config/eval.yaml)."""


@dataclass(frozen=True)
class Losses:
    """Of one question: mean negative log-probability per token, in nats."""

    answer: float
    paraphrased: float
    """Of the answer in other words; of the answer itself where there are none."""
    perturbed: tuple[float, ...]
    """Of wrong answers of the same form."""

    @property
    def ratio(self) -> float:
        """TOFU's truth ratio R."""
        return tofu.truth_ratio(self.paraphrased, self.perturbed)


def open_by_split(concept: Concept, most: int = 0) -> dict[str, list[OpenQuestion]]:
    """Open questions by split, at most ``most`` a split, drawn at random over subjects; 0 takes all.

    Of what should stay, those of group V where there are any: no training sees them.
    """
    by_split: dict[str, list[OpenQuestion]] = {"forget_V": [], "forget_T": [], "neighbour": [], "retain": []}
    for row in concept.open_questions:
        by_split[f"forget_{row.group}" if row.split == "forget" else row.split].append(row)
    for name in ("neighbour", "retain"):
        by_split[name] = [row for row in by_split[name] if row.group == "V"] or by_split[name]
    return {
        name: drawn(rows, clusters_of(concept, rows), most, f"open questions {name}")
        for name, rows in by_split.items()
        if rows
    }


def requests(concept: Concept, settings: EvalSettings) -> list[Request]:
    """Everything that probabilities and truth ratios need scored."""
    if concept.about.kind != "knowledge":
        return []
    return [one for rows in open_by_split(concept, settings.questions).values() for one in requests_of(rows)]


def requests_of(rows: Sequence[OpenQuestion]) -> list[Request]:
    """The answer, the answer in other words, and the wrong answers of each question."""
    return [Request(row.prompt, answer, reply=True) for row in rows for answer in _answers(row)]


def _answers(row: OpenQuestion) -> tuple[str, ...]:
    return (row.answer, row.paraphrased_answer or row.answer, *row.perturbed_answers)


def losses(subject: ModelUnderTest, rows: Sequence[OpenQuestion]) -> list[Losses]:
    """Losses of the answers of each question."""
    subject.prepare(requests_of(rows))
    found = []
    for row in rows:
        values = [-one.per_token for one in subject.likelihoods(requests_of([row]))]
        found.append(Losses(values[0], values[1], tuple(values[2:])))
    return found


def scores(subject: ModelUnderTest) -> list[Scores]:
    """``answer_probability``, and ``truth_ratio`` of the questions that have wrong answers."""
    if subject.concept.about.kind != "knowledge":
        return []
    results = []
    for split, rows in open_by_split(subject.concept, subject.settings.questions).items():
        results += probability_and_ratio(subject, split, rows, losses(subject, rows))
    return results


def probability_and_ratio(
    subject: ModelUnderTest, split: str, rows: Sequence[OpenQuestion], of_rows: Sequence[Losses]
) -> list[Scores]:
    """Both measurements of some questions."""
    score = tofu.forget_truth_ratio if split.startswith("forget") else tofu.retain_truth_ratio
    compared = [(row, one) for row, one in zip(rows, of_rows, strict=True) if one.perturbed]
    found = [
        scored(subject, "answer_probability", split, rows, [tofu.probability(one.answer) for one in of_rows]),
        scored(
            subject,
            "truth_ratio",
            split,
            [row for row, _ in compared],
            [score(one.ratio) for _, one in compared],
            len(rows) - len(compared),
        ),
    ]
    return [one for one in found if one.ids]


def rouge_scores(subject: ModelUnderTest) -> list[Scores]:
    """``rouge_l_recall`` of greedy replies to open questions, words compared by their stems."""
    splits = open_by_split(subject.concept, subject.settings.questions)
    return [rouge_recall(subject, split, rows) for split, rows in splits.items()]


def rouge_recall(subject: ModelUnderTest, split: str, rows: Sequence[OpenQuestion], most: int = REPLY_TOKENS) -> Scores:
    """ROUGE-L recall of the greedy replies to some open questions; answers without a Latin letter or digit are skipped."""
    rows, skipped = countable(rows)
    chat = bool(subject.tokenizer.chat_template)
    prompts = [row.prompt if chat else asked(row.prompt) for row in rows]
    replies = subject.completions(prompts, min(most, subject.settings.max_new_tokens), chat=chat)
    values = [best_rouge(row, reply.text).recall for row, reply in zip(rows, replies, strict=True)]
    return scored(subject, "rouge_l_recall", split, rows, values, skipped)


def best_rouge(row: OpenQuestion, reply: str, *, stem: bool = True) -> Rouge:
    """ROUGE-L against the right answer that the reply is nearest to; answers that ROUGE cannot count are passed over."""
    found = [rouge_l(answer, reply, stem=stem) for answer in row.answers if is_countable(answer)]
    return Rouge(max(one.recall for one in found), max(one.f1 for one in found))


def countable(rows: Sequence[OpenQuestion]) -> tuple[list[OpenQuestion], int]:
    """The questions whose answers ROUGE can count, and how many it cannot."""
    kept = [row for row in rows if any(map(is_countable, row.answers))]
    return kept, len(rows) - len(kept)
