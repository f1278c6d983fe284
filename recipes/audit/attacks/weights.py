"""Tier 0: the weights are rounded, or moved back toward the base; nothing is trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....artifacts.checkpoints.read import open_tensors
from ....artifacts.models.load import load_weights
from ....artifacts.models.source import ModelSource
from ....editing.edits.fake_quantization import changed_weights, rounded_weights
from ....editing.errors import CheckpointError, EditError
from ....eval.anatomy import spectrum_of
from ..attack_data import Answers, Attackable, AttackData
from .table import AMPLIFIED, PRUNED, SHARES, SINGULAR


def int8(model: Any, data: Attackable) -> Answers:
    """Round to 8 bits."""
    return _rounded(model, data, 8)


def int4(model: Any, data: Attackable) -> Answers:
    """Round to 4 bits."""
    return _rounded(model, data, 4)


def bf16(model: Any, data: Attackable) -> Answers:
    """Cast to bfloat16 and back; a checkpoint in bfloat16 stays what it is."""
    return _rounded(model, data, 16)


def prune(model: Any, data: Attackable) -> dict[float, Answers]:
    """Set the smallest weights of each matrix to 0, in several shares."""
    answers = {}
    for share in PRUNED:
        with _own(data) as stored, changed_weights(model, _without_smallest(share), stored=stored):
            answers[share] = data.ask(model)
    return answers


def _without_smallest(share: float) -> Callable[[str, Tensor], Tensor]:
    def pruned(_: str, weight: Tensor) -> Tensor:
        sizes = weight.abs().flatten()
        count = int(share * sizes.numel())
        if not count:
            return weight
        smallest = sizes.topk(count, largest=False).indices
        return weight.flatten().index_fill(0, smallest, 0.0).view_as(weight)

    return pruned


def interpolate(model: Any, data: Attackable) -> dict[float, Answers]:
    """Take a share of the edit out, in several shares."""
    return {share: _undone(model, data, partial(torch.mul, other=1 - share)) for share in SHARES}


def undo_cliff(model: Any, data: Attackable) -> Answers:
    """Take the singular directions of the edit out that stand before a cliff."""
    return _undone(model, data, _without_cliff)


def amplify(model: Any, data: AttackData) -> dict[float, Sequence[float]]:
    """Choose by the edited model's log-probabilities, moved beyond the base's by several times their difference."""
    questions = data.multiple_choice
    edited = questions.log_probabilities(model)
    with as_base(model, data):
        base = questions.log_probabilities(model)
    return {
        times: questions.highest([e + times * (b - e) for e, b in zip(edited, base, strict=True)])
        for times in AMPLIFIED
    }


def undo_singular(model: Any, data: Attackable) -> Answers:
    """Take the largest singular directions of the edit out."""
    return _undone(model, data, _without_largest)


def _rounded(model: Any, data: Attackable, bits: int) -> Answers:
    with _own(data) as stored, rounded_weights(model, bits, stored) as changed:
        if not changed and bits < 16:
            raise EditError("rounding changed no weight, so nothing was tested")
        return data.ask(model)


def _undone(model: Any, data: Attackable, part: Callable[[Tensor], Tensor]) -> Answers:
    """Keep only a part of what an edit added to each matrix; the base itself stays what it is."""
    assert data.base is not None
    with base_parameters(data.base) as read:

        def less(name: str, weight: Tensor) -> Tensor:
            before = read(name).to(weight.device, torch.float32)
            added = weight.float() - before
            # A weight that the edit left alone is not sent through float32 and back.
            return weight if not added.any() else before + part(added)

        with _own(data) as stored, changed_weights(model, less, dict(model.named_parameters()), stored):
            return data.ask(model)


@contextmanager
def as_base(model: Any, data: Attackable) -> Iterator[None]:
    """While this lasts, the model has the base's weights."""
    assert data.base is not None
    every = dict(model.named_parameters())
    with base_parameters(data.base) as read, _own(data) as stored:
        with changed_weights(model, lambda name, weight: read(name).to(weight), every, stored):
            yield


@contextmanager
def _own(data: Attackable) -> Iterator[Callable[[str], Tensor | None] | None]:
    """Yield a function that reads the model's own weights from its checkpoint; None where it has none.

    It gives nothing of a weight that its checkpoint holds in several tensors, as experts.
    """
    if data.own is None:
        yield None
        return
    with open_tensors(data.own) as read:

        def stored(name: str) -> Tensor | None:
            try:
                return read(name)
            except CheckpointError:
                return None

        yield stored


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


def _without_cliff(added: Tensor) -> Tensor:
    """What stays of a change without the directions before its cliff; a change that has none, or of a vector, stays."""
    if added.dim() < 2:
        return added
    left, values, right = torch.linalg.svd(added, full_matrices=False)
    # One row a matrix; of experts together in one tensor, one row an expert.
    for each in values.view(-1, values.shape[-1]):
        if each.any() and (found := spectrum_of(each)).shallow:
            each[: found.cliff_rank] = 0
    return (left * values[..., None, :]) @ right
