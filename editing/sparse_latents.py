"""Latents of a sparse autoencoder taken out of activations as far as they fire.

``x' = x - sum_i f_i(x) d_i`` for the chosen latents: what decoding with them at 0 and adding the error back amounts to.
Source: SHIFT (Marks et al. 2025, section 4). Removing their span instead, whatever fires, is ``concept_ablation``'s.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .subspaces import Subspace


@dataclass(frozen=True)
class SparseLatents:
    """Some latents of one autoencoder: where they write, and when they fire."""

    subspace: Subspace
    """Unit decoder rows as columns; scores are their norms."""
    encoder: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]
    centre: Float[Tensor, " d"]
    """Taken from activations before they are encoded; zeros where the autoencoder does not."""
    threshold: Float[Tensor, " k"] | None = None
    """Value below which a latent is silent (JumpReLU); None is a plain ReLU."""

    def values(self, hidden: Float[Tensor, "*where d"]) -> Float[Tensor, "*where k"]:
        """What each latent says of each activation."""
        before = (hidden - self.centre.to(hidden)) @ self.encoder.to(hidden) + self.bias.to(hidden)
        if self.threshold is None:
            return before.relu()
        return torch.where(before > self.threshold.to(hidden), before, 0.0).relu()

    def removed(self) -> Callable[[Tensor], Tensor]:
        """A change of activations that takes the latents out as far as they fire."""
        decoder = self.subspace.basis * torch.tensor(self.subspace.scores)

        def change(hidden: Tensor) -> Tensor:
            wide = hidden if hidden.dtype == torch.float64 else hidden.float()
            return (wide - self.values(wide) @ decoder.to(wide).T).to(hidden.dtype)

        return change
