"""The spectrum of a matrix, reshaped: its leading components made smaller, so that smaller ones weigh more.

What many inputs share stands in the leading components of a gradient; what is specific to a few stands in the tail.

Example:
    >>> leading = leading_components(gradient, 64, seed=0)  # gradient [rows, columns]
    >>> selective = reshaped(gradient, leading, "soft")

Source: RepSelect (arXiv 2606.17168), the authors' single-shot variant.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Rule = Literal["soft", "hard", "quadratic"]
"""What becomes of component i on one side: divided by its size relative to the smallest of them, removed, or divided by the
square of that."""
Sides = Literal["both", "inputs", "outputs"]
"""``inputs`` are the columns of a matrix that is stored [outputs, inputs]."""
NOISE = 1e-6
"""Components below this share of the largest are rounding, not part of the matrix."""


@dataclass(frozen=True)
class Components:
    """The largest components of a matrix, or of each matrix of a stack: ``left diag(sizes) right.mT``."""

    left: Float[Tensor, "*stack rows q"]
    sizes: Float[Tensor, "*stack q"]
    """Singular values, falling."""
    right: Float[Tensor, "*stack columns q"]

    def real(self) -> Bool[Tensor, "*stack q"]:
        """Which are more than rounding."""
        return self.sizes > NOISE * self.sizes[..., :1]


def leading_components(matrix: Float[Tensor, "*stack rows columns"], count: int, seed: int) -> Components:
    """The ``count`` largest components by a randomized decomposition; fewer where a side is shorter.

    Args:
        matrix: In fp32 or wider.
        count: q; the decomposition is exact where it is the shorter side.
        seed: Of the random projection; torch's own random state is left as it is.

    Source:
        Halko, Martinsson and Tropp 2009, algorithm 5.1 (``torch.svd_lowrank``).
    """
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        left, sizes, right = torch.svd_lowrank(matrix, q=min(count, *matrix.shape[-2:]))
    return Components(left, sizes, right)


def reshaped(
    matrix: Float[Tensor, "*stack rows columns"],
    basis: Components,
    rule: Rule,
    sides: Sides = "both",
    *,
    inputs_first: bool = False,
) -> Float[Tensor, "*stack rows columns"]:
    """A matrix whose part in some components is made smaller; what lies outside of them stays as it is.

    With its own leading components and ``soft``, one side gives each of them the size of the smallest, s_q; both sides turn
    s into s_q^2 / s.

    Args:
        basis: Components of this matrix, or of another of its shape.
        inputs_first: Whether the matrix is stored [inputs, outputs].
    """
    less = factors(basis, rule) - 1
    columns, rows = ("outputs", "inputs") if inputs_first else ("inputs", "outputs")
    if sides in ("both", columns):
        matrix = matrix + ((matrix @ basis.right) * less[..., None, :]) @ basis.right.mT
    if sides in ("both", rows):
        matrix = matrix + basis.left @ (less[..., :, None] * (basis.left.mT @ matrix))
    return matrix


def factors(basis: Components, rule: Rule) -> Float[Tensor, "*stack q"]:
    """What each component is multiplied by on one side; 1 where it is rounding."""
    real = basis.real()
    smallest = basis.sizes.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    # A stack may hold a matrix of zeros, such as of an expert that read nothing.
    relative = (basis.sizes / smallest).masked_fill(~real, 1.0)
    if rule == "hard":
        return (~real).to(basis.sizes.dtype)
    return 1 / relative if rule == "soft" else 1 / relative.square()
