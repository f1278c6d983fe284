"""Directions learned from contrasting prompts.

A source takes activations of positive and of negative prompts and returns one direction for each
(point, position) that was read. ``DirectionSource`` is the interface; difference in means is the only source so far.
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
    """Mean activation of the negative prompts. Edits with ``variant=projected`` leave this component in place."""
    count: tuple[int, int]
    """Number of positive and negative prompts."""


@runtime_checkable
class DirectionSource(Protocol):
    """A function from two streams of activations to directions."""

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
    """Mean activation on positive prompts minus mean activation on negative prompts, summed in float64.

    Args:
        positive: Batches of activations in the model's units; one batch holds several prompts at all points.
        negative: The same for the prompts without the behaviour.
        points: Points of the residual stream, in the order of the first axis; point l is the input of layer l.
        positions: Positions counted from the end of the prompt (-1 is the last), in the order of the fourth axis.

    Source:
        Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3.
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
    """A vector scaled to unit length, as the one column of an orthonormal basis (fp32)."""
    return (vector.double() / vector.double().norm()).float()[:, None]


def without_component(vector: Float[Tensor, " d"], along: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The part of a vector that is orthogonal to ``along``.

    The ``projected`` variant uses it with the negative prompts' mean, so that the edit leaves that mean in the stream.
    """
    axis = along.double() / along.double().norm()
    return (vector.double() - (vector.double() @ axis) * axis).float()


def _mean(batches: Iterable[Float[Tensor, "points batch positions d"]]) -> Moments:
    moments: Moments | None = None
    for batch in batches:
        moments = moments or Moments(batch.shape[-1])
        # Batches have points first, and Moments takes samples from the first axis.
        moments.update(batch.transpose(0, 1))
    assert moments is not None, "a source needs at least one prompt of each kind"
    return moments


def stacked(directions: Directions, point: int, position: int) -> tuple[Tensor, Tensor]:
    """Direction and negative mean [d] of one candidate, as copies."""
    where = directions.points.index(point), directions.positions.index(position)
    return torch.clone(directions.vectors[where]), torch.clone(directions.negative_mean[where])
