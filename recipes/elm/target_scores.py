"""How a target answers multiple-choice questions: each choice by its tokens, under the edited distribution.

A choice is told from the others by its first token where these differ and choices are short; otherwise by the
likelihood of the whole choice, token by token, as the measurement ``multiple_choice`` has it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from ...editing.training.edited_target import TargetEdit
from ...eval.concept import Question
from ...eval.inference.likelihood import Request, context_of, encode_request
from ..common.tokens import Row, encode
from ..data.facts import Context
from .contrast import ContrastSource, contrasted
from .erasure import Erasure
from .teacher import Item, Likelihoods, Teacher

SHORT = 8
"""Tokens of a choice up to which its first one may stand for it; of a passage it says little."""


@dataclass(frozen=True)
class Answered:
    """How a target answers one question."""

    right: bool
    """Whether it prefers the true choice."""
    greedy: bool
    """Whether it would say the true answer greedily."""
    probability: float
    """Of the true answer: its first token's, or the whole answer's."""


@dataclass(frozen=True)
class Reading:
    """A question as a teacher reads it: the bare rows, and those of expert and novice."""

    question: Question
    items: tuple[Item, ...]
    """One that all choices follow, or one for each choice with its tokens."""
    tokens: tuple[Int[Tensor, "count k"], ...]
    """For each item and each of its positions, the tokens whose log-probability is wanted."""

    @property
    def whole(self) -> bool:
        """Whether whole choices are scored."""
        return len(self.items) > 1

    def answered(self, found: Sequence[Likelihoods], place: int) -> Answered:
        """The answer under one of the edits, by its place.

        Args:
            found: What the teacher says of each item.
        """
        true = self.question.answer
        if not self.whole:
            log_p = found[0].log_p[place, 0]
            greedy = int(found[0].likeliest[place, 0]) == int(self.tokens[0][0, true])
            return Answered(int(log_p.argmax()) == true, greedy, float(log_p[true].exp()))
        sums = [float(one.log_p[place, :, 0].double().sum()) for one in found]
        # Per token, so that a choice is not preferred for being short.
        means = [total / len(tokens) for total, tokens in zip(sums, self.tokens, strict=True)]
        greedy = bool((found[true].likeliest[place] == self.tokens[true][:, 0].to(found[true].likeliest)).all())
        return Answered(means.index(max(means)) == true, greedy, math.exp(sums[true]))


def read_questions(
    erasure: Erasure, sources: Sequence[ContrastSource], questions: Sequence[Question]
) -> dict[str, list[Reading]]:
    """By source, the questions that can be scored under every one of them, in their order."""
    readings = {source.name: _readings(erasure, source, questions) for source in sources}
    kept = [place for place in range(len(questions)) if all(of_source[place] for of_source in readings.values())]
    return {name: [reading for place in kept if (reading := of_source[place])] for name, of_source in readings.items()}


def scored(teacher: Teacher, readings: Sequence[Reading], edits: Sequence[TargetEdit]) -> list[list[Answered]]:
    """Each question's answers under each edit."""
    items = [item for reading in readings for item in reading.items]
    tokens = [tokens for reading in readings for tokens in reading.tokens]
    found, start = teacher.likelihoods(items, tokens, edits), 0
    answers = []
    for reading in readings:
        of_reading = found[start : start + len(reading.items)]
        answers.append([reading.answered(of_reading, place) for place in range(len(edits))])
        start += len(reading.items)
    return answers


def _readings(erasure: Erasure, source: ContrastSource, questions: Sequence[Question]) -> list[Reading | None]:
    """None for questions that cannot be scored."""
    known = {(fact.subject, fact.answer): fact for fact in erasure.facts.facts}
    contexts = []
    for question in questions:
        stated = (question.subject or "", question.choices[question.answer])
        contexts.append(Context(question.prompt, fact=known.get(stated) if question.split == "forget" else None))
    items = contrasted(contexts, source, erasure.tokenizer)
    return [_reading(erasure, question, item) for question, item in zip(questions, items, strict=True)]


def _reading(erasure: Erasure, question: Question, item: Item | None) -> Reading | None:
    ids = encode(erasure.tokenizer, question.prompt, True)
    # Without a contrast the target is the frozen model itself, at any strength.
    item = item or Item(ids, 1, (ids,), (ids,))
    choices = [encode_request(erasure.tokenizer, Request(question.prompt, f" {choice}")) for choice in question.choices]
    answers = [choice.ids[choice.start :] for choice in choices]
    firsts = [answer[0] for answer in answers]
    apart = all(choice.start == len(ids) for choice in choices)
    if apart and len(set(firsts)) == len(firsts) and max(map(len, answers)) <= SHORT:
        return _fitting(erasure, Reading(question, (replace(item, count=1),), (torch.tensor([firsts]),)))
    longer = [_followed(item, len(ids) - choice.start, choice.ids[choice.start :]) for choice in choices]
    if any(choice.ids[: choice.start] != ids[: choice.start] for choice in choices) or None in longer:
        return None
    items = tuple(one for one in longer if one)
    return _fitting(erasure, Reading(question, items, tuple(torch.tensor(answer)[:, None] for answer in answers)))


def _followed(item: Item, joined: int, answer: Row) -> Item | None:
    """The item's rows with an answer behind them, whose tokens its last positions predict.

    Args:
        joined: Tokens at the prompt's end that the tokenizer joins to the answer; they are part of it.

    Returns:
        None where the rows of expert and novice do not end in these tokens.
    """
    if joined >= item.count:
        return None

    def followed(row: Row) -> Row:
        return row[: len(row) - joined] + answer[:-1]

    experts, novices = (tuple(map(followed, rows)) for rows in (item.experts, item.novices))
    return replace(item, ids=followed(item.ids), count=len(answer), experts=experts, novices=novices)


def _fitting(erasure: Erasure, reading: Reading) -> Reading | None:
    """The reading, if the model's context holds all of its rows."""
    longest = max(len(row) for item in reading.items for row in (item.ids, *item.experts, *item.novices))
    return reading if longest <= context_of(erasure.model) else None
