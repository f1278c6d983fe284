"""Log-probabilities of every token of a text, beside what the model expected there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .batches import read_in_batches
from .encoding import encode
from .likelihood import Scored, batch_budget, context_of, padded_logits, windows


@dataclass(frozen=True)
class TokenStatistics:
    """Of one text, from its second token on, in nats."""

    log_p: tuple[float, ...]
    """Log-probability of each token."""
    mean: tuple[float, ...]
    """Expected log-probability of the next token: minus the entropy of the model's distribution."""
    deviation: tuple[float, ...]
    """Standard deviation of the log-probability under the model's distribution."""


@torch.no_grad()
def token_statistics(
    model: Any, tokenizer: Any, texts: Sequence[str], advance: Callable[[int], None] = lambda _: None
) -> list[TokenStatistics]:
    """Read each text once; what is longer than the model's context is cut by ``likelihood.windows``.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: What to read.
        advance: Called with the number of windows of each batch, for progress.

    Returns:
        In the order of the texts; empty of a text of one token.

    Example:
        >>> token_statistics(model, tokenizer, ["The sky is blue."])[0].log_p
    """
    context = context_of(model)
    parts = [Scored(tuple(encode(tokenizer, text)), 1) for text in texts]
    pieces = [(index, piece) for index, part in enumerate(parts) for piece in windows(part, context)]
    done: dict[int, list[list[float]]] = {}

    def read(batch: list[int]) -> list[list[list[float]]]:
        rows = [pieces[place][1] for place in batch]
        logits = padded_logits(model, [row.ids[:-1] for row in rows], 0)
        return [_of(row, of_row) for row, of_row in zip(rows, logits, strict=True)]

    lengths = [len(piece.ids) for _, piece in pieces]
    for batch, statistics in read_in_batches(lengths, batch_budget(model), read):
        done |= dict(zip(batch, statistics, strict=True))
        advance(len(batch))
    columns: list[list[list[float]]] = [[[], [], []] for _ in texts]
    for place, (index, _) in enumerate(pieces):
        for column, values in zip(columns[index], done[place], strict=True):
            column += values
    return [TokenStatistics(*map(tuple, of_text)) for of_text in columns]


def _of(row: Scored, logits: Any) -> list[list[float]]:
    log_p = logits[row.start - 1 : len(row.ids) - 1].float().log_softmax(-1)
    p = log_p.exp()
    # Where a logit is minus infinity, nothing is expected of its token.
    expected = torch.where(p > 0, p * log_p, 0.0)
    mean = expected.sum(-1)
    square = torch.where(p > 0, expected * log_p, 0.0).sum(-1)
    targets = torch.tensor(row.ids[row.start :], device=log_p.device)
    chosen = log_p.gather(-1, targets[:, None])[:, 0]
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    return [column.tolist() for column in (chosen, mean, deviation)]
