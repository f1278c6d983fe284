"""Experts that one parameter holds together: where a checkpoint stores each of them.

In memory the experts of a layer are one tensor [experts, rows, columns], often with gate and up projections in one matrix.
On disk they may stand one by one, divided, or the other way round.

Example:
    >>> stored_pieces(row, "model.layers.0.mlp.experts.gate_up_proj", checkpoint.tensors)
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Any

import torch
from torch import Tensor, nn

from .row import Architecture, ExpertPart, FusedExperts, forms_of, pattern_of, spelled
from .stored import StoredForms


@dataclass(frozen=True)
class StoredPiece:
    """A stored tensor that holds a part of a fused parameter."""

    name: str
    expert: int | None
    """None if it holds all experts."""
    part: ExpertPart

    def of(self, matrix: Tensor) -> Tensor:
        """The stored layout of this piece, as a view of a tensor in the parameter's layout [experts, rows, columns]."""
        own = matrix if self.expert is None else matrix[self.expert]
        places = self.part.places(own.shape[self.part.axis])
        own = own[..., places, :] if self.part.axis == -2 else own[..., places]
        return own.mT if self.part.transposed else own


def fused_family(row: Architecture, name: str) -> FusedExperts | None:
    """The row's entry for a parameter that holds all experts of a layer, by its name in memory or on disk."""
    return next((family for family in row.fused if _layer(row, family, name) is not None), None)


def stored_pieces(row: Architecture, name: str, names: Collection[str]) -> list[StoredPiece]:
    """The stored tensors that hold a fused parameter, in the order of parts and experts.

    Args:
        row: The model's architecture.
        name: The parameter's name in memory.
        names: All tensors of the checkpoint.

    Returns:
        One piece if it is stored as in memory; an empty list if a part is missing.
    """
    whole = spelled(row, name, names)
    if whole is not None:
        return [StoredPiece(whole, None, ExpertPart(whole))]
    family = fused_family(row, name)
    if family is None:
        return []
    layer, pieces = str(_layer(row, family, name)), []
    for part in family.parts:
        pattern = part.pattern.replace("{layer}", layer)
        own = _pieces(row, part, pattern, names)
        if not own:
            return []
        pieces += own
    # Every part has to have the same experts.
    per_part = [[piece.expert for piece in pieces if piece.part is part] for part in family.parts]
    return pieces if all(own == per_part[0] for own in per_part) else []


def fused_shape(pieces: Sequence[StoredPiece], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape in memory of a fused parameter that is stored in these pieces; None if they do not fit each other."""
    experts = {piece.expert for piece in pieces}
    found: tuple[int, ...] | None = None
    for piece in pieces:
        stored = shapes[piece.name]
        if len(stored) != (3 if piece.expert is None else 2):
            return None
        number = stored[0] if piece.expert is None else len(experts)
        matrix = list(stored[-2:][::-1] if piece.part.transposed else stored[-2:])
        matrix[piece.part.axis] *= piece.part.of
        if found not in (None, (number, *matrix)):
            return None
        found = (number, *matrix)
    return found


def _pieces(row: Architecture, part: ExpertPart, pattern: str, names: Collection[str]) -> list[StoredPiece]:
    if "{expert}" not in pattern:
        stored = spelled(row, pattern, names)
        return [StoredPiece(stored, None, part)] if stored else []
    found: list[StoredPiece] = []
    for expert in count():
        stored = spelled(row, pattern.replace("{expert}", str(expert)), names)
        if stored is None:
            return found
        found.append(StoredPiece(stored, expert, part))
    raise AssertionError("experts are counted without end")


def _layer(row: Architecture, family: FusedExperts, name: str) -> str | None:
    pattern = re.escape(family.pattern).replace(r"\{layer\}", r"(\d+)")
    matches = (re.fullmatch(pattern, form) for form in forms_of(row, name))
    return next((match[1] for match in matches if match), None)


@torch.no_grad()
def fused_experts(model: Any, layers: str, writers: Sequence[str], forms: StoredForms) -> tuple[FusedExperts, ...]:
    """Find the fused parameters of a small copy, and where they stand among its stored tensors.

    Args:
        model: A small copy, whose random numbers occur once each.
        layers: Module path of its layers.
        writers: Its parameters that write to the stream; those of three dimensions are experts'.
        forms: The same model as it is stored.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, FusedExperts] = {}
    for writer in writers:
        if not writer.startswith(f"{layers}.") or parameters[writer].dim() != 3:
            continue
        # The layer's number and the module of the layer: its other fused parameters are the same experts'.
        start = ".".join(writer.split(".")[: layers.count(".") + 3]) + "."
        for name, parameter in parameters.items():
            pattern = pattern_of(name, layers)
            if pattern in found or not name.startswith(start) or parameter.dim() != 3:
                continue
            module = model.get_submodule(name.rpartition(".")[0])
            if len(parameter) != len(parameters[writer]) or isinstance(module, nn.Conv1d):
                continue
            parts = _parts(name, parameter.detach(), layers, forms)
            if parts is not None:
                found[pattern] = FusedExperts(pattern, parts, bool(getattr(module, "is_transposed", False)))
    return tuple(found.values())


def _parts(name: str, parameter: Tensor, layers: str, forms: StoredForms) -> tuple[ExpertPart, ...] | None:
    """The parts in which a parameter is stored; empty if as it is, None if they are not found or incomplete."""
    same = forms.tensors.get(name)
    if same is not None and torch.equal(same, parameter):
        return ()
    lines = _lines(parameter)
    parts: dict[str, ExpertPart] = {}
    for stored, tensor in forms.tensors.items():
        part = _part(stored, pattern_of(stored, layers, forms.spellings), parameter, tensor, lines)
        if part is not None:
            parts[part.pattern] = part
    ordered = tuple(sorted(parts.values(), key=lambda part: part.index))
    complete = ordered and [part.index for part in ordered] == list(range(ordered[0].of))
    return ordered if complete and len({(part.of, part.axis) for part in ordered}) == 1 else None


_Line = tuple[float, ...]


def _lines(parameter: Tensor) -> dict[tuple[int, _Line], tuple[int, int]]:
    """Expert and place of each row (axis -2) and column (axis -1), by the axis and the first numbers."""
    return {
        (axis, tuple(line[:6].tolist())): (expert, place)
        for axis, turned in ((-2, parameter), (-1, parameter.mT))
        for expert, matrix in enumerate(turned)
        for place, line in enumerate(matrix)
    }


def _part(
    name: str, pattern: str, parameter: Tensor, tensor: Tensor, lines: Mapping[tuple[int, _Line], tuple[int, int]]
) -> ExpertPart | None:
    """The part of a parameter that a stored tensor holds, or None."""
    if tensor.dim() not in (2, 3) or (tensor.dim() == 3) != ("{expert}" not in pattern):
        return None
    stored = tensor[0] if tensor.dim() == 3 else tensor
    for transposed, axis in product((False, True), (-2, -1)):
        matrix = stored.mT if transposed else stored
        across = matrix if axis == -2 else matrix.mT
        at = lines.get((axis, tuple(across[0][:6].tolist())))
        if at is None or parameter.shape[axis] % matrix.shape[axis]:
            continue
        of = parameter.shape[axis] // matrix.shape[axis]
        for index, interleaved in product(range(of), (False, True)[: 1 + (of > 1)]):
            part = ExpertPart(pattern, axis, index, of, interleaved, transposed)
            expert = None if tensor.dim() == 3 else at[0]
            # The number in the name has to be the expert's.
            if expert is not None and f".{expert}." not in name:
                continue
            if torch.equal(StoredPiece("", expert, part).of(parameter), tensor):
                return part
    return None
