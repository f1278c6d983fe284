"""Directions on disk: one safetensors file, whose header says where each direction came from."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...editing.directions.subspaces import Place, Site, Subspace
from ...editing.errors import EditError, RequestError
from ..files.forms import Form, validated
from ..files.opened import Telling, Unreadable
from ..files.parsed import parsed_object
from ..files.tensors import check_finite_tensors, open_safetensors

SCHEMA_VERSION = 1
FILE = "directions.safetensors"
_HEADER = "excise"


class _Place(Form):
    layer: Annotated[int, Field(ge=0)]
    site: Site


class _Subspace(Form):
    place: _Place
    names: list[str]
    scores: list[float]
    source: str
    provenance: dict[str, Any]


class _File(Form):
    subspaces: list[_Subspace]


def save_directions(subspaces: Sequence[Subspace], path: Path) -> None:
    """Write the subspaces of one model into one safetensors file.

    Raises:
        EditError: A value is NaN or infinite.
    """
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
    try:
        check_finite_tensors(tensors)
    except Unreadable as error:
        raise EditError(f"the directions were not stored: {error}; find them again") from error
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
    with Telling(RequestError, f"give the {FILE} that a run wrote").about(path), open_safetensors(path) as file:
        header = (file.metadata() or {}).get(_HEADER)
        if header is None:
            raise Unreadable("it holds no directions of excise")
        content = parsed_object(header)
        if content.get("schema_version") != SCHEMA_VERSION:
            raise Unreadable(f"its version is {content.get('schema_version')!r:.40}, version {SCHEMA_VERSION} is read")
        about = validated(_File, content).subspaces
        if not about:
            raise Unreadable("it holds no directions")
        expected = {f"{number}.{part}" for number in range(len(about)) for part in ("basis", "offset")}
        names = set(file.keys())
        if left := sorted(expected - names) + sorted(names - expected - {f"{n}.readers" for n in range(len(about))}):
            raise Unreadable(f"its tensors are not those of its {len(about)} places: {left[0]}")
        subspaces = tuple(_subspace(file, number, one, names) for number, one in enumerate(about))
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


def _subspace(file: Any, number: int, about: "_Subspace", names: set[str]) -> Subspace:
    parts = {
        part: file.get_tensor(name) for part in ("basis", "offset", "readers") if (name := f"{number}.{part}") in names
    }
    for part, tensor in parts.items():
        shape = "d" if part == "offset" else "d k"
        if not tensor.is_floating_point() or tensor.dim() != len(shape.split()) or tensor.numel() == 0:
            raise Unreadable(f"{number}.{part} is {tensor.dtype} {list(tensor.shape)}, not floats [{shape}]")
    check_finite_tensors({f"{number}.{part}": tensor for part, tensor in parts.items()})
    if parts["offset"].shape != parts["basis"].shape[:1]:
        raise Unreadable(f"{number}.offset is of width {len(parts['offset'])}, {number}.basis of {len(parts['basis'])}")
    if parts.get("readers", parts["basis"]).shape != parts["basis"].shape:
        raise Unreadable(f"{number}.readers are not of the shape of {number}.basis")
    return Subspace(
        Place(about.place.layer, about.place.site),
        parts["basis"].float(),
        parts["offset"].float(),
        tuple(about.names),
        tuple(about.scores),
        about.source,
        parts["readers"].float() if "readers" in parts else None,
        about.provenance,
    )
