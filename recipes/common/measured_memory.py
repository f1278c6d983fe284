"""What measuring a model holds beside its weights, from the texts that will be read."""

from collections.abc import Iterable, Sequence
from typing import Any

from ...eval.concept import Concept
from ...eval.inference.batches import token_batches
from ...eval.inference.likelihood import Request, encode_request, share_rows, windows
from ...eval.measurements import MEASUREMENTS
from ...eval.measurements.table import function_of
from ...eval.model_under_test import EvalSettings

MOST_READ = 2_000_000
"""Characters of texts that a plan tokenizes; of larger packs batches are taken to be full."""


def scored_bytes(positions: int, cells: int, vocabulary: int, itemsize: int) -> int:
    """Logits of a batch, those of the positions that are scored, and their log-probabilities in fp32.

    Args:
        positions: Positions of which logits are computed, padding included.
        cells: Distinct positions that are scored.
        vocabulary: Numbers of a distribution.
        itemsize: Bytes of a logit.
    """
    # What is scored is copied out, and turned into fp32 where it is not; log-probabilities are made beside it.
    copies = 8 if itemsize == 4 else max(itemsize + 4, 8)
    return (positions * itemsize + cells * copies) * vocabulary


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
) -> list[tuple[int, int]] | None:
    """Positions of which each batch computes logits, and how many of them are scored; None where reading the texts would
    take long.

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
        found.append((len(batch) * (len(rows[batch[0]]) - first), len(cells)))
    return found
