"""Edits on disk: ``edit.json`` describes the edit, ``edit.safetensors`` holds its tensors.

Example:
    >>> save_edit(edit, Path("my-edit"))
    >>> edit = load_edit(Path("my-edit"))
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ...editing.edits.base import WeightEdit
from ...editing.edits.dense import Delta, DenseUpdate
from ...editing.edits.low_rank import ExpertFactors, Factors, LowRankUpdate
from ...editing.edits.pruned_units import PrunedUnits, Semantics
from ...editing.edits.subspace_removal import Edit, Embeddings, Variant
from ...editing.errors import EditError, RequestError
from ..files.forms import Form, validated
from ..files.opened import Telling, Unreadable
from ..files.parsed import read_object
from ..files.tensors import check_finite_tensors, load_safetensors
from .adapter_store import pack_adapter, unpack_adapter
from .manifest import FOLDER, check_unchanged, checkpoint_of

SCHEMA_VERSION = 1
DESCRIPTION, TENSORS = "edit.json", "edit.safetensors"
LEFT, RIGHT = ".left", ".right"
BASES = "layer_bases"
"""The tensor of an orthogonalization that takes another subspace out of each layer."""


def save_edit(edit: WeightEdit, folder: Path) -> None:
    """Write an edit into a folder.

    Raises:
        EditError: A value of it is NaN or infinite.
    """
    from safetensors.torch import save_file

    tensors, description = METHODS[edit.method].pack(edit)
    try:
        check_finite_tensors(tensors)
    except Unreadable as error:
        raise EditError(f"the edit was not stored: its {error}; learn it again with smaller steps") from error
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, {"format": "pt"})
    content = {"schema_version": SCHEMA_VERSION, "method": edit.method, **description, "provenance": edit.provenance}
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_edit(folder: Path) -> WeightEdit:
    """Read an edit written by ``save_edit``, from its own folder, from a checkpoint or from a run's folder.

    Raises:
        RequestError: The folder holds no edit, or the edit is damaged or of another version.
        VerifyError: The edit of a published checkpoint is no longer what was published.
    """
    places = (folder, folder / FOLDER, checkpoint_of(folder) / FOLDER)
    folder = next((place for place in places if (place / DESCRIPTION).is_file()), folder)
    if not (folder / DESCRIPTION).is_file():
        raise RequestError(
            f"{folder} holds no {DESCRIPTION}; give a run's folder, its checkpoint or checkpoint/{FOLDER}"
        )
    # An edit beside a published checkpoint is covered by its checksums.
    if folder.name == FOLDER:
        check_unchanged(folder.parent, [f"{FOLDER}/{DESCRIPTION}", f"{FOLDER}/{TENSORS}"])
    damaged = Telling(RequestError, "fetch it again")
    with damaged.about(f"the edit in {folder}: {DESCRIPTION}"):
        content = read_object(folder / DESCRIPTION)
        about = validated(_Kind, content)
        if about.schema_version == SCHEMA_VERSION and about.method in METHODS:
            validated(METHODS[about.method].form, content)
    if about.schema_version != SCHEMA_VERSION or about.method not in METHODS:
        raise RequestError(
            f"{folder / DESCRIPTION} is a {about.method} edit of version {about.schema_version}; "
            f"this excise applies edits of version {SCHEMA_VERSION}: {', '.join(METHODS)}"
        )
    with damaged.about(f"the edit in {folder}: {TENSORS}"):
        tensors = load_safetensors(folder / TENSORS)
        check_finite_tensors(tensors)
        return METHODS[about.method].unpack(tensors, content)


Description = dict[str, Any]
Count = Annotated[int, Field(ge=1)]


class _Kind(Form):
    schema_version: int
    method: str


class _Subspace(Form):
    model_type: str
    layer_strengths: list[float]
    embeddings: Embeddings
    embedding_strength: float | None = None
    mlp_strengths: list[float] | None = None
    width: Count | None = None
    rank: Count | None = None
    variant: Variant
    provenance: dict[str, Any]


class _Update(Form):
    model_type: str
    width: Count
    layers: Count
    provenance: dict[str, Any]


class _Adapter(_Update):
    unties: bool
    updates: dict[str, list[str]]


class _Pruned(_Update):
    semantics: Semantics
    head_width: Count


@dataclass(frozen=True)
class Method:
    """How one kind of edit is stored."""

    form: type[Form]
    """What the description must hold."""
    pack: Callable[[Any], tuple[dict[str, Tensor], Description]]
    unpack: Callable[[dict[str, Tensor], Description], WeightEdit]


def _pack_subspace(edit: Edit) -> tuple[dict[str, Tensor], Description]:
    d, k = edit.basis.shape
    description = {
        "model_type": edit.model_type,
        "width": d,
        "rank": k,
        "layer_strengths": list(edit.layer_strengths),
        "embeddings": edit.embeddings,
        "embedding_strength": edit.embedding_strength,
        "variant": edit.variant,
    }
    if edit.mlp_strengths is not None:
        description["mlp_strengths"] = list(edit.mlp_strengths)
    bases = {} if edit.layer_bases is None else {BASES: edit.layer_bases}
    return {"basis": edit.basis, **bases}, description


def _unpack_subspace(tensors: dict[str, Tensor], content: Description) -> Edit:
    basis = _matrix(tensors, "basis")
    said = [content.get(key, size) for key, size in zip(("width", "rank"), basis.shape, strict=True)]
    if said != list(basis.shape):
        raise Unreadable(f"tensor basis is {list(basis.shape)}, but {DESCRIPTION} says width {said[0]}, rank {said[1]}")
    mlps = content.get("mlp_strengths")
    if mlps is not None and len(mlps) != len(content["layer_strengths"]):
        raise Unreadable(f"{len(mlps)} mlp_strengths stand beside {len(content['layer_strengths'])} layer_strengths")
    return Edit(
        basis,
        content["model_type"],
        tuple(map(float, content["layer_strengths"])),
        content["embeddings"],
        # Edits that do not say took everything out of the embeddings.
        content.get("embedding_strength", 1.0),
        content["variant"],
        content["provenance"],
        None if mlps is None else tuple(map(float, mlps)),
        _matrix(tensors, BASES, (3,)) if BASES in tensors else None,
    )


def _matrix(tensors: dict[str, Tensor], name: str, dimensions: tuple[int, ...] = (2,)) -> Tensor:
    if name not in tensors:
        raise Unreadable(f"it has no tensor {name}")
    if (
        tensors[name].dim() not in dimensions
        or not all(tensors[name].shape[:-2])
        or not tensors[name].is_floating_point()
    ):
        kind = f"{tensors[name].dtype} of shape {list(tensors[name].shape)}"
        raise Unreadable(
            f"tensor {name} is {kind}, not floating-point numbers in {' or '.join(map(str, dimensions))} dimensions"
        )
    return tensors[name].float()


def _pack_factors(edit: LowRankUpdate) -> tuple[dict[str, Tensor], Description]:
    tensors = {name + LEFT: factors.left for name, factors in edit.factors.items()}
    tensors |= {name + RIGHT: factors.right for name, factors in edit.factors.items()}
    return tensors, {"model_type": edit.model_type, "width": edit.width, "layers": edit.layers}


def _unpack_factors(tensors: dict[str, Tensor], content: Description) -> LowRankUpdate:
    names = sorted(name.removesuffix(LEFT) for name in tensors if name.endswith(LEFT))
    if len(tensors) != 2 * len(names):
        raise Unreadable(f"it holds {len(tensors)} tensors, not a left and a right factor each")
    factors: dict[str, Factors | ExpertFactors] = {}
    for name in names:
        left, right = (_matrix(tensors, name + end, (2, 3)) for end in (LEFT, RIGHT))
        # Fused experts have a pair each, and their number comes first.
        if left.dim() != right.dim() or left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
            raise Unreadable(f"the factors of {name} are {list(left.shape)} and {list(right.shape)}")
        factors[name] = Factors(left, right) if left.dim() == 2 else ExpertFactors(left, right)
    return LowRankUpdate(factors, content["model_type"], content["width"], content["layers"], content["provenance"])


def _pack_deltas(edit: DenseUpdate) -> tuple[dict[str, Tensor], Description]:
    tensors = {name: delta.values for name, delta in edit.deltas.items()}
    return tensors, {"model_type": edit.model_type, "width": edit.width, "layers": edit.layers}


def _unpack_deltas(tensors: dict[str, Tensor], content: Description) -> DenseUpdate:
    deltas = {name: Delta(_matrix(tensors, name, (2, 3))) for name in tensors}
    return DenseUpdate(deltas, content["model_type"], content["width"], content["layers"], content["provenance"])


def _pack_pruned(edit: PrunedUnits) -> tuple[dict[str, Tensor], Description]:
    tensors = {f"neurons.{layer}": torch.tensor(units, dtype=torch.int64) for layer, units in edit.neurons.items()}
    tensors |= {f"heads.{layer}": torch.tensor(units, dtype=torch.int64) for layer, units in edit.heads.items()}
    tensors |= {f"means.{layer}": means for layer, means in edit.means.items()}
    return tensors, {
        "model_type": edit.model_type,
        "width": edit.width,
        "layers": edit.layers,
        "semantics": edit.semantics,
        "head_width": edit.head_width,
    }


def _unpack_pruned(tensors: dict[str, Tensor], content: Description) -> PrunedUnits:
    neurons: dict[int, tuple[int, ...]] = {}
    heads: dict[int, tuple[int, ...]] = {}
    means: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, layer = name.partition(".")
        if kind not in ("neurons", "heads", "means") or not re.fullmatch("[0-9]{1,5}", layer):
            raise Unreadable(f"tensor {name} is not neurons.N, heads.N or means.N")
        if kind == "means":
            means[int(layer)] = _matrix(tensors, name, (1,))
        # An empty list was stored as floating-point numbers once.
        elif tensor.dim() != 1 or (len(tensor) and tensor.dtype != torch.int64) or bool((tensor < 0).any()):
            raise Unreadable(f"tensor {name} is no list of unit numbers from 0")
        else:
            (neurons if kind == "neurons" else heads)[int(layer)] = tuple(tensor.tolist())
    for number, values in means.items():
        if len(values) != len(neurons.get(number, ())):
            raise Unreadable(f"layer {number} has {len(neurons.get(number, ()))} neurons and {len(values)} means")
    if content["semantics"] == "mean" and set(means) != set(neurons):
        raise Unreadable("semantics=mean needs a mean for every neuron")
    return PrunedUnits(
        neurons,
        heads,
        content["semantics"],
        content["model_type"],
        content["width"],
        content["layers"],
        content["head_width"],
        means,
        content["provenance"],
    )


METHODS: dict[str, Method] = {
    "orthogonalize": Method(_Subspace, _pack_subspace, _unpack_subspace),
    "low_rank": Method(_Update, _pack_factors, _unpack_factors),
    "dense": Method(_Update, _pack_deltas, _unpack_deltas),
    "adapter": Method(_Adapter, pack_adapter, unpack_adapter),
    "prune": Method(_Pruned, _pack_pruned, _unpack_pruned),
}
