"""How a merged adapter is stored as an edit: tensors under ``PARAMETER.STEP.PART``, and the kind of each step."""

from typing import Any

import torch
from torch import Tensor

from ...editing.edits.adapter_merge import (
    AdapterMerge,
    InTurn,
    Replaced,
    ReplacedRows,
    Rescaled,
)
from ...editing.edits.low_rank import ExpertFactors, Factors, Update
from ..files.opened import Unreadable

PARTS = {
    "sum": ("left", "right"),
    "experts": ("left", "right"),
    "rescaled": ("left", "right", "magnitude"),
    "replaced": ("values",),
    "rows": ("indices", "values", "height"),
}
"""Tensors of each kind of step."""
DIMENSIONS = {"experts": 3, "magnitude": 1, "indices": 1, "height": 1}


def pack_adapter(edit: AdapterMerge) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of an adapter."""
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, list[str]] = {}
    for name, update in edit.updates.items():
        for step, (kind, parts) in enumerate(_steps(update)):
            kinds.setdefault(name, []).append(kind)
            tensors |= {f"{name}.{step}.{part}": tensor for part, tensor in parts.items()}
    about = {"model_type": edit.model_type, "width": edit.width, "layers": edit.layers, "unties": edit.unties}
    return tensors, {**about, "updates": kinds}


def unpack_adapter(tensors: dict[str, Tensor], content: dict[str, Any]) -> AdapterMerge:
    """The adapter that ``pack_adapter`` stored.

    Raises:
        Unreadable: A tensor is missing, left over or of another kind.
    """
    rest = dict(tensors)
    updates: dict[str, Update] = {}
    for name, kinds in content["updates"].items():
        for step, kind in enumerate(kinds):
            update = _step(kind, f"{name}.{step}", rest)
            updates[name] = InTurn(updates[name], update) if name in updates else update
    if rest:
        raise Unreadable(f"tensor {min(rest)} belongs to no update")
    return AdapterMerge(
        updates, content["model_type"], content["width"], content["layers"], content["unties"], content["provenance"]
    )


def _steps(update: Update) -> list[tuple[str, dict[str, Tensor]]]:
    if isinstance(update, InTurn):
        return [*_steps(update.first), *_steps(update.second)]
    if isinstance(update, Factors):
        return [("sum", {"left": update.left, "right": update.right})]
    if isinstance(update, ExpertFactors):
        return [("experts", {"left": update.left, "right": update.right})]
    if isinstance(update, Rescaled):
        factors = {"left": update.factors.left, "right": update.factors.right}
        return [("rescaled", {**factors, "magnitude": update.magnitude})]
    if isinstance(update, Replaced):
        return [("replaced", {"values": update.values})]
    assert isinstance(update, ReplacedRows)
    rows = {"indices": update.indices, "values": update.values}
    return [("rows", {**rows, "height": torch.tensor([update.height])})]


def _step(kind: str, name: str, rest: dict[str, Tensor]) -> Update:
    if kind not in PARTS:
        raise Unreadable(f"{name} is of the unknown kind {kind!r:.40}")
    parts = {part: _taken(kind, part, f"{name}.{part}", rest) for part in PARTS[kind]}
    if "left" in parts and parts["left"].shape[-1] != parts["right"].shape[-2]:
        raise Unreadable(f"the factors of {name} are {list(parts['left'].shape)} and {list(parts['right'].shape)}")
    if kind == "sum":
        return Factors(parts["left"].float(), parts["right"].float())
    if kind == "experts":
        if len(parts["left"]) != len(parts["right"]) or not len(parts["left"]):
            raise Unreadable(f"the factors of {name} are of {len(parts['left'])} and {len(parts['right'])} experts")
        return ExpertFactors(parts["left"].float(), parts["right"].float())
    if kind == "rescaled":
        if len(parts["magnitude"]) != len(parts["left"]):
            raise Unreadable(f"{name} has {len(parts['magnitude'])} norms and {len(parts['left'])} rows")
        return Rescaled(Factors(parts["left"].float(), parts["right"].float()), parts["magnitude"].float())
    if kind == "replaced":
        return Replaced(parts["values"])
    indices, height = parts["indices"], int(parts["height"][0]) if len(parts["height"]) else 0
    if len(indices) != len(parts["values"]) or bool(((indices < 0) | (indices >= height)).any()):
        raise Unreadable(f"the rows of {name} lie outside of its {height} rows")
    return ReplacedRows(indices, parts["values"].float(), height)


def _taken(kind: str, part: str, name: str, rest: dict[str, Tensor]) -> Tensor:
    if name not in rest:
        raise Unreadable(f"it has no tensor {name}")
    tensor = rest.pop(name)
    whole = part in ("indices", "height")
    fits = tensor.dtype == torch.int64 if whole else tensor.is_floating_point()
    dimensions = DIMENSIONS.get(part, DIMENSIONS.get(kind, 2))
    if not fits or (kind != "replaced" and tensor.dim() != dimensions) or not 1 <= tensor.dim() <= 3:
        raise Unreadable(f"tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}")
    return tensor
