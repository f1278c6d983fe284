"""Training without the base's own randomness."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NOISE = ("drop", "jitter")
"""Parts of the names under which models keep rates of dropout, of skipped layers, and of noise on their routers."""


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Let a model compute the same in training mode as in evaluation mode, and put its rates back afterwards.

    GPT-2 and OPT were trained with dropout, and their configurations still say so. An edit compares a model with its
    base or holds it to the base's states, so noise of the base would count as a difference: with a fresh adapter, the
    retain term of RMU is 0 in truth and 879 on GPT-2 under dropout.

    The mode itself stays as it is, because gradient checkpointing is on in training mode only.
    """
    rates = [(owner, name, value) for owner in _owners(model) for name, value in _rates(owner)]
    try:
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, value in rates:
            setattr(owner, name, value)


def _owners(model: nn.Module) -> Iterator[Any]:
    yield from model.modules()
    # Some layers read the rate from the configuration at every call.
    if hasattr(model, "config"):
        yield model.config


def _rates(owner: Any) -> Iterator[tuple[str, float]]:
    for name, value in vars(owner).items():
        is_rate = name == "p" if isinstance(owner, nn.modules.dropout._DropoutNd) else any(n in name for n in NOISE)
        if is_rate and isinstance(value, float | int) and not isinstance(value, bool) and value:
            yield name, value
