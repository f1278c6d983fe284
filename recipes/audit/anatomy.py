"""The anatomy of the audited edit: which parts and layers it changed, and whether it is shallow."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...artifacts.checkpoints.read import StoredTensor, open_checkpoint, read_tensor
from ...artifacts.events import Stage
from ...eval.anatomy import anatomy, spectrum_of
from .request import AuditJob

MOST_WORK = 2e12
"""Multiplications that all singular values together may take, about: two minutes of two cores."""
FEWEST_MATRICES = 4
"""Matrices whose singular values are computed however large they are."""


def anatomy_of(job: AuditJob, stage: Stage) -> dict[str, Any]:
    """What changed from the base to the edited model, as ``audit.json`` holds it; memory holds one tensor of each.

    Singular values of large models would take hours, so of their changed matrices some are drawn.
    """
    base, edited = (open_checkpoint(job.sources[subject].folder).tensors for subject in ("base", "edited"))
    names = [name for name in base if name in edited]
    norms = {name: _norm(base[name], edited[name], stage) for name in names}
    changed = {name: norm for name, norm in norms.items() if norm}
    matrices = [name for name in changed if len(base[name].shape) == 2]
    chosen = _affordable({name: _work(base[name].shape) for name in matrices}, job.settings.seed)
    spectra = {}
    for name in chosen:
        change = _change(base[name], edited[name]).to(job.device)
        spectra[name] = spectrum_of(torch.linalg.svdvals(change).cpu())
        stage.advance()
    found = anatomy([(name, norm, spectra.get(name)) for name, norm in changed.items()], names)
    said = [f"Anatomy of the edit: {sentence}." for sentence in found.sentences()]
    if len(chosen) < len(matrices):
        said.append(
            f"Anatomy of the edit: {len(chosen)} of {len(matrices)} changed matrices were drawn for their rank."
        )
    return {**asdict(found), "tensors": len(names), "tensors_changed": len(changed), "sentences": said}


def _change(base: StoredTensor, edited: StoredTensor) -> Tensor:
    return read_tensor(edited).float() - read_tensor(base).float()


def _norm(base: StoredTensor, edited: StoredTensor, stage: Stage) -> float:
    """Frobenius norm of a tensor's change."""
    stage.advance()
    return float(_change(base, edited).norm())


def _work(shape: Sequence[int]) -> float:
    """Multiplications for all singular values, about."""
    return 4.0 * shape[0] * shape[1] * min(shape[0], shape[1])


def _affordable(work: dict[str, float], seed: int) -> list[str]:
    """All matrices, or those of a random order that can be afforded."""
    order = random.Random(f"excise anatomy {seed}").sample(list(work), k=len(work))
    chosen: list[str] = []
    spent = 0.0
    for name in order:
        spent += work[name]
        if len(chosen) >= FEWEST_MATRICES and spent > MOST_WORK:
            break
        chosen.append(name)
    return sorted(chosen)
