"""Tier 2: what fine-tuning attackers train. Afterwards the model is what it was, bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ....editing.architectures import architecture_of, layer_count
from ....editing.edits.dense import weights_trained
from ....editing.training.adapters import adapter_modules
from ....editing.training.parallel_adapters import ParallelAdapters, low_rank_attackers
from .table import RANK

ALPHA_OVER_RANK = 2.0


@contextmanager
def low_rank(model: Any, seeds: Sequence[int], ranks: Sequence[int] | None = None) -> Iterator[ParallelAdapters]:
    """LoRA on all linear modules of all layers, one adapter a seed; of ``RANK`` unless ranks are given."""
    config = model.config.to_dict()
    modules = adapter_modules(model, architecture_of(config), range(layer_count(config)))
    with low_rank_attackers(model, modules, ranks or RANK, ALPHA_OVER_RANK, seeds) as adapters:
        yield adapters


@contextmanager
def all_weights(model: Any, seeds: Sequence[int]) -> Iterator[ParallelAdapters]:
    """Every parameter itself, embeddings, norms and experts included, so one attacker at a time."""
    assert len(seeds) == 1
    adapters = ParallelAdapters(1)
    with weights_trained(model, [name for name, _ in model.named_parameters()]) as before:
        adapters.owned = [[p for name, p in model.named_parameters() if name in before]]
        yield adapters
