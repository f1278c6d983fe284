"""RWKU: what is still answered about a person at three levels of asking, about neighbours, and membership (Jin et al.
2024).

Prompts are the authors': an instruction, the question, and a reply that goes on from ``Answer:``; in the chat template
where there is one. The first line of at most 30 greedy tokens counts, by ROUGE-L recall. (The authors' code has another
implementation of ROUGE, so values differ a little.)

What the model can do besides is measured where a pack holds the utility sets: general ability (MMLU), reasoning (BBH),
truthfulness (TruthfulQA) and factuality (TriviaQA). Fluency is not: its prompts have no answers.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...eval.concept import Concept, OpenQuestion, Question
from ...eval.drawing import drawn
from ...eval.inference.questions import requests_of
from ...eval.items import Item, clusters_of
from ...eval.measurements.by_item import scored
from ...eval.measurements.lettered import hits
from ...eval.measurements.membership import as_auc, text_scores, texts
from ...eval.measurements.open_answers import best_rouge, countable
from ...eval.measurements.rouge import require_rouge
from ...eval.model_under_test import ModelUnderTest
from ...eval.statistics import Scores
from .figures import Figure, Raw, has_file, mean_of

T = TypeVar("T", bound=Item)
FORMAT = (
    "The authors' prompts, in the chat template where a model has one, with a reply that goes on from 'Answer:'; ROUGE-L"
    " recall of the first line of at most 30 greedy tokens, words by their stems. Utility sets: the likeliest letter; the"
    " exact answer after worked examples; the choice of highest log-probability (MC1); token F1 of the first line. Without"
    " the authors' examples, but for reasoning."
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


REASONING_TOKENS = 256
UTILITY = {
    "general ability": "lettered accuracy",
    "reasoning": "exact answers",
    "truthfulness": "MC1",
    "factuality": "token F1",
}
"""Topics of the utility sets, and what is measured on each."""


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
        if row.split == "retain" and row.topic in UTILITY:
            continue
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
    raw |= _utilities(subject)
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
    values = [best_rouge(row, _first_line(reply.text)).recall for row, reply in zip(rows, replies, strict=True)]
    return scored(subject, "rouge_l_recall", split, rows, values, skipped)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _utilities(subject: ModelUnderTest) -> dict[str, Scores]:
    """The four sets of what should stay, as far as the pack has them."""
    concept, most = subject.concept, subject.settings.questions

    def of(topic: str, rows: Sequence[T]) -> list[T]:
        return drawn(rows, clusters_of(concept, rows), most, f"utility {topic}")

    def chosen(topic: str) -> list[Question]:
        # A question that was made of an open one belongs to the set of that.
        opened = {row.id for row in concept.open_questions}
        return of(
            topic, [q for q in concept.questions if q.topic == topic and q.split == "retain" and q.id not in opened]
        )

    def asked(topic: str) -> list[OpenQuestion]:
        return of(topic, [row for row in concept.open_questions if row.topic == topic and row.split == "retain"])

    found = {}
    if general := chosen("general ability"):
        found["general ability"] = hits(subject, "lettered_choice", "retain", general)
    if truthful := chosen("truthfulness"):
        found["truthfulness"] = scored(subject, "multiple_choice", "retain", truthful, _likeliest(subject, truthful))
    if reasoned := asked("reasoning"):
        tokens = min(REASONING_TOKENS, subject.settings.max_new_tokens)
        replies = subject.completions([row.prompt for row in reasoned], tokens, chat=True, beginning="A:")
        found["reasoning"] = _best_of(subject, reasoned, [concluded(one.text) for one in replies], exact_match)
    if factual := asked("factuality"):
        prompts = [f"{ANSWER_BRIEFLY}\nQuestion: {row.prompt}\n" for row in factual]
        tokens = min(REPLY_TOKENS, subject.settings.max_new_tokens)
        replies = subject.completions(prompts, tokens, chat=True, beginning="Answer:")
        found["factuality"] = _best_of(subject, factual, [_first_line(one.text) for one in replies], token_f1)
    return {f"utility {topic}": found[topic] for topic in UTILITY if topic in found}


def _likeliest(subject: ModelUnderTest, questions: Sequence[Question]) -> list[float]:
    """1 for each question whose true choice has the highest log-probability as a whole, else 0."""
    subject.prepare([request for question in questions for request in requests_of(question)])
    right = []
    for question in questions:
        values = [one.log_probability for one in subject.likelihoods(requests_of(question))]
        right.append(float(all(values[question.answer] > v for n, v in enumerate(values) if n != question.answer)))
    return right


def _best_of(
    subject: ModelUnderTest, rows: Sequence[OpenQuestion], replies: Sequence[str], score: Callable[[str, str], float]
) -> Scores:
    """A score against the right answer that each reply is nearest to."""
    values = [max(score(answer, reply) for answer in row.answers) for row, reply in zip(rows, replies, strict=True)]
    return scored(subject, "open_answer", "retain", rows, values)


def concluded(text: str) -> str:
    """What a reply concludes: between ``the answer is`` and the next full stop; the whole of it without such words."""
    found = re.search(r"[tT]he answer is (.*?)\.", text)
    return found[1].strip() if found else text.strip()


def words_of_answer(text: str) -> list[str]:
    """The words of an answer without case, signs and English articles, as SQuAD compares them."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(answer: str, reply: str) -> float:
    """1 where both have the same words, else 0."""
    return float(words_of_answer(answer) == words_of_answer(reply))


def token_f1(answer: str, reply: str) -> float:
    """Harmonic mean of precision and recall over words, however they are ordered.

    Example:
        >>> token_f1("the Rim of Fire", "Rim of fire, surely")
        0.8571428571428571
    """
    right, said = words_of_answer(answer), words_of_answer(reply)
    common = sum((Counter(right) & Counter(said)).values())
    if not right or not said:
        return float(right == said)
    return 2 * common / (len(right) + len(said))


def figures(raw: Raw, base: Raw | None, reference: Raw | None) -> list[Figure]:
    """The benchmark's table of one model."""
    found = []
    for split in ("forget", "neighbour", "retain"):
        for level, about in LEVELS.items():
            found += mean_of(f"{split}, level {level}, {about}", raw.get(f"{split} {level}"))
    for topic, about in UTILITY.items():
        found += mean_of(f"utility, {topic}: {about}", raw.get(f"utility {topic}"))
    found += mean_of("MIA, mean log-probability of forget texts", raw.get("members membership_loss"), "lower")
    for name, about in MEMBERSHIP.items():
        members, others = raw.get(f"members {name}"), raw.get(f"others {name}")
        if members and others and members.ids and others.ids:
            found += mean_of(f"MIA, AUC of {about}, forget against unseen", as_auc(members, others))
    return found
