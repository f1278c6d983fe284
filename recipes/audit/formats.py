"""The questions of group V in several formats: knowledge that is gone in one format may still be there in another."""

import math
import random
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...eval.concept import Question
from ...eval.inference.generation import generate
from ...eval.inference.likelihood import Request, encode_request, score_parts
from ...eval.inference.multiple_choice_set import is_highest
from ...eval.inference.questions import requests_of
from ...eval.measurements.exact_answer import ANSWER_TOKENS, holds_answer
from ...eval.measurements.tofu import share_of_probability

FORMATS: dict[str, str] = {
    "multiple_choice": "the choice of highest log-probability per token",
    "cloze": "probability of the true choice among the choices, by their mean log-probability per token",
    "open_answer": "the greedy continuation holds the true answer and no other choice",
    "true_false": "“true” is likelier after the statement with the right answer than after one with a wrong answer",
    "reversed": "the answer is likeliest after the question about its own subject, among questions about other subjects",
}
"""What counts in each format."""
SUBJECTS = 4
"""Subjects among which a reversed question chooses, at most."""
JUDGED = ". True or false? Answer:"


@dataclass(frozen=True)
class FormatQuestions:
    """Some questions, ready to be asked in every format."""

    questions: tuple[Question, ...]
    tokenizer: Any
    _parts: dict[Request, Any] = field(default_factory=dict)

    @torch.no_grad()
    def ask(self, model: Any) -> dict[str, list[float]]:
        """For each format one value a question, 0 to 1; NaN where it cannot be asked so.

        Args:
            model: In evaluation mode.
        """
        requests = list(dict.fromkeys(request for each in self.requests for some in each for request in some))
        for request in requests:
            if request not in self._parts:
                self._parts[request] = encode_request(self.tokenizer, request)
        scored = score_parts(model, [self._parts[request] for request in requests])
        values = {request: one.per_token for request, one in zip(requests, scored, strict=True)}
        found: dict[str, list[float]] = {name: [] for name in FORMATS}
        for question, (choices, statements, subjects) in zip(self.questions, self.requests, strict=True):
            of_choices = [values[request] for request in choices]
            losses = [-value for value in of_choices]
            found["multiple_choice"].append(float(is_highest(of_choices, question.answer)))
            found["cloze"].append(share_of_probability(losses.pop(question.answer), losses))
            right, wrong = (values[statements[n]] - values[statements[n + 1]] for n in (0, 2))
            found["true_false"].append(float(right > wrong))
            about = [values[request] for request in subjects]
            found["reversed"].append(float(is_highest(about, 0)) if about else math.nan)
        replies = generate(model, self.tokenizer, [q.prompt for q in self.questions], self.new_tokens, chat=False)
        for question, reply in zip(self.questions, replies, strict=True):
            # Only the first line: small models go on to invent further questions and answers.
            text = reply.text.split("\n")[0]
            found["open_answer"].append(float(holds_answer(text, question.choices[question.answer], question.choices)))
        return found

    def chances(self) -> dict[str, float]:
        """What whoever guesses scores in each format."""
        sizes = [len(q.choices) for q in self.questions]
        asked = [len(subjects) for _, _, subjects in self.requests if subjects]
        choice = sum(1 / size for size in sizes) / len(sizes)
        reverse = sum(1 / size for size in asked) / len(asked) if asked else math.nan
        return {
            "multiple_choice": choice,
            "cloze": choice,
            "open_answer": 0.0,
            "true_false": 0.5,
            "reversed": reverse,
        }

    @cached_property
    def new_tokens(self) -> int:
        """Greedy tokens: as many as the longest right answer takes and a few more."""
        longest = max(len(self.tokenizer.encode(q.choices[q.answer])) for q in self.questions)
        return int(min(ANSWER_TOKENS, longest + 2))

    @cached_property
    def requests(self) -> list[tuple[list[Request], list[Request], list[Request]]]:
        """Of each question: its choices; true and false after a right and a wrong statement; its reversed form."""
        return [(requests_of(q), _statements(q), self._reversed(q)) for q in self.questions]

    def _reversed(self, question: Question) -> list[Request]:
        """The answer after the question about its own subject, and after the same about subjects of other answers."""
        answer = question.choices[question.answer]
        if not question.subject or question.subject not in question.prompt:
            return []
        form = question.prompt.replace(question.subject, "{}")
        same = [q for q in self.questions if q.subject and q.prompt.replace(q.subject, "{}") == form]
        if len({q.subject for q in same}) < 2:
            same = [q for q in self.questions if q.subject and q.topic == question.topic]
        knowing = {q.subject for q in same if q.choices[q.answer] == answer}
        others = sorted({str(q.subject) for q in same} - {question.subject} - {str(name) for name in knowing})
        if not others:
            return []
        chosen = random.Random(f"excise reversed {question.id}").sample(others, k=min(SUBJECTS - 1, len(others)))
        prompts = [question.prompt, *(form.replace("{}", name) for name in chosen)]
        return [Request(prompt, f" {answer}") for prompt in prompts]


def _statements(question: Question) -> list[Request]:
    """True and false after the right statement, then after one with a wrong choice."""
    wrong = [place for place in range(len(question.choices)) if place != question.answer]
    chosen = random.Random(f"excise statement {question.id}").choice(wrong)
    told = (f"{question.prompt} {question.choices[place]}{JUDGED}" for place in (question.answer, chosen))
    return [Request(statement, word) for statement in told for word in (" true", " false")]
