"""What sets two checkpoints apart, tensor by tensor; reads one tensor of each at a time."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts.checkpoints.read import Checkpoint, open_checkpoint, read_tensor
from ..artifacts.checkpoints.staging import staged_folder
from ..artifacts.models.find import find_model
from ..artifacts.reporting import charts
from ..editing.errors import RequestError

SHOWN = 5
"""Singular values kept of each tensor."""


@dataclass(frozen=True)
class TensorDifference:
    """B minus A for one tensor that differs."""

    name: str
    shape: tuple[int, ...]
    relative_norm: float | None
    """|B - A| / |A|, Frobenius; None where A is all zero."""
    largest: float
    """Largest absolute difference of an element."""
    effective_rank: float | None = None
    """exp of the entropy of the normalized singular values (Roy and Vetterli 2007); None of vectors."""
    singular_values: tuple[float, ...] = ()
    """The largest few of B - A."""


@dataclass(frozen=True)
class Difference:
    """Two checkpoints side by side."""

    a: str
    b: str
    changed: tuple[TensorDifference, ...]
    """Largest relative change first."""
    same: int
    """Tensors that are equal bit for bit."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """As ``diff.json`` holds it."""
        return asdict(self)


def difference(a: str, b: str, *, spectrum: bool = True, advance: Callable[[int], None] = lambda _: None) -> Difference:
    """Compare two models by reference.

    Args:
        spectrum: Also decompose each change; cubic in the smaller side of a matrix.

    Raises:
        RequestError: They share no tensor, or one has another shape.
    """
    sources = [find_model(ref) for ref in (a, b)]
    one, other = (open_checkpoint(source.folder) for source in sources)
    shared = [name for name in one.tensors if name in other.tensors]
    if not shared:
        raise RequestError(
            f"{sources[0].name} and {sources[1].name} share no tensor; compare a model with what was made of it"
        )
    changed = []
    for name in shared:
        if one.tensors[name].shape != other.tensors[name].shape:
            raise RequestError(
                f"{name} is {list(one.tensors[name].shape)} in {sources[0].name} and {list(other.tensors[name].shape)} in "
                f"{sources[1].name}; compare models of one architecture"
            )
        found = _compare(name, one, other, spectrum)
        changed += [found] if found else []
        advance(one.tensors[name].size)
    changed.sort(key=lambda item: float("inf") if item.relative_norm is None else item.relative_norm, reverse=True)
    return Difference(
        sources[0].name,
        sources[1].name,
        tuple(changed),
        len(shared) - len(changed),
        tuple(sorted(set(one.tensors) - set(shared))),
        tuple(sorted(set(other.tensors) - set(shared))),
    )


def write(found: Difference, out: Path) -> None:
    """Write ``diff.json`` and ``diff.svg`` into a new folder."""
    with staged_folder(out) as staging:
        (staging / "diff.json").write_text(json.dumps(found.describe(), indent=1) + "\n", encoding="utf-8")
        (staging / "diff.svg").write_text(_plot(found), encoding="utf-8")


def _compare(name: str, a: Checkpoint, b: Checkpoint, spectrum: bool) -> TensorDifference | None:
    before, after = read_tensor(a.tensors[name]), read_tensor(b.tensors[name])
    if before.dtype == after.dtype and torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
        return None
    before, change = before.float(), after.float() - before.float()
    norm = float(before.norm())
    relative = float(change.norm()) / norm if norm else None
    matrix = change.reshape(-1, change.shape[-1]) if change.ndim > 1 else None
    values = _singular_values(matrix) if spectrum and matrix is not None and bool(matrix.any()) else None
    return TensorDifference(
        name,
        tuple(change.shape),
        relative,
        float(change.abs().max()),
        None if values is None else effective_rank(values),
        () if values is None else tuple(values[:SHOWN].tolist()),
    )


def _singular_values(matrix: Tensor) -> Tensor:
    """Exact, largest first, through the Gram matrix of the smaller side in float64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().flip(0)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of singular values that are made to sum to 1."""
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def _plot(found: Difference) -> str:
    """Relative change by layer, one line for each kind of tensor."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for item in found.changed:
        if item.relative_norm is not None and (match := re.search(r"\.(\d+)\.(.+)", item.name)):
            lines.setdefault(match[2].removesuffix(".weight"), []).append((int(match[1]), item.relative_norm))
    return charts.svg_file(charts.kinds_by_layer(lines, "|B - A| / |A|", f"{found.b} against {found.a}"))
