"""Edits of weights and roundings, computed a second time from the definition: float64, one row or group at a time.

Nothing here imports excise: a test that holds excise against it finds what a shared shortcut would hide.
"""

import torch
from torch import Tensor


def without_subspace(weight: Tensor, basis: Tensor, strength: float, gain: Tensor | None) -> Tensor:
    """Columns ``w`` of a weight [d, n] whose writes ``gain * w`` lose this share of their component in the basis."""
    edited = weight.double().clone()
    scale = torch.ones(len(weight)).double() if gain is None else gain.double()
    for column in range(edited.shape[1]):
        write = scale * edited[:, column]
        for direction in basis.double().T:
            write = write - strength * (direction @ (scale * weight.double()[:, column])) * direction
        edited[:, column] = write / scale
    return edited


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Each group of a row as the nearest of ``2^bits - 1`` evenly spaced values, zero among them."""
    out = weight.double().clone()
    size = group if weight.shape[-1] % group == 0 else weight.shape[-1]
    for row in out.reshape(-1, weight.shape[-1]):
        for start in range(0, len(row), size):
            part = row[start : start + size]
            scale = float(part.abs().max()) / (2 ** (bits - 1) - 1)
            if scale:
                for place, value in enumerate(part.tolist()):
                    part[place] = scale * round(value / scale)
    return out


def low_rank(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` as a sum of outer products."""
    total = torch.zeros(left.shape[0], right.shape[1]).double()
    for column, row in zip(left.double().T, right.double(), strict=True):
        total += torch.outer(column, row)
    return total
