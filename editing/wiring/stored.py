"""How a model's tensors are stored: names and layouts on disk, beside those in memory.

transformers renames and reshapes tensors when it loads a checkpoint: experts that are stored one by one are one tensor
in memory, and a prefix may differ. The pairs are found by their numbers, which are random in a small copy.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredForm:
    """One stored tensor that holds a parameter or a part of it."""

    name: str
    transposed: bool

    def axis_of(self, axis: int) -> int:
        """Where an axis of the parameter stands in the stored tensor, counted from the last."""
        return {-1: -2, -2: -1}[axis] if self.transposed else axis


@dataclass(frozen=True)
class StoredForms:
    """What a checkpoint of a model looks like."""

    tensors: dict[str, Tensor]
    """By their stored names."""
    spellings: tuple[tuple[str, str], ...]
    _forms: dict[str, list[StoredForm]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def of(self, parameter: str) -> list[StoredForm]:
        """The stored tensors that hold a parameter, where they are named or laid out in another way."""
        return self._forms.get(parameter, [])


@torch.no_grad()
def stored_forms(model: Any) -> StoredForms:
    """Names and layouts of a small copy's tensors in a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: value.detach() for name, value in model.state_dict().items()}
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    pieces: dict[tuple[Any, ...], list[tuple[str, bool]]] = defaultdict(list)
    for name, value in state.items():
        for piece, transposed in _pieces(value):
            pieces[_key(piece)].append((name, transposed))
    forms: dict[str, list[StoredForm]] = defaultdict(list)
    spellings: dict[tuple[str, str], None] = {}
    for name, value in stored.items():
        if name in state:
            continue
        held = pieces.get(_key(_first_matrix(value)), [])
        # A tied unembedding holds the embedding's numbers: the name that ends alike is meant.
        nearest = max((_common_end(parameter, name) for parameter, _ in held), default=0)
        for parameter, transposed in held:
            if _common_end(parameter, name) < nearest:
                continue
            forms[parameter].append(StoredForm(name, transposed))
            spelling = _spelling(parameter, name)
            if value.shape == state[parameter].shape and not transposed and spelling:
                spellings[spelling] = None
    return StoredForms(stored, tuple(spellings), dict(forms))


def _pieces(value: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """A tensor and, of experts in one tensor, each expert's matrix, as they are and transposed."""
    if value.dim() == 3:
        for matrix in value:
            yield matrix, False
            yield matrix.T, True
        return
    yield value, False


def _first_matrix(value: Tensor) -> Tensor:
    return value[0] if value.dim() == 3 else value


def _key(value: Tensor) -> tuple[Any, ...]:
    """The first numbers of a tensor, which in a random model occur once."""
    flat = value.reshape(-1)[:6].tolist() if value.numel() else []
    return (*value.shape, *flat)


def _common_end(one: str, other: str) -> int:
    """How many parts of two names are the same, counted from the end."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)


def _spelling(parameter: str, stored: str) -> tuple[str, str] | None:
    """What two names start with before they are the same, numbers left open; None if they differ in a number."""
    end = _common_end(parameter, stored)
    one, other = (name.split(".")[: name.count(".") + 1 - end] for name in (parameter, stored))
    numbers = [[part for part in parts if part.isdigit()] for parts in (one, other)]
    if numbers[0] != numbers[1]:
        return None
    starts = ["".join(("{n}" if part.isdigit() else part) + "." for part in parts) for parts in (one, other)]
    # A whole name that differs has no end in common, and so no dot.
    return (starts[0], starts[1]) if end else (starts[0][:-1], starts[1][:-1])
