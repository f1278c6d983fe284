"""What measuring a model holds beside its weights, from the texts that will be read."""

from collections.abc import Iterable, Sequence
from typing import Any

from ...eval.concept import Concept
from ...eval.inference.batches import token_batches
from ...eval.inference.likelihood import RANKED, Request, encode_request, share_rows, windows
from ...eval.inference.multiple_choice_set import MultipleChoiceSet, ReadAtOnce
from ...eval.measurements import MEASUREMENTS
from ...eval.measurements.table import function_of
from ...eval.model_under_test import EvalSettings
from .memory_sizes import ModelSizes, Rows

MOST_READ = 2_000_000
"""Characters of texts that a plan tokenizes; of larger packs batches are taken to be full."""


def scored_bytes(positions: int, cells: int, parts: int, vocabulary: int, itemsize: int) -> int:
    """Logits of a batch, those of the positions that are scored, and their log-probabilities in fp32; or, in place of the
    second, those that ranks are counted in.

    Args:
        positions: Positions of which logits are computed, padding included.
        cells: Distinct positions that are scored.
        parts: Continuations that are scored, of each of which the first token is ranked.
        vocabulary: Numbers of a distribution.
        itemsize: Bytes of a logit.
    """
    # What is scored is copied out, and turned into fp32 where it is not; log-probabilities are made beside it.
    copies = 8 if itemsize == 4 else max(itemsize + 4, 8)
    # A copy of each distribution, and which of its numbers are larger.
    ranked = cells * 4 + min(parts, RANKED) * 5
    return (positions * itemsize + max(cells * copies, ranked)) * vocabulary


def measured_texts(concept: Concept) -> Iterable[str]:
    """All texts of a pack that measurements read, choices left out."""
    yield from (question.prompt for question in concept.questions)
    yield from (prompt.prompt for prompt in concept.prompts)
    yield from concept.texts()


def tokens_about(concept: Concept) -> int:
    """Tokens that are measured in all, about: no text has more than one for two characters."""
    characters = sum(len(text) for text in measured_texts(concept))
    characters += sum(len(choice) for question in concept.questions for choice in question.choices)
    return characters // 2


def requests_of(concept: Concept, settings: EvalSettings) -> list[Request]:
    """All texts that the measurements of the table score."""
    functions = [function_of(row.requests) for row in MEASUREMENTS.values() if row.requests and not row.suite]
    return list(dict.fromkeys(request for function in functions for request in function(concept, settings)))


def scored_at_once(
    requests: Sequence[Request], tokenizer: Any, context: int, budget: int
) -> list[tuple[int, int, int]] | None:
    """Positions of which each batch computes logits, how many of them are scored, and for how many continuations; None
    where reading the texts would take long.

    Args:
        requests: What is scored.
        tokenizer: The model's.
        context: Tokens that the model reads at once.
        budget: Tokens of a batch.
    """
    if sum(len(request.prompt) + len(request.continuation) for request in requests) > MOST_READ:
        return None
    encoded = [encode_request(tokenizer, request) for request in requests]
    pieces = [piece for one in encoded for piece in windows(one, context)]
    shared = share_rows(pieces)
    rows, found = list(shared), []
    for batch in token_batches([len(row) for row in rows], budget):
        parts = [(place, pieces[index]) for place in batch for index in shared[rows[place]]]
        first = min((part.start for _, part in parts), default=1) - 1
        cells = {(place, position) for place, part in parts for position in range(part.start, len(part.ids))}
        found.append((len(batch) * (len(rows[batch[0]]) - first), len(cells), len(parts)))
    return found


def choosing_bytes(sizes: ModelSizes, questions: MultipleChoiceSet, budget: int, *, every: bool = False) -> int:
    """What is held beside the weights while questions with choices are asked, as audits ask them: the prompts once, then
    the choices on what the model kept of them.

    Args:
        sizes: Those of the model.
        questions: Tokenized.
        budget: Tokens of a batch.
        every: Whether all choices are read at once, as for their probabilities.
    """
    batches = questions.read_at_once(budget, every=every)
    # One batch stands for all that are smaller in the same way.
    largest = {max(batches, key=size) for size in (_tokens_of_prompts, _tokens_of_choices, _distributions)}
    return max(_choosing(sizes, batch) for batch in largest)


def _choosing(sizes: ModelSizes, batch: ReadAtOnce) -> int:
    prompts, itemsize = Rows(batch.prompts, batch.width), sizes.dtype.itemsize
    read = sizes.forward(prompts, cached=True)
    keys_and_values = read - sizes.forward(prompts)
    # Logits, the same in fp32 where they are not, and log-probabilities.
    a_distribution = sizes.vocabulary * (8 if itemsize == 4 else itemsize + 8)
    held = [read, keys_and_values + batch.prompts * a_distribution]
    if batch.choices:
        # Choices that are read later need the prompts alone, so each goes on from a copy.
        copied = keys_and_values * max(batch.choices, batch.prompts) // batch.prompts
        on = sizes.forward(Rows(batch.choices, batch.rest), cached=True)
        held.append(keys_and_values + copied + max(on, batch.distributions * a_distribution))
    return max(held)


def _tokens_of_prompts(batch: ReadAtOnce) -> int:
    return batch.prompts * batch.width


def _tokens_of_choices(batch: ReadAtOnce) -> int:
    return max(batch.choices, batch.prompts) * batch.width


def _distributions(batch: ReadAtOnce) -> int:
    return max(batch.distributions, batch.prompts)
