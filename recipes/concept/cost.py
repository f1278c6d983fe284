"""About what a run on a pack costs: tokens, and the least time that their matrix products take here."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SIDE = 1024
"""Rows and columns of the product that is timed."""
MODELS = 2
"""A run measures its base and the edited model."""


@dataclass(frozen=True)
class Cost:
    """An estimate for one recipe; a run takes longer than its products alone."""

    recipe: str
    items: int
    """Likelihoods and replies that are measured of each model."""
    measured_tokens: int
    steps: int
    trained_tokens: int
    parameters: int
    seconds: float
    """Of the products alone, at the rate of this machine in float32."""
    rate: float
    """Floating-point operations a second."""
    memory: int = 0
    """Bytes that it holds at its peak; 0 where that is not planned."""


def estimated(
    recipe: str,
    plan: Mapping[str, Any],
    itemsize: int,
    batch: int,
    lengths: Mapping[str, float],
    rate: float,
    memory: int = 0,
) -> Cost:
    """The cost of a recipe from what its dry run says.

    Args:
        recipe: Its name.
        plan: What ``describe`` says: items measured, gradient steps, bytes of the model in memory.
        itemsize: Bytes of a weight in memory.
        batch: Rows of an optimizer step.
        lengths: Mean tokens of a row, by file of the pack.
        rate: Floating-point operations a second.
        memory: Bytes at the run's peak.
    """
    items, steps = int(plan.get("items_measured", 0)), int(plan.get("gradient_steps", 0))
    asked = [lengths[name] for name in ("questions", "prompts") if name in lengths]
    learned = [lengths[name] for name in ("forget", "retain", "train") if name in lengths]
    measured = round(items * _mean(asked or learned))
    trained = round(steps * batch * sum(learned))
    parameters = int(plan.get("memory_bytes", 0)) // itemsize
    # Two operations a weight and token forward, four more backward.
    operations = 2 * parameters * MODELS * measured + 6 * parameters * trained
    return Cost(recipe, items, measured, steps, trained, parameters, operations / rate, rate, memory)


def rate_here() -> float:
    """Floating-point operations a second of a float32 product, the best of three."""
    one, other = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        one @ other
        times.append(time.perf_counter() - start)
    return float(2 * SIDE**3 / min(times[1:]))


def in_words(costs: Sequence[Cost]) -> list[str]:
    """A line a recipe."""
    return [
        f"{cost.recipe}: {cost.items:,} items a model ({cost.measured_tokens:,} tokens)"
        + (f", {cost.steps:,} steps ({cost.trained_tokens:,} tokens)" if cost.steps else "")
        + f"; at least {_time(cost.seconds)} on this machine's processor ({cost.rate / 1e9:.0f} GFLOP/s)"
        + (f"; peak memory {cost.memory / 1e9:.2f} GB" if cost.memory else "")
        for cost in costs
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
