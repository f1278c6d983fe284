"""Multiple-choice questions that are asked again and again: tokenized and laid out once."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..editing.adapters import causal_model, unembedding
from .concept import Question
from .likelihood import Scored, batch_budget, encode_request, pad_right, score_rows, share_rows, token_batches
from .multiple_choice import requests_of

CELLS = 1024
"""Distributions that are held at a time."""
Hits = tuple[float, ...]
"""1 for each question answered rightly, 0 for the others."""


class Exam:
    """The questions of one split, for any model of one tokenizer."""

    def __init__(self, tokenizer: Any, questions: Sequence[Question], prefix: Callable[[Question], str] | None = None):
        """``prefix`` writes something in front of a question, such as examples."""
        self.ids = tuple(question.id for question in questions)
        self.answers = [question.answer for question in questions]
        if prefix:
            questions = [q.model_copy(update={"prompt": prefix(q) + q.prompt}) for q in questions]
        self._parts = [encode_request(tokenizer, request) for q in questions for request in requests_of(q)]
        self._sizes = [len(question.choices) for question in questions]
        self._asked: list[tuple[int, list[int]]] = []
        """Of each question: how many tokens all its choices begin with, and its parts."""
        start = 0
        for size in self._sizes:
            members = list(range(start, start + size))
            self._asked.append((min(self._parts[index].start for index in members), members))
            start += size

    @property
    def chance(self) -> float:
        """What guessing scores."""
        return sum(1 / size for size in self._sizes) / len(self._sizes)

    def hits(self, model: Any, placeholders: int = 0) -> Hits:
        """Questions whose likeliest choice, per token, is the true one.

        Args:
            placeholders: Tokens to put in front of every row, whose embeddings somebody else owns.
        """
        return self._marked(self._behind(model, placeholders) if placeholders else self.log_probabilities(model))

    def hits_and_probabilities(self, model: Any) -> tuple[Hits, list[float]]:
        """Hits, and the probability of each true answer, from one reading."""
        found = self.log_probabilities(model)
        said = zip(self._by_question(found), self.answers, strict=True)
        return self._marked(found), [math.exp(values[answer]) for values, answer in said]

    def probabilities(self, model: Any) -> list[list[float]]:
        """Probability with which sampling says each choice of each question."""
        return [[math.exp(value) for value in values] for values in self._by_question(self.log_probabilities(model))]

    def _marked(self, found: Sequence[float]) -> Hits:
        each = [value / (len(part.ids) - part.start) for value, part in zip(found, self._parts, strict=True)]
        return tuple(
            float(all(values[answer] > value for i, value in enumerate(values) if i != answer))
            for values, answer in zip(self._by_question(each), self.answers, strict=True)
        )

    def _by_question(self, found: Sequence[float]) -> Iterator[Sequence[float]]:
        """Values of all choices, question by question."""
        start = 0
        for size in self._sizes:
            yield found[start : start + size]
            start += size

    @torch.no_grad()
    def log_probabilities(self, model: Any) -> list[float]:
        """Of every choice of every question, in order, in nats; a question's prompt is read once for all its choices."""
        found = [0.0] * len(self._parts)
        for batch in token_batches([prompt for prompt, _ in self._asked], batch_budget(model)):
            for index, value in self._read([self._asked[place] for place in batch], model):
                found[index] += value
        return found

    def _read(self, asked: Sequence[tuple[int, list[int]]], model: Any) -> Iterator[tuple[int, float]]:
        """Choices of a batch of questions, each with what a part of its tokens adds."""
        decoder, head = causal_model(model).base_model, unembedding(model)
        prompts = [self._parts[members[0]].ids[:length] for length, members in asked]
        width = max(map(len, prompts))
        ids = torch.tensor([(0,) * (width - len(row)) + row for row in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
        cache = DynamicCache(config=decoder.config)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        output = decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )  # fmt: skip
        log_p = head(output.last_hidden_state[:, -1]).float().log_softmax(-1)
        longer: list[tuple[int, int]] = []
        for row, (length, members) in enumerate(asked):
            for index in members:
                part = self._parts[index]
                if part.start <= length:
                    yield index, float(log_p[row, part.ids[length]])
                if len(part.ids) - 1 > length:
                    longer.append((row, index))
        if not longer:
            return
        rests = [self._parts[index].ids[asked[row][0] : -1] for row, index in longer]
        cache.batch_select_indices(torch.tensor([row for row, _ in longer], device=model.device))
        inputs = pad_right(rests, model.device)
        before = mask[[row for row, _ in longer]]
        positions = before.sum(-1, keepdim=True) + torch.arange(inputs["input_ids"].shape[1], device=model.device)
        hidden = decoder(
            input_ids=inputs["input_ids"], attention_mask=torch.cat([before, inputs["attention_mask"]], -1),
            position_ids=positions, past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        cells = [
            (place, offset, index, self._parts[index].ids[asked[row][0] + offset + 1])
            for place, (row, index) in enumerate(longer) for offset in range(len(rests[place]))
            if asked[row][0] + offset + 1 >= self._parts[index].start
        ]  # fmt: skip
        places, offsets, indices, tokens = (list(column) for column in zip(*cells, strict=True))
        for start in range(0, len(cells), CELLS):
            some = slice(start, start + CELLS)
            logits = head(hidden[places[some], offsets[some]]).float().log_softmax(-1)
            values = logits.gather(-1, torch.tensor(tokens[some], device=model.device)[:, None])[:, 0]
            yield from zip(indices[some], values.tolist(), strict=True)

    @torch.no_grad()
    def _behind(self, model: Any, placeholders: int) -> list[float]:
        """The same behind tokens whose embeddings somebody else owns, without a cache."""
        front = (0,) * placeholders
        parts = [Scored((*front, *part.ids), part.start + placeholders) for part in self._parts]
        shared = share_rows(parts)
        rows = list(shared)
        found: dict[int, float] = {}
        for batch in token_batches([len(row) for row in rows], batch_budget(model)):
            members = [(place, index) for place, row in enumerate(batch) for index in shared[rows[row]]]
            scored = score_rows(model, [rows[row] for row in batch], [(p, parts[i]) for p, i in members])
            found |= {index: one.log_probability for (_, index), one in zip(members, scored, strict=True)}
        return [found[index] for index in range(len(parts))]
