"""Streaming mean and covariance, so that no activation is stored."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .wide import in_float64


@dataclass
class Moments:
    """Streaming mean, and covariance if ``covariance`` is set, in float64 (on the processor where the GPU has none).

    Example:
        >>> moments = Moments(width=d, covariance=True)
        >>> for batch in batches:  # [n, d]
        ...     moments.update(batch)
        >>> moments.mean, moments.cov()  # [d], [d, d]

    Source:
        Chan, Golub and LeVeque 1979 (updating formulas for pairwise sums).
    """

    width: int
    covariance: bool = False
    count: int = 0
    mean: Float[Tensor, "*where d"] | None = None
    _scatter: Float[Tensor, "*where d d"] | None = field(default=None, repr=False)

    def update(self, values: Float[Tensor, "n *where d"]) -> None:
        """Add n samples; each entry of the middle dimensions (layers, positions) has moments of its own."""
        values = in_float64(values)
        n, mean = values.shape[0], values.mean(0)
        if self.mean is None:
            self.mean = torch.zeros_like(mean)
            if self.covariance:
                self._scatter = torch.zeros(*mean.shape, self.width, dtype=torch.float64, device=mean.device)
        total, delta = self.count + n, mean - self.mean
        if self._scatter is not None:
            # Centred on the batch's own mean: sums of raw squares would cancel where the mean is large.
            centred = values - mean
            self._scatter += torch.einsum("n...i,n...j->...ij", centred, centred)
            self._scatter += delta[..., :, None] * delta[..., None, :] * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def cov(self) -> Float[Tensor, "*where d d"]:
        """Covariance with denominator n - 1; needs ``covariance=True`` and at least two samples."""
        assert self._scatter is not None and self.count > 1
        return self._scatter / (self.count - 1)
