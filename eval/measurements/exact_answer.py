"""Greedy answers held against the truth."""

from collections.abc import Sequence

from ..concept import Concept, Prompt, Question
from ..inference.generation import Reply
from ..inference.questions import questions_by_split
from ..model_under_test import EvalSettings, ModelUnderTest, prompts_of
from ..statistics import Scores
from ..words import has_words
from .by_item import scored

ANSWER_TOKENS = 12
"""Greedy tokens to complete a question with, where a pack's prompts carry no answers."""


def holds_answer(text: str, answer: str, choices: Sequence[str]) -> bool:
    """Whether a reply holds the true answer as whole words, and no other choice: naming them all is not knowing."""
    # A choice that is part of the true answer, such as York in New York, cannot count against it.
    others = [choice for choice in choices if choice != answer and not has_words(answer, choice)]
    return has_words(text, answer) and not any(has_words(text, other) for other in others)


def holds_any(text: str, prompt: Prompt) -> bool:
    """Whether a reply holds one of a prompt's right answers, and no wrong choice."""
    right = [answer for answer in (prompt.answer, *prompt.other_answers) if answer]
    wrong = [choice for choice in prompt.choices if choice not in right]
    return any(holds_answer(text, answer, wrong) for answer in right)


def scores(subject: ModelUnderTest) -> list[Scores]:
    """``exact_answer`` on prompts with answers; on the pack's questions, completed as plain text, where there are
    none."""
    results = []
    for split in ("concept", "neutral"):
        prompts = [prompt for prompt in subject.prompts(split) if prompt.answer]
        if prompts:
            replies = {reply.prompt: reply for reply in subject.replies(split)}
            answered = [p for p in prompts if replies[p.prompt].answered]
            hits = [holds_any(replies[p.prompt].text, p) for p in answered]
            results.append(scored(subject, "exact_answer", split, answered, hits, len(prompts) - len(answered)))
            continue
        questions = completed_questions(subject.concept, subject.settings, split)
        if questions:
            completed = subject.completions([question.prompt for question in questions], ANSWER_TOKENS)
            hits = [_completes(question, reply) for question, reply in zip(questions, completed, strict=True)]
            results.append(scored(subject, "exact_answer", split, questions, hits))
    return results


def completed_questions(concept: Concept, settings: EvalSettings, split: str) -> list[Question]:
    """The questions that are completed in place of prompts, where no prompt of the split has an answer."""
    if any(prompt.answer for prompt in prompts_of(concept, split)):
        return []
    by_split = questions_by_split(concept, settings.questions)
    return by_split.get("forget_V", []) if split == "concept" else by_split.get("retain", [])


def _completes(question: Question, reply: Reply) -> bool:
    # Only the first line: small models go on to invent further questions and answers.
    first_line = reply.text.split("\n")[0]
    return holds_answer(first_line, question.choices[question.answer], question.choices)
