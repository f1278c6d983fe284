"""Multiple-choice questions, tokenized once and asked of many models or many times.

Example:
    >>> questions = MultipleChoiceSet(tokenizer, concept.questions)
    >>> accuracy = sum(questions.hits(model)) / len(questions.ids)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...editing.modules import causal_model, unembedding
from ..concept import Concept, Question
from ..intervals import rate_interval
from .batches import read_in_batches, token_batches
from .caches import repeats_cache
from .likelihood import (
    Scored,
    batch_budget,
    context_of,
    encode_request,
    pad_right,
    score_parts,
    score_rows,
    share_rows,
)
from .questions import questions_by_split, requests_of
from .read_prompts import read_prompts

CELLS = 1024
"""Distributions over the vocabulary held in memory at a time."""
OPERATIONS, WEIGHTS = 5_000_000, 16
"""Positions of padding that a further forward of a processor must save: by the square of the model's width, what its
operations take whatever they read, and what it takes to read the weights."""
T = TypeVar("T")
Hits = tuple[float, ...]
"""For each question, 1 if the model answers correctly, else 0."""


@dataclass(frozen=True)
class ReadAtOnce:
    """What a batch of questions takes a model to read."""

    prompts: int
    width: int
    """Tokens of the longest prompt."""
    choices: int
    """Choices whose tokens after the first are read at once, at most."""
    rest: int
    """Tokens of the longest of these choices, but the first."""
    distributions: int
    """Distributions over the vocabulary that are held for them at a time."""


class MultipleChoiceSet:
    """The questions of one split, for any model of one tokenizer."""

    def __init__(self, tokenizer: Any, questions: Sequence[Question], prefix: Callable[[Question], str] | None = None):
        """``prefix`` returns text to put in front of a question, such as examples."""
        self.ids = tuple(question.id for question in questions)
        self.clusters = tuple(question.subject or question.prompt for question in questions)
        """The subject of each question; questions without one are independent of all others."""
        self.answers = [question.answer for question in questions]
        if prefix:
            questions = [q.model_copy(update={"prompt": prefix(q) + q.prompt}) for q in questions]
        self._parts = [encode_request(tokenizer, request) for q in questions for request in requests_of(q)]
        self._sizes = [len(question.choices) for question in questions]
        self._layout: list[tuple[int, list[int]]] = []
        """For each question: the number of tokens that all its choices share at the start, and its parts' indices."""
        start = 0
        for size in self._sizes:
            members = list(range(start, start + size))
            self._layout.append((min(self._parts[index].start for index in members), members))
            start += size

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing, 0 to 1."""
        return sum(1 / size for size in self._sizes) / len(self._sizes)

    def read_at_once(self, budget: int, *, every: bool) -> list[ReadAtOnce]:
        """What each batch takes, of a model whose cache can be repeated.

        Args:
            budget: Tokens of a batch.
            every: Whether all choices are read to their ends at once, as for probabilities; for hits it is one of each
                question, as far as that can be known.
        """
        found = []
        for batch in token_batches([length for length, _ in self._layout], budget):
            rests = [
                sorted(len(self._parts[index].ids) - 1 - self._layout[place][0] for index in self._layout[place][1])
                for place in batch
            ]
            read = [rest for each in rests for rest in (each if every else each[-1:]) if rest]
            width = max(self._layout[place][0] for place in batch)
            found.append(ReadAtOnce(len(batch), width, len(read), max(read, default=0), min(CELLS, sum(read))))
        return found

    def hits(self, model: Any, placeholders: int = 0) -> Hits:
        """Whether the choice with the highest log-probability per token is the true one, for each question.

        What a choice can reach at most, given its first token, is known before the rest of it is read. So the true
        answer is read to its end, then the strongest rival of each question, then the rivals that could still win.

        Args:
            model: The model, in evaluation mode.
            placeholders: Number of tokens to put in front of every row, whose embeddings a soft prompt replaces.
        """
        longest = placeholders + max(len(part.ids) for part in self._parts)
        if not repeats_cache(model) or (placeholders and longest > context_of(model) + 1):
            return self._marked(self._behind(model, placeholders))
        return self._decided(model, placeholders)

    def hits_and_probabilities(self, model: Any) -> tuple[Hits, list[float]]:
        """Hits, and the probability of each true answer, from the same forwards."""
        log_p = self.log_probabilities(model)
        by_question = zip(self._by_question(log_p), self.answers, strict=True)
        return self._marked(log_p), [math.exp(values[answer]) for values, answer in by_question]

    def picks(self, model: Any) -> list[int]:
        """The choice of highest log-probability per token, question by question."""
        by_question = self._by_question(self._per_token(self.log_probabilities(model)))
        return [max(range(len(values)), key=values.__getitem__) for values in by_question]

    def probabilities(self, model: Any) -> list[list[float]]:
        """Probability that sampling produces each choice, question by question."""
        return [[math.exp(value) for value in values] for values in self._by_question(self.log_probabilities(model))]

    def highest(self, log_p: Sequence[float]) -> Hits:
        """Whether the true choice is the highest, by a log-probability (nats) of every choice of every question."""
        return self._marked(log_p)

    def _marked(self, log_p: Sequence[float]) -> Hits:
        by_question = zip(self._by_question(self._per_token(log_p)), self.answers, strict=True)
        return tuple(float(is_highest(values, answer)) for values, answer in by_question)

    def _per_token(self, log_p: Sequence[float]) -> list[float]:
        return [value / (len(part.ids) - part.start) for value, part in zip(log_p, self._parts, strict=True)]

    def _by_question(self, values: Sequence[float]) -> Iterator[Sequence[float]]:
        """Values of all choices, question by question."""
        start = 0
        for size in self._sizes:
            yield values[start : start + size]
            start += size

    @torch.no_grad()
    def log_probabilities(self, model: Any) -> list[float]:
        """Log-probability (nats) of every choice of every question, in order; each prompt is read only once.

        Models whose cache cannot be repeated read it with every choice.
        """
        if not repeats_cache(model):
            return self._behind(model, 0)
        log_p = self._too_long(model)

        def read(batch: list[int]) -> dict[int, float]:
            reading = _Reading(model, [self._layout[place] for place in batch], self._parts)
            reading.finish(reading.log_p)
            return reading.log_p

        for of_batch in self._read_in_batches(model, log_p, read):
            log_p |= of_batch
        return [log_p[index] for index in range(len(self._parts))]

    def _too_long(self, model: Any) -> dict[int, float]:
        """Log-probabilities of the choices of questions that do not fit the model's context, each cut on its own."""
        most = context_of(model) + 1
        long = [
            index
            for _, members in self._layout
            if max(len(self._parts[index].ids) for index in members) > most
            for index in members
        ]
        scores = score_parts(model, [self._parts[index] for index in long])
        return {index: score.log_probability for index, score in zip(long, scores, strict=True)}

    def _read_in_batches(
        self, model: Any, known: Mapping[int, float], read: Callable[[list[int]], T], front: int = 0
    ) -> Iterator[T]:
        """What ``read`` makes of questions that are not known yet, grouped by length; ``front`` tokens stand before each."""
        places = [place for place, (_, members) in enumerate(self._layout) if members[0] not in known]
        lengths = [front + self._layout[place][0] for place in places]
        for _, result in read_in_batches(
            lengths, batch_budget(model), lambda batch: read([places[number] for number in batch])
        ):
            yield result

    @torch.no_grad()
    def _decided(self, model: Any, placeholders: int) -> Hits:
        hits, known = [0.0] * len(self.ids), self._too_long(model)
        for place, (_, members) in enumerate(self._layout):
            if members[0] in known:
                lengths = [len(self._parts[index].ids) - self._parts[index].start for index in members]
                values = [known[index] / length for index, length in zip(members, lengths, strict=True)]
                hits[place] = float(is_highest(values, self.answers[place]))
        for right in self._read_in_batches(
            model, known, lambda batch: self._right(model, batch, placeholders), placeholders
        ):
            for place in right:
                hits[place] = 1.0
        return tuple(hits)

    def _right(self, model: Any, batch: Sequence[int], placeholders: int) -> list[int]:
        """The questions of a batch that are answered rightly."""
        standing = {place: self._layout[place][1][self.answers[place]] for place in batch}
        questions = [self._layout[place] for place in batch]
        reading = _Reading(model, questions, self._parts, placeholders, [*standing.values()])
        reading.finish(standing.values())
        rivals = {
            place: sorted(set(self._layout[place][1]) - {answer}, key=reading.at_most, reverse=True)
            for place, answer in standing.items()
        }
        # The strongest rival first: it decides most questions, and the others are then not read.
        for ranks in (slice(0, 1), slice(1, None)):
            close = {p: [r for r in rivals[p][ranks] if not reading.beats(answer, r)] for p, answer in standing.items()}
            reading.finish(rival for each in close.values() for rival in each)
            standing = {
                p: answer for p, answer in standing.items() if all(reading.beats(answer, rival) for rival in close[p])
            }
        return list(standing)

    @torch.no_grad()
    def _behind(self, model: Any, placeholders: int) -> list[float]:
        """Log-probabilities of all choices behind placeholder tokens, without a cache of the prompts."""
        front = (0,) * placeholders
        parts = [Scored((*front, *part.ids), part.start + placeholders) for part in self._parts]
        shared = share_rows(parts)
        rows = list(shared)
        log_p: dict[int, float] = {}

        def read(batch: list[int]) -> dict[int, float]:
            members = [(place, index) for place, row in enumerate(batch) for index in shared[rows[row]]]
            scored = score_rows(model, [rows[row] for row in batch], [(p, parts[i]) for p, i in members])
            return {index: score.log_probability for (_, index), score in zip(members, scored, strict=True)}

        for _, of_batch in read_in_batches([len(row) for row in rows], batch_budget(model), read):
            log_p |= of_batch
        return [log_p[index] for index in range(len(parts))]


def is_highest(values: Sequence[float], answer: int) -> bool:
    """Whether the true answer's value is above every other's."""
    return all(values[answer] > value for place, value in enumerate(values) if place != answer)


class _Reading:
    """A batch of questions whose prompts were read by the model; ``finish`` reads chosen answers to their ends."""

    def __init__(
        self,
        model: Any,
        questions: Sequence[tuple[int, list[int]]],
        parts: Sequence[Scored],
        placeholders: int = 0,
        answers: Sequence[int] = (),
    ):
        """``answers``: of each question the choice that is read with its prompt, where the model can."""
        self.decoder, self.head, self.device = causal_model(model).base_model, unembedding(model), model.device
        self.questions, self.parts = questions, parts
        self.row = {index: row for row, (_, members) in enumerate(questions) for index in members}
        # A soft prompt stands at the positions 0 and following, which no padding has.
        prompts = [(0,) * placeholders + parts[members[0]].ids[:length] for length, members in questions]
        known = zip(answers, questions, strict=bool(answers))
        endings = [parts[answer].ids[length:-1] for answer, (length, _) in known]
        self.prompts = read_prompts(model, prompts, endings)
        log_p = self.head(self.prompts.last).float().log_softmax(-1)
        rows = torch.tensor(list(self.row.values()), device=self.device)
        firsts = torch.tensor(
            [parts[index].ids[questions[row][0]] for index, row in self.row.items()], device=self.device
        )
        values = log_p[rows, firsts].tolist()
        self.log_p = {
            # A choice may share more tokens with the prompt than the others do, and is then scored from a later token
            # on.
            index: value if parts[index].start <= questions[row][0] else 0.0
            for (index, row), value in zip(self.row.items(), values, strict=True)
        }
        """Summed log-probability of the tokens read so far of each choice, in nats."""
        self.unread = {index for index, row in self.row.items() if len(parts[index].ids) - 1 > questions[row][0]}
        if answers and self.prompts.behind is not None:
            longer = self.unread.intersection(answers)
            self._add(self.prompts.behind, {index: self.row[index] for index in longer})

    def at_most(self, index: int) -> float:
        """Upper bound of a choice's log-probability per token; exact once the choice was read to its end."""
        # The tokens not read yet can only lower the sum, because log-probabilities are at most 0.
        part = self.parts[index]
        return self.log_p[index] / (len(part.ids) - part.start)

    def beats(self, answer: int, rival: int) -> bool:
        """Whether an answer, read to its end, is likelier than the rival can still become."""
        return self.at_most(answer) > self.at_most(rival)

    def finish(self, choices: Iterable[int]) -> None:
        """Read these choices to their ends."""
        longer = [index for index in choices if index in self.unread]
        lengths = [len(self.parts[index].ids) - self.questions[self.row[index]][0] for index in longer]
        forward = OPERATIONS // self.prompts.last.shape[-1] ** 2 + WEIGHTS
        for places in alike(lengths, forward if self.device.type == "cpu" else 1 << 62):
            self._read([longer[place] for place in places])

    def _read(self, longer: Sequence[int]) -> None:
        """Read these choices, which have more tokens than their first, to their ends in one forward."""
        rows = [self.row[index] for index in longer]
        cache, before = self.prompts.cache_of(self.decoder.config, rows), self.prompts.mask[rows]
        inputs = pad_right(
            [self.parts[i].ids[self.questions[row][0] : -1] for i, row in zip(longer, rows, strict=True)], self.device
        )
        # Padding on the left is no position.
        positions = before.sum(-1, keepdim=True) + torch.arange(inputs["input_ids"].shape[1], device=self.device)
        hidden = self.decoder(
            input_ids=inputs["input_ids"],
            attention_mask=torch.cat([before, inputs["attention_mask"]], -1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self._add(hidden, {index: place for place, index in enumerate(longer)})

    def _add(self, hidden: Float[Tensor, "rows more d"], read: Mapping[int, int]) -> None:
        """Add the log-probabilities of the tokens after the first of choices that were read.

        Args:
            hidden: States behind the prompts.
            read: Of each choice its row there.
        """
        self.unread -= read.keys()
        lengths = {index: self.questions[self.row[index]][0] for index in read}
        cells = [
            (place, at - lengths[index] - 1, index, self.parts[index].ids[at])
            for index, place in read.items()
            for at in range(max(self.parts[index].start, lengths[index] + 1), len(self.parts[index].ids))
        ]
        for start in range(0, len(cells), CELLS):
            places, offsets, indices, tokens = zip(*cells[start : start + CELLS], strict=True)
            logits = self.head(hidden[list(places), list(offsets)].to(self.device)).float().log_softmax(-1)
            values = logits.gather(-1, torch.tensor(tokens, device=self.device)[:, None])[:, 0]
            for index, value in zip(indices, values.tolist(), strict=True):
                self.log_p[index] += value


def alike(lengths: Sequence[int], forward: int) -> list[list[int]]:
    """Places of rows in groups of like length, each read in a forward of its own.

    Args:
        forward: Positions of padding that a further one must save.

    Example:
        >>> alike([1, 9, 1, 1, 9], 20)
        [[0, 2, 3], [1, 4]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)

    def saved(end: int) -> int:
        return end * (lengths[order[-1]] - lengths[order[end - 1]])

    end = max(range(len(order)), key=saved, default=0)
    if not end or saved(end) < forward:
        return [order] if order else []
    groups = (order[:end], order[end:])
    return [[of[place] for place in some] for of in groups for some in alike([lengths[one] for one in of], forward)]


def accuracies(model: Any, tokenizer: Any, concept: Concept, most: int) -> dict[str, dict[str, Any]]:
    """What a model answers of each split, as records hold it: ``value``, ``n`` and ``ci95``.

    Args:
        most: Questions of a split, at most; 0 takes all.
    """
    found = {}
    for split, questions in questions_by_split(concept, most).items():
        exam = MultipleChoiceSet(tokenizer, questions)
        hits = exam.hits(model)
        n, interval = len(hits), rate_interval(hits, exam.clusters)
        found[split] = {"value": sum(hits) / n, "n": n, "ci95": list(interval)}
    return found
