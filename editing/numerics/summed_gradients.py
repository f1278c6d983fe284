"""Gradients of frozen weights, summed over many batches in fp32."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def summed_gradients(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Sum the gradients of some weights, and of nothing else, while the context lasts.

    Each weight's gradient is added to its sum and freed as soon as it is whole, so that a backward holds few of them.

    Args:
        model: Of which the weights are parameters; which of its parameters are trained is put back afterwards.
        weights: By any name.

    Returns:
        The sums by the same names, in fp32, beside their weights.

    Example:
        >>> with summed_gradients(model, {"w": model.w}) as sums:  # doctest: +SKIP
        ...     for batch in batches:
        ...         loss(model, batch).backward()
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(weight) for weight in weights.values()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    handles = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        for name, weight in weights.items():
            handles.append(weight.register_post_accumulate_grad_hook(_adding_to(sums[name])))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trained in before:
            parameter.requires_grad_(trained)
            parameter.grad = None


def _adding_to(total: Tensor) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    return add
