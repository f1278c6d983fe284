"""Tier 0: the weights are rounded, or moved back toward the base; nothing is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....artifacts.checkpoints.read import open_tensors
from ....artifacts.models.load import load_weights
from ....artifacts.models.source import ModelSource
from ....editing.edits.fake_quantization import changed_weights, rounded_weights
from ....editing.errors import CheckpointError, EditError
from ..attack_data import Answers, AttackData
from .table import SINGULAR


def int8(model: Any, data: AttackData) -> Answers:
    """Round to 8 bits."""
    return _rounded(model, data, 8)


def int4(model: Any, data: AttackData) -> Answers:
    """Round to 4 bits."""
    return _rounded(model, data, 4)


def bf16(model: Any, data: AttackData) -> Answers:
    """Cast to bfloat16 and back; a checkpoint in bfloat16 stays what it is."""
    return _rounded(model, data, 16)


def undo_half(model: Any, data: AttackData) -> Answers:
    """Take half of the edit out."""
    return _undone(model, data, lambda added: added / 2)


def undo_singular(model: Any, data: AttackData) -> Answers:
    """Take the largest singular directions of the edit out."""
    return _undone(model, data, _without_largest)


def _rounded(model: Any, data: AttackData, bits: int) -> Answers:
    with rounded_weights(model, bits) as changed:
        if not changed and bits < 16:
            raise EditError("rounding changed no weight, so nothing was tested")
        return data.ask(model)


def _undone(model: Any, data: AttackData, part: Callable[[Tensor], Tensor]) -> Answers:
    """Keep only a part of what an edit added to each matrix; the base itself stays what it is."""
    assert data.base is not None
    with base_parameters(data.base) as read:

        def less(name: str, weight: Tensor) -> Tensor:
            before = read(name).to(weight.device, torch.float32)
            added = weight.float() - before
            # A weight that the edit left alone is not sent through float32 and back.
            return weight if not added.any() else before + part(added)

        with changed_weights(model, less, dict(model.named_parameters())):
            return data.ask(model)


@contextmanager
def base_parameters(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function that gives single parameters of the base, by their name in memory.

    They are read from the checkpoint one at a time. Where it holds experts one by one that are together in memory, the
    whole base is loaded.
    """
    loaded: dict[str, Tensor] = {}
    with open_tensors(folder) as read:

        def parameter(name: str) -> Tensor:
            if not loaded:
                try:
                    return read(name)
                except CheckpointError:
                    source = ModelSource("local", folder.name, folder)
                    model = load_weights(source, torch.device("cpu"), torch.float32)
                    loaded.update((key, value.detach()) for key, value in model.named_parameters())
            return loaded[name]

        yield parameter


def _without_largest(added: Tensor) -> Tensor:
    """What one direction can hold, as a bias or a gain, is left alone: all of its change would go."""
    if added.dim() < 2:
        return added
    left, values, right = torch.linalg.svd(added, full_matrices=False)
    values[..., :SINGULAR] = 0
    return (left * values[..., None, :]) @ right
