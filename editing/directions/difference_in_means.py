"""Learning directions from contrasting prompts.

A source takes the activations of positive and negative prompts and returns one direction for every
(position, point) it looked at. Difference in means is the first; others need only satisfy
``DirectionSource``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..numerics.moments import Moments


@dataclass(frozen=True)
class Directions:
    """Candidate directions of one source, not normalized, in float32."""

    source: str
    points: tuple[int, ...]
    """Points of the residual stream: point l is the input of layer l."""
    positions: tuple[int, ...]
    """Positions counted from the end of the prompt (-1 is the last)."""
    vectors: Float[Tensor, "points positions d"]
    negative_mean: Float[Tensor, "points positions d"]
    """Mean activation of the negative prompts, which ``projected`` edits keep."""
    count: tuple[int, int]
    """Number of positive and negative prompts."""


@runtime_checkable
class DirectionSource(Protocol):
    """Turns streams of activations into directions."""

    def __call__(
        self,
        positive: Iterable[Float[Tensor, "points batch positions d"]],
        negative: Iterable[Float[Tensor, "points batch positions d"]],
        points: tuple[int, ...],
        positions: tuple[int, ...],
    ) -> Directions: ...


def difference_in_means(
    positive: Iterable[Float[Tensor, "points batch positions d"]],
    negative: Iterable[Float[Tensor, "points batch positions d"]],
    points: tuple[int, ...],
    positions: tuple[int, ...],
) -> Directions:
    """Mean activation on positive prompts minus mean on negative ones, summed in float64.

    Source: Arditi et al. 2024, section 2.3.
    """
    plus, minus = _mean(positive), _mean(negative)
    assert plus.mean is not None and minus.mean is not None
    return Directions(
        "difference_in_means",
        points,
        positions,
        vectors=(plus.mean - minus.mean).float().cpu(),
        negative_mean=minus.mean.float().cpu(),
        count=(plus.count, minus.count),
    )


DIRECTION_SOURCES: dict[str, DirectionSource] = {"difference_in_means": difference_in_means}


def unit(vector: Float[Tensor, " d"]) -> Float[Tensor, "d 1"]:
    """A vector as an orthonormal basis of one column."""
    return (vector.double() / vector.double().norm()).float()[:, None]


def without_component(vector: Float[Tensor, " d"], along: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The part of a vector orthogonal to another (projected variant: keep what negative prompts share)."""
    axis = along.double() / along.double().norm()
    return (vector.double() - (vector.double() @ axis) * axis).float()


def _mean(batches: Iterable[Float[Tensor, "points batch positions d"]]) -> Moments:
    moments: Moments | None = None
    for batch in batches:
        moments = moments or Moments(batch.shape[-1])
        moments.update(batch.transpose(0, 1))
    assert moments is not None, "a source needs at least one prompt of each kind"
    return moments


def stacked(directions: Directions, point: int, position: int) -> tuple[Tensor, Tensor]:
    """The vector and the negative mean of one candidate."""
    where = directions.points.index(point), directions.positions.index(position)
    return torch.clone(directions.vectors[where]), torch.clone(directions.negative_mean[where])
