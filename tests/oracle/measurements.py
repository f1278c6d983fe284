"""Whole measurements a second time from their definitions: float64, one text, question and token at a time.

Nothing here imports excise.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .language import log_probabilities


def perplexity(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-probability of all tokens but each text's first."""
    nats, tokens = 0.0, 0
    for ids in texts:
        for place in range(1, len(ids)):
            nats -= log_probabilities(model, ids[:place])[ids[place]]
            tokens += 1
    return math.exp(nats / tokens)


def divergence(base: Any, other: Any, texts: Sequence[tuple[Sequence[int], int]]) -> float:
    """Mean over tokens of KL(base || other); of each text the tokens from a place on, in nats."""
    total, tokens = 0.0, 0
    for ids, start in texts:
        for place in range(start, len(ids)):
            p, q = (log_probabilities(model, ids[:place]) for model in (base, other))
            total += sum(math.exp(one) * (one - two) for one, two in zip(p, q, strict=True))
            tokens += 1
    return total / tokens


def stream(model: Any, ids: Sequence[int], point: int) -> np.ndarray:
    """The residual stream before layer ``point`` (after the last, where there is none), at the last token."""
    found: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = []
    if point < len(layers):
        hooks.append(layers[point].register_forward_pre_hook(lambda _, args: found.append(args[0])))
    else:
        hooks.append(
            layers[-1].register_forward_hook(lambda _, __, out: found.append(out if torch.is_tensor(out) else out[0]))
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return found[0][0, -1].double().numpy()


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Least squares with a penalty, as least squares of more rows."""
    rows = np.vstack([x, math.sqrt(penalty) * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]


def probe(
    training: Sequence[tuple[np.ndarray, np.ndarray, int]],
    testing: Sequence[tuple[np.ndarray, np.ndarray, int]],
    penalties: Sequence[float],
    folds: int,
) -> tuple[float, list[bool]]:
    """Accuracy that cross-validation on the training set expects, and which test questions a ridge probe answers.

    Each question is its stream, the unembedding of each choice's first token, and the place of the true choice.
    """
    states = np.stack([state for state, _, _ in training])
    mean, spread = states.mean(0), states.std(0, ddof=1) + 1e-6
    centre = np.concatenate([choices for _, choices, _ in training]).mean(0)
    x = (states - mean) / spread
    y = np.stack([choices[answer] - centre for _, choices, answer in training])
    scale = max(float((x**2).sum(1).mean()), 1e-6)

    def answered(weights: np.ndarray, state: np.ndarray, choices: np.ndarray) -> int:
        guess = ((state - mean) / spread) @ weights
        cosines = [float(guess @ (one - centre) / np.linalg.norm(one - centre)) for one in choices]
        return int(np.argmax(cosines))

    expected = []
    for penalty in penalties:
        right = 0
        for place, (state, choices, answer) in enumerate(training):
            inside = [other for other in range(len(training)) if other % folds != place % folds]
            right += answered(ridge(x[inside], y[inside], penalty * scale), state, choices) == answer
        expected.append(right / len(training))
    best = max(range(len(penalties)), key=lambda index: expected[index])
    weights = ridge(x, y, penalties[best] * scale)
    return expected[best], [answered(weights, state, choices) == answer for state, choices, answer in testing]
