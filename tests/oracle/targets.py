"""Targets and losses, computed a second time from the papers' formulas: one position and one token at a time.

Nothing here imports excise: a test that holds excise against it finds what a shared shortcut would hide.
"""

import math
from collections.abc import Sequence


def edited(
    bare: Sequence[float],
    expert: Sequence[float],
    novice: Sequence[float],
    strength: float,
    *,
    one_sided: bool = False,
    top_k: int = 0,
) -> list[float]:
    """Probabilities of ``p0 (p_novice / p_expert)^strength`` (ELM, equations 5 and 6), from log-probabilities."""
    scores = []
    for own, of_expert, of_novice in zip(bare, expert, novice, strict=True):
        difference = of_novice - of_expert
        # One-sided: what the novice prefers is raised by a strength of 1 at most.
        scores.append(own + (min(strength, 1.0) if one_sided and difference > 0 else strength) * difference)
    if top_k:
        least = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores = [score if score >= least else -math.inf for score in scores]
    return softmax(scores)


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities from scores."""
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def divergence(target: Sequence[float], logits: Sequence[float], stored: Sequence[int]) -> float:
    """KL(target || model) in nats on the outcomes "each stored token" and "any other token"."""
    model = softmax(logits)
    outcomes = [(target[token], model[token]) for token in stored]
    others = [token for token in range(len(logits)) if token not in set(stored)]
    outcomes.append((math.fsum(target[token] for token in others), math.fsum(model[token] for token in others)))
    return math.fsum(p * math.log(p / q) for p, q in outcomes if p > 0)
