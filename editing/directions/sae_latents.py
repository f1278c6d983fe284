"""Latents of a sparse autoencoder (SAE): their values on an activation, and the vectors that they write.

There are two ways to ablate latents:
- Remove what they write: ``x' = x - sum_i f_i(x) d_i``, with f_i a latent's value and d_i its decoder row. This equals
  decoding with these latents at 0 and adding the reconstruction error back. Source: SHIFT (Marks et al. 2025, section
  4).
- Remove the span of their decoder rows, whether they are active or not. Source: CAFT (Casademunt et al. 2025, section
  3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import RequestError
from .subspaces import Place, Subspace


@dataclass(frozen=True)
class SparseLatents:
    """Some or all latents of one autoencoder: decoder rows, and encoder rows that give their values."""

    place: Place
    numbers: tuple[int, ...]
    """Index of each latent in the autoencoder."""
    decoder: Float[Tensor, "k d"]
    decoder_bias: Float[Tensor, " d"]
    encoder: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]
    centred: bool
    """Whether the decoder's bias is subtracted from activations before they are encoded."""
    threshold: Float[Tensor, " k"] | None = None
    """Values at or below this count as 0 (JumpReLU); None is a plain ReLU."""
    not_alone: str = ""
    """Why ``values`` differ from the autoencoder's values, for example because it is gated; empty if they agree."""
    scores: tuple[float, ...] = ()
    """Score by which each latent was chosen; empty if the user named the latents."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def values(self, hidden: Float[Tensor, "*where d"]) -> Float[Tensor, "*where k"]:
        """Value of each latent on each activation, at least 0, in the dtype of ``hidden``."""
        seen = hidden - self.decoder_bias.to(hidden) if self.centred else hidden
        before = seen @ self.encoder.to(hidden) + self.bias.to(hidden)
        if self.threshold is None:
            return before.relu()
        # Where a threshold is negative, values between it and 0 would pass without the ReLU.
        return torch.where(before > self.threshold.to(hidden), before, 0.0).relu()

    def written(self, hidden: Float[Tensor, "*where d"]) -> Float[Tensor, "*where d"]:
        """Sum of the latents' writes to each activation: value times decoder row."""
        return self.values(hidden) @ self.decoder.to(hidden)

    def pick(self, places: Sequence[int], scores: Sequence[float] = ()) -> "SparseLatents":
        """The latents at these indices of this object, with the scores by which they were chosen.

        Raises:
            RequestError: An index is outside this object.
        """
        wrong = [place for place in places if not 0 <= place < len(self.numbers)]
        if wrong:
            raise RequestError(
                f"there is no latent with index {wrong[0]} at the {self.place}; there are 0 to {len(self.numbers) - 1}"
            )
        index = torch.tensor(list(places), dtype=torch.long)
        return replace(
            self,
            numbers=tuple(self.numbers[place] for place in places),
            decoder=self.decoder[index],
            encoder=self.encoder[:, index],
            bias=self.bias[index],
            threshold=None if self.threshold is None else self.threshold[index],
            scores=tuple(scores) or tuple(self.scores[place] for place in places if self.scores),
        )

    @property
    def subspace(self) -> Subspace:
        """Span of the decoder rows, scaled to unit length, with the latents' scores (or the rows' norms).

        Raises:
            RequestError: The decoder rows are not linearly independent.
        """
        norms = self.decoder.norm(dim=1)
        return Subspace(
            self.place,
            (self.decoder / norms[:, None]).T.contiguous(),
            self.decoder_bias,
            tuple(f"latent {number}" for number in self.numbers),
            self.scores or tuple(float(norm) for norm in norms),
            "sae",
            provenance={**self.provenance, "latents": list(self.numbers)},
        )

    def with_random_writes(self, seed: int) -> "SparseLatents":
        """A control: the same values, written along random directions of the same norms."""
        drawn = torch.randn(self.decoder.shape, generator=torch.Generator().manual_seed(seed))
        norms = self.decoder.norm(dim=1, keepdim=True)
        return replace(self, decoder=drawn / drawn.norm(dim=1, keepdim=True) * norms)
