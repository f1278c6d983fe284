"""Likelihoods and replies, computed a second time from the definition: float64, one item and token at a time.

Nothing here imports excise: a test that holds excise against it finds what a shared shortcut would hide.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch


def log_probabilities(model: Any, ids: Sequence[int]) -> list[float]:
    """Log-probability of every token of the vocabulary after these, in nats."""
    with torch.no_grad():
        logits = _double(model)(input_ids=torch.tensor([list(ids)])).logits[0, -1].tolist()
    largest = max(logits)
    normalizer = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - normalizer for logit in logits]


def log_likelihood(model: Any, ids: Sequence[int], start: int, context: int = 1 << 30) -> float:
    """Sum of the log-probabilities of the tokens from ``start`` on, each after as many before it as the context holds."""
    return sum(
        log_probabilities(model, ids[max(0, place - context) : place])[ids[place]] for place in range(start, len(ids))
    )


def greedy(model: Any, ids: Sequence[int], tokens: int, ends: set[int]) -> list[int]:
    """The likeliest token, again and again, until one ends the reply."""
    reply: list[int] = []
    while len(reply) < tokens and not (reply and reply[-1] in ends):
        likely = log_probabilities(model, [*ids, *reply])
        reply.append(max(range(len(likely)), key=likely.__getitem__))
    return reply


def _double(model: Any) -> Any:
    """The model in float64, which is kept beside it while its weights stay the same."""
    mark = sum(float(parameter.double().sum()) for parameter in model.parameters())
    if getattr(model, "_in_double", (None,))[0] != mark:
        double = copy.deepcopy(model).double().eval()
        # Experts that are multiplied in one go have no kernel in float64.
        double.config._experts_implementation = "eager"
        object.__setattr__(model, "_in_double", (mark, double))
    return model._in_double[1]
