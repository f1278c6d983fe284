"""Reading vectors, and the loss that trains an adapter to move the stream along one (LoRRA).

The adapter learns to shift the residual stream of chosen layers as if a vector had been added there.
Source: Zou et al. 2023, "Representation Engineering", section 3.2.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import RequestError
from ..numerics.moments import Moments
from .subspaces import Place, Subspace, mean_difference, principal_components


@dataclass(frozen=True)
class ReadingVector:
    """A direction after a layer, and the distance between the two classes of prompts along it."""

    subspace: Subspace
    gap: float
    """Mean of the positive minus mean of the negative prompts along the direction, in the stream's units; above 0."""

    @property
    def step(self) -> Float[Tensor, " d"]:
        """The move along the direction that takes the negative prompts' mean to the positive prompts' mean."""
        return self.subspace.basis[:, 0] * self.gap


def by_means(plus: Moments, minus: Moments, place: Place) -> ReadingVector:
    """Reading vector along the difference in means of the two classes (``reading=mean``).

    Raises:
        RequestError: Both classes have the same mean.
    """
    subspace = mean_difference(plus, minus, place)
    return ReadingVector(subspace, subspace.scores[0])


def by_components(plus: Moments, minus: Moments, differences: Moments, place: Place) -> ReadingVector:
    """Reading vector along the first principal component of the differences within pairs (``reading=pca``).

    Raises:
        RequestError: Both classes have the same mean along it, so its sign cannot be chosen.
    """
    # Not centred: centring would remove the mean difference, which is what is looked for.
    subspace = principal_components(differences, 1, place, centred=False, offset=minus.mean)
    assert plus.mean is not None and minus.mean is not None
    gap = float((plus.mean - minus.mean).double().cpu() @ subspace.basis[:, 0].double())
    # Negated, so that NaN is refused too.
    if not gap > 0:
        raise RequestError(
            f"positive and negative prompts do not differ along the first component at the {place}; use reading=mean"
        )
    return ReadingVector(subspace, gap)


def distance(
    hidden: Float[Tensor, "batch positions d"],
    target: Float[Tensor, "batch positions d"],
    counted: Bool[Tensor, "batch positions"],
) -> Float[Tensor, ""]:
    """Mean L2 distance over the counted positions, in the stream's units; 0 if no position is counted.

    Source: Zou et al. 2023, section 3.2 (the loss of LoRRA).
    """
    difference = (hidden.float() - target.float())[counted]
    # The norm has no gradient at 0, where an adapter begins.
    return (difference.square().sum(-1) + 1e-12).sqrt().mean() if len(difference) else hidden.new_zeros(())
