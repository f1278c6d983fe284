"""Latents of a sparse autoencoder: what each says of an activation, and what it writes there.

Taken out of the stream as far as they fire, ``x' = x - sum_i f_i(x) d_i``: what decoding with them at 0 and adding the error
back amounts to. Source: SHIFT (Marks et al. 2025, section 4). Removing their span, whatever fires, is CAFT's way.
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
    """Some or all latents of one autoencoder: where they write, and when they fire."""

    place: Place
    numbers: tuple[int, ...]
    """Their numbers in the autoencoder."""
    decoder: Float[Tensor, "k d"]
    decoder_bias: Float[Tensor, " d"]
    encoder: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]
    centred: bool
    """Whether the decoder's bias is taken from activations before they are encoded."""
    threshold: Float[Tensor, " k"] | None = None
    """Value below which a latent is silent (JumpReLU); None is a plain ReLU."""
    not_alone: str = ""
    """Why ``values`` are not the autoencoder's own (it is gated, say); empty where they are."""
    scores: tuple[float, ...] = ()
    """What they were chosen by; none where somebody named them."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def values(self, hidden: Float[Tensor, "*where d"]) -> Float[Tensor, "*where k"]:
        """What each latent says of each activation."""
        seen = hidden - self.decoder_bias.to(hidden) if self.centred else hidden
        before = seen @ self.encoder.to(hidden) + self.bias.to(hidden)
        if self.threshold is None:
            return before.relu()
        return torch.where(before > self.threshold.to(hidden), before, 0.0).relu()

    def written(self, hidden: Float[Tensor, "*where d"]) -> Float[Tensor, "*where d"]:
        """What the latents together add to each activation, as far as they fire."""
        return self.values(hidden) @ self.decoder.to(hidden)

    def pick(self, places: Sequence[int], scores: Sequence[float] = ()) -> "SparseLatents":
        """Some of them, by index, with what they were chosen by.

        Raises:
            RequestError: There is no such one.
        """
        wrong = [place for place in places if not 0 <= place < len(self.numbers)]
        if wrong:
            raise RequestError(
                f"there is no latent with index {wrong[0]} at the {self.place}; there are 0 to {len(self.numbers) - 1}"
            )
        some = torch.tensor(list(places), dtype=torch.long)
        return replace(
            self,
            numbers=tuple(self.numbers[place] for place in places),
            decoder=self.decoder[some],
            encoder=self.encoder[:, some],
            bias=self.bias[some],
            threshold=None if self.threshold is None else self.threshold[some],
            scores=tuple(scores) or tuple(self.scores[place] for place in places if self.scores),
        )

    @property
    def subspace(self) -> Subspace:
        """Their span: unit decoder rows, with the scores they were chosen by, or their norms.

        Raises:
            RequestError: They are not linearly independent.
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
        """Latents that fire alike and write elsewhere, as much: a control."""
        drawn = torch.randn(self.decoder.shape, generator=torch.Generator().manual_seed(seed))
        norms = self.decoder.norm(dim=1, keepdim=True)
        return replace(self, decoder=drawn / drawn.norm(dim=1, keepdim=True) * norms)
