"""The difference of two checkpoints, tensor by tensor; memory holds one tensor of each at a time."""

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
from ..artifacts.models.dequantized import check_full_precision
from ..artifacts.models.find import find_adapter, find_model
from ..artifacts.reporting import charts
from ..editing.errors import RequestError
from ..eval.anatomy import Anatomy, Spectrum, anatomy, spectrum_of

SHOWN = 5
"""Number of singular values reported for each tensor."""


@dataclass(frozen=True)
class TensorDifference:
    """B minus A for one tensor that differs."""

    name: str
    shape: tuple[int, ...]
    relative_norm: float | None
    """|B - A| / |A| in the Frobenius norm; None if A is all zero."""
    largest: float
    """Largest absolute difference of an element."""
    norm: float = 0.0
    """|B - A|, the Frobenius norm."""
    spectrum: Spectrum | None = None
    """What its singular values say; None for vectors."""
    singular_values: tuple[float, ...] = ()
    """The largest singular values of B - A."""


@dataclass(frozen=True)
class Difference:
    """The result of comparing two checkpoints."""

    a: str
    b: str
    changed: tuple[TensorDifference, ...]
    """Largest relative change first."""
    same: int
    """Number of tensors that are equal bit for bit."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    anatomy: Anatomy
    """Which parts and layers changed, and whether the change is one low-rank adapter."""

    def describe(self) -> dict[str, Any]:
        """The content of ``diff.json``."""
        return asdict(self)


def difference(a: str, b: str, *, spectrum: bool = True, advance: Callable[[int], None] = lambda _: None) -> Difference:
    """Compare two models by reference.

    Args:
        a: The first model: a folder, a Hub id or ``builtin:NAME``.
        b: The second model.
        spectrum: Also compute singular values of each change; cubic in the smaller side of a matrix.
        advance: Called with the bytes of each compared tensor, for progress.

    Raises:
        RequestError: The models share no tensor, or a tensor has different shapes.
    """
    # A model that an adapter is compared with is the adapter's base, unless it is an adapter as well.
    base = None if find_adapter(a) else a
    sources = [find_model(a), find_model(b, base)]
    before, after = (open_checkpoint(source.folder) for source in sources)
    for source, checkpoint in zip(sources, (before, after), strict=True):
        check_full_precision(checkpoint, source.name)
    shared = [name for name in before.tensors if name in after.tensors]
    if not shared:
        raise RequestError(
            f"{sources[0].name} and {sources[1].name} share no tensor; compare a model with an edit or fine-tune of it"
        )
    changed = []
    for name in shared:
        if before.tensors[name].shape != after.tensors[name].shape:
            raise RequestError(
                f"{name} is {list(before.tensors[name].shape)} in {sources[0].name} and "
                f"{list(after.tensors[name].shape)} in {sources[1].name}; compare models of the same architecture"
            )
        tensor = _compare(name, before, after, spectrum)
        changed += [tensor] if tensor else []
        advance(before.tensors[name].size)
    changed.sort(key=lambda item: float("inf") if item.relative_norm is None else item.relative_norm, reverse=True)
    return Difference(
        sources[0].name,
        sources[1].name,
        tuple(changed),
        len(shared) - len(changed),
        tuple(sorted(set(before.tensors) - set(shared))),
        tuple(sorted(set(after.tensors) - set(shared))),
        anatomy([(item.name, item.norm, item.spectrum) for item in changed], shared),
    )


def write(result: Difference, out: Path) -> None:
    """Write ``diff.json`` and ``diff.svg`` into a new folder."""
    with staged_folder(out) as staging:
        (staging / "diff.json").write_text(json.dumps(result.describe(), indent=1) + "\n", encoding="utf-8")
        (staging / "diff.svg").write_text(_plot(result), encoding="utf-8")


def _compare(name: str, a: Checkpoint, b: Checkpoint, spectrum: bool) -> TensorDifference | None:
    before, after = read_tensor(a.tensors[name]), read_tensor(b.tensors[name])
    # As bits, because NaN differs from itself and 0 equals -0.
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
        float(change.norm()),
        None if values is None else spectrum_of(values),
        () if values is None else tuple(values[:SHOWN].tolist()),
    )


def _singular_values(matrix: Tensor) -> Tensor:
    """All singular values, largest first, from the Gram matrix of the smaller side in float64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().flip(0)


def _plot(result: Difference) -> str:
    """Relative change by layer, one line for each kind of tensor."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for item in result.changed:
        if item.relative_norm is not None and (match := re.search(r"\.(\d+)\.(.+)", item.name)):
            lines.setdefault(match[2].removesuffix(".weight"), []).append((int(match[1]), item.relative_norm))
    return charts.svg_file(charts.kinds_by_layer(lines, "|B - A| / |A|", f"{result.b} against {result.a}"))
