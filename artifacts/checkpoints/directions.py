"""Directions on disk: one safetensors file, whose header says where each direction came from."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...editing.directions.subspaces import Place, Subspace
from ...editing.errors import RequestError, one_line

SCHEMA_VERSION = 1
FILE = "directions.safetensors"
_HEADER = "excise"


def save_directions(subspaces: Sequence[Subspace], path: Path) -> None:
    """Write the subspaces of one model into one safetensors file."""
    from safetensors.torch import save_file

    tensors, about = {}, []
    for number, subspace in enumerate(subspaces):
        # safetensors refuses tensors that are not contiguous, such as columns that were picked.
        tensors[f"{number}.basis"] = subspace.basis.contiguous()
        tensors[f"{number}.offset"] = subspace.offset.contiguous()
        if subspace.readers is not None:
            tensors[f"{number}.readers"] = subspace.readers.contiguous()
        about.append(
            {
                "place": asdict(subspace.place),
                "names": subspace.names,
                "scores": subspace.scores,
                "source": subspace.source,
                "provenance": subspace.provenance,
            }
        )
    header = {_HEADER: json.dumps({"schema_version": SCHEMA_VERSION, "subspaces": about})}
    save_file(tensors, path, header)


def load_directions(path: Path, *, width: int | None = None, layers: int | None = None) -> tuple[Subspace, ...]:
    """Read what ``save_directions`` wrote.

    Args:
        path: The file.
        width: d_model of the model to use them with; other directions are refused.
        layers: Number of decoder layers of that model.

    Raises:
        RequestError: The file has no directions or is damaged, or its directions belong to another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
            subspaces = tuple(_subspace(file, number, about) for number, about in enumerate(content["subspaces"]))
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise RequestError(
            f"{path} holds no directions of excise ({one_line(error, 120)}); give the {FILE} that a run wrote"
        ) from error
    for subspace in subspaces:
        d = len(subspace.offset)
        if width is not None and d != width:
            raise RequestError(
                f"the directions in {path.name} are of width {d}, the model is of width {width}; "
                "give directions that were learned on this model"
            )
        if layers is not None and subspace.place.layer >= layers:
            raise RequestError(
                f"the directions in {path.name} are at the {subspace.place}, the model has layers 0 to {layers - 1}; "
                "give directions that were learned on this model"
            )
    return subspaces


def _subspace(file: Any, number: int, about: dict[str, Any]) -> Subspace:
    readers = f"{number}.readers"
    # An open safetensors file has keys() but no `in`.
    has_readers = readers in file.keys()  # noqa: SIM118
    return Subspace(
        Place(**about["place"]),
        file.get_tensor(f"{number}.basis").float(),
        file.get_tensor(f"{number}.offset").float(),
        tuple(about["names"]),
        tuple(about["scores"]),
        about["source"],
        file.get_tensor(readers).float() if has_readers else None,
        about["provenance"],
    )
