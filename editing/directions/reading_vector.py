"""Tuning representations toward or away from a reading vector (LoRRA).

Source: representation engineering (Zou et al. 2023, section 3.2): an adapter learns to move the stream of chosen layers as
if a vector had been added, and everything else stays where it was.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import RequestError
from ..numerics.moments import Moments
from .subspaces import Place, Subspace, mean_difference, principal_components


@dataclass(frozen=True)
class ReadingVector:
    """A direction after a layer, and how far apart the two classes of prompts lie along it."""

    subspace: Subspace
    gap: float
    """Mean of the positive minus mean of the negative prompts along the direction; positive."""

    @property
    def step(self) -> Float[Tensor, " d"]:
        """From the negative prompts' mean to the positive ones' along the direction."""
        return self.subspace.basis[:, 0] * self.gap


def by_means(plus: Moments, minus: Moments, place: Place) -> ReadingVector:
    """The difference in means (their cluster means)."""
    found = mean_difference(plus, minus, place)
    return ReadingVector(found, found.scores[0])


def by_components(plus: Moments, minus: Moments, differences: Moments, place: Place) -> ReadingVector:
    """The first component of the differences within pairs, uncentred: centring would take the mean difference away.

    Raises:
        RequestError: The classes have the same mean along it, so it does not say which is which.
    """
    found = principal_components(differences, 1, place, centred=False, offset=minus.mean)
    assert plus.mean is not None and minus.mean is not None
    gap = float((plus.mean - minus.mean).double().cpu() @ found.basis[:, 0].double())
    if not gap > 0:
        raise RequestError(
            f"positive and negative prompts do not differ along the first component at the {place}; use reading=mean"
        )
    return ReadingVector(found, gap)


def distance(
    hidden: Float[Tensor, "batch positions d"],
    target: Float[Tensor, "batch positions d"],
    counted: Bool[Tensor, "batch positions"],
) -> Float[Tensor, ""]:
    """Mean L2 distance over the counted positions, in the stream's own units (their loss); 0 where none is counted."""
    apart = (hidden.float() - target.float())[counted]
    # The norm has no gradient at 0, where an adapter begins.
    return (apart.square().sum(-1) + 1e-12).sqrt().mean() if len(apart) else hidden.new_zeros(())
