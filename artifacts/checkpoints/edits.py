"""Edits on disk: ``edit.json`` describes the edit, ``edit.safetensors`` holds its tensors.

Example:
    >>> save_edit(edit, Path("my-edit"))
    >>> edit = load_edit(Path("my-edit"))
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...editing.edits.base import WeightEdit
from ...editing.edits.dense import Delta, DenseUpdate
from ...editing.edits.low_rank import Factors, LowRankUpdate
from ...editing.edits.pruned_units import PrunedUnits
from ...editing.edits.subspace_removal import Edit
from ...editing.errors import RequestError
from .manifest import FOLDER, checkpoint_of

SCHEMA_VERSION = 1
DESCRIPTION, TENSORS = "edit.json", "edit.safetensors"
LEFT, RIGHT = ".left", ".right"


def save_edit(edit: WeightEdit, folder: Path) -> None:
    """Write an edit into a folder."""
    from safetensors.torch import save_file

    tensors, description = METHODS[edit.method].pack(edit)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, {"format": "pt"})
    content = {"schema_version": SCHEMA_VERSION, "method": edit.method, **description, "provenance": edit.provenance}
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_edit(folder: Path) -> WeightEdit:
    """Read an edit written by ``save_edit``, from its own folder, from a checkpoint or from a run's folder.

    Raises:
        RequestError: The folder holds no edit, or the edit is damaged or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    places = (folder, folder / FOLDER, checkpoint_of(folder) / FOLDER)
    folder = next((place for place in places if (place / DESCRIPTION).is_file()), folder)
    description = folder / DESCRIPTION
    if not description.is_file():
        raise RequestError(
            f"{folder} holds no {DESCRIPTION}; give a run's folder, its checkpoint or checkpoint/{FOLDER}"
        )
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION or content["method"] not in METHODS:
            raise RequestError(
                f"{description} is a {content['method']} edit of version {content['schema_version']}; "
                f"this excise applies edits of version {SCHEMA_VERSION}: {', '.join(METHODS)}"
            )
        return METHODS[content["method"]].unpack(load_file(folder / TENSORS), content)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise RequestError(f"the edit in {folder} is damaged ({error}); fetch it again") from error


Description = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """How one kind of edit is stored."""

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
        "embedding_strength": edit.strength_at(None),
        "variant": edit.variant,
    }
    return {"basis": edit.basis}, description


def _unpack_subspace(tensors: dict[str, Tensor], content: Description) -> Edit:
    return Edit(
        tensors["basis"].float(),
        content["model_type"],
        tuple(content["layer_strengths"]),
        content["embeddings"],
        # Edits that do not say took everything out of the embeddings.
        float(content.get("embedding_strength", 1.0)),
        content["variant"],
        content["provenance"],
    )


def _pack_factors(edit: LowRankUpdate) -> tuple[dict[str, Tensor], Description]:
    tensors = {name + LEFT: factors.left for name, factors in edit.factors.items()}
    tensors |= {name + RIGHT: factors.right for name, factors in edit.factors.items()}
    return tensors, {"model_type": edit.model_type, "width": edit.width, "layers": edit.layers}


def _unpack_factors(tensors: dict[str, Tensor], content: Description) -> LowRankUpdate:
    names = sorted(name.removesuffix(LEFT) for name in tensors if name.endswith(LEFT))
    factors = {name: Factors(tensors[name + LEFT].float(), tensors[name + RIGHT].float()) for name in names}
    if len(tensors) != 2 * len(factors):
        raise ValueError(f"{TENSORS} holds {len(tensors)} tensors, not a left and a right factor each")
    return LowRankUpdate(factors, content["model_type"], content["width"], content["layers"], content["provenance"])


def _pack_deltas(edit: DenseUpdate) -> tuple[dict[str, Tensor], Description]:
    tensors = {name: delta.values for name, delta in edit.deltas.items()}
    return tensors, {"model_type": edit.model_type, "width": edit.width, "layers": edit.layers}


def _unpack_deltas(tensors: dict[str, Tensor], content: Description) -> DenseUpdate:
    deltas = {name: Delta(tensor.float()) for name, tensor in tensors.items()}
    return DenseUpdate(deltas, content["model_type"], content["width"], content["layers"], content["provenance"])


def _pack_pruned(edit: PrunedUnits) -> tuple[dict[str, Tensor], Description]:
    tensors = {f"neurons.{layer}": torch.tensor(units) for layer, units in edit.neurons.items()}
    tensors |= {f"heads.{layer}": torch.tensor(units) for layer, units in edit.heads.items()}
    tensors |= {f"means.{layer}": means for layer, means in edit.means.items()}
    return tensors, {
        "model_type": edit.model_type,
        "width": edit.width,
        "layers": edit.layers,
        "semantics": edit.semantics,
        "head_width": edit.head_width,
    }


def _unpack_pruned(tensors: dict[str, Tensor], content: Description) -> PrunedUnits:
    def by_layer(kind: str) -> dict[int, Tensor]:
        return {int(name.split(".")[1]): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}

    neurons, heads = (
        {layer: tuple(t.tolist()) for layer, t in by_layer(kind).items()} for kind in ("neurons", "heads")
    )
    return PrunedUnits(
        neurons,
        heads,
        content["semantics"],
        content["model_type"],
        content["width"],
        content["layers"],
        content["head_width"],
        by_layer("means"),
        content["provenance"],
    )


METHODS: dict[str, Method] = {
    "orthogonalize": Method(_pack_subspace, _unpack_subspace),
    "low_rank": Method(_pack_factors, _unpack_factors),
    "dense": Method(_pack_deltas, _unpack_deltas),
    "prune": Method(_pack_pruned, _unpack_pruned),
}
