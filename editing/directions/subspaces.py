"""Directions as data, and the functions that fit them to streamed statistics, so that no activation is stored.

Every source returns a ``Subspace``, which any method can use: its projector is ``basis @ readers.T``.

Example:
    >>> plus, minus = Moments(width=d, covariance=True), Moments(width=d, covariance=True)
    >>> plus.update(activations_with_concept)  # [n, d], as often as there are batches
    >>> minus.update(activations_without)
    >>> subspace = mean_difference(plus, minus, Place(layer=12))
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import RequestError
from ..numerics.moments import Moments

NOTHING = 1e-12
"""An eigenvector with less than this share of the largest variance is rounding noise."""
Site = Literal["input", "output", "attention", "mlp"]
"""Where in a decoder layer: the stream before it, the stream after it, or the output of one of its sublayers."""


@dataclass(frozen=True)
class Place:
    """A site of a layer."""

    layer: int
    site: Site = "output"

    def __str__(self) -> str:
        return f"{self.site} of layer {self.layer}"


@dataclass(frozen=True)
class Subspace:
    """Named directions at one place, and the mean that they were centred on."""

    place: Place
    basis: Float[Tensor, "d k"]
    """Unit columns, fp32, in the order of their scores; not orthogonal unless the source makes them so."""
    offset: Float[Tensor, " d"]
    """Mean of the activations they were learned on; ablation with ``value=mean`` leaves this mean in place."""
    names: tuple[str, ...]
    scores: tuple[float, ...]
    source: str
    readers: Float[Tensor, "d k"] | None = None
    """Right side of an oblique projector (LEACE); None means the orthogonal projector onto the span of the basis."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Model, data hashes, seed."""

    def __post_init__(self) -> None:
        d, k = self.basis.shape
        if k > d:
            raise RequestError(
                f"{k} directions at the {self.place} do not fit into a stream of width {d}; pick at most {d}"
            )
        if not (len(self.names) == len(self.scores) == k) or self.offset.shape != (d,):
            raise RequestError(
                f"the directions at the {self.place} are [{d}, {k}] with {len(self.names)} names, {len(self.scores)} "
                "scores "
                f"and an offset {list(self.offset.shape)}; give {k} names, {k} scores and an offset [{d}]"
            )
        # Finite values are checked first: the decomposition behind matrix_rank fails on NaN with an error of its own.
        if not bool(torch.isfinite(self.basis).all()) or int(torch.linalg.matrix_rank(self.basis.double())) < k:
            raise RequestError(
                f"the {k} directions at the {self.place} are not linearly independent; pick fewer, or other ones"
            )

    def projector(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, "d k"]]:
        """Both sides of the projector ``P = left @ right.T``, idempotent; computed in float64, returned in fp32."""
        if self.readers is not None:
            return self.basis, self.readers
        # Columns of a basis may be oblique, and then basis @ basis.T is no projector.
        orthonormal = torch.linalg.qr(self.basis.double()).Q.float()
        return orthonormal, orthonormal

    def with_provenance(self, provenance: dict[str, Any]) -> "Subspace":
        """The same directions with these entries added to their provenance."""
        return replace(self, provenance={**self.provenance, **provenance})

    def pick(self, columns: Sequence[int]) -> "Subspace":
        """The directions at these indices.

        Raises:
            RequestError: An index does not exist, or a part of an oblique projector is wanted (it works only as a
                whole).
        """
        wrong = [column for column in columns if not 0 <= column < len(self.names)]
        if wrong:
            raise RequestError(
                f"there is no direction {wrong[0]} at the {self.place}; there are 0 to {len(self.names) - 1}"
            )
        if self.readers is not None and len(columns) < len(self.names):
            raise RequestError(f"the {self.source} directions at the {self.place} form one projector; pick all of them")
        return replace(
            self,
            basis=self.basis[:, list(columns)],
            names=tuple(self.names[c] for c in columns),
            scores=tuple(self.scores[c] for c in columns),
        )


def mean_difference(plus: Moments, minus: Moments, place: Place) -> Subspace:
    """Difference in means, centred on the negative samples' mean; its score is the distance of the means.

    Raises:
        RequestError: Both classes have the same mean.

    Source:
        Arditi et al. 2024, section 2.3.
    """
    return _single(place, _mean(plus) - _mean(minus), _mean(minus), "difference_in_means")


def mass_mean(plus: Moments, minus: Moments, place: Place) -> Subspace:
    """``pinv(pooled covariance) @ difference in means``; the moments need covariance.

    Raises:
        RequestError: Both classes have the same mean.

    Source:
        Marks and Tegmark 2023, "The Geometry of Truth", section 5.1 (the form for independent samples).
    """
    within = _within(plus, minus)
    # The authors' tolerance, relative to the largest eigenvalue of the covariance.
    inverse = torch.linalg.pinv(within, rtol=1e-3, hermitian=True)
    return _single(place, inverse @ (_mean(plus) - _mean(minus)), _middle(plus, minus), "mass_mean")


def ridge_probe(plus: Moments, minus: Moments, place: Place, penalty: float = 1e-2) -> Subspace:
    """Direction of a linear probe: ridge regression of the labels on the activations; the moments need covariance.

    Args:
        penalty: Ridge, as a multiple of the mean variance per dimension.

    Raises:
        RequestError: Both classes have the same mean.
    """
    within = _within(plus, minus)
    ridge = penalty * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    # The regression's covariance is that within the classes plus a multiple of d d^T, with d the mean difference. The
    # second part changes only the length of the solution, so the first is enough.
    direction = torch.linalg.solve(within + ridge, _mean(plus) - _mean(minus))
    return _single(place, direction, _middle(plus, minus), "linear_probe")


def principal_components(
    moments: Moments, count: int, place: Place, *, centred: bool = True, offset: Tensor | None = None
) -> Subspace:
    """Directions of largest variance: eigenvectors of the streamed covariance, scored by their share of the variance.

    Fewer than ``count`` directions are returned if the samples span fewer.

    Args:
        moments: Statistics of one place, with covariance.
        count: Number of directions, at most d.
        offset: Mean of the activations, for samples that are differences of activations; the samples' mean by default.
        centred: Whether the variance is about the mean. Use False for differences between two models or two prompts:
            there the mean is the signal, and centring would remove it.

    Raises:
        RequestError: ``count`` is larger than the width of the stream.
    """
    mean = _mean(moments)
    if count > len(mean):
        raise RequestError(
            f"{count} components at the {place} do not fit into a stream of width {len(mean)}; use at most {len(mean)}"
        )
    # The exact decomposition: a randomized one, as in the authors' code of CAFT, gets the later components of a slowly
    # falling spectrum wrong.
    spread = moments.cov().double().cpu() if centred else _second_moment(moments)
    values, vectors = torch.linalg.eigh(spread)
    # eigh sorts upwards, and rounding can make a variance of 0 slightly negative.
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    spanned = max(1, int((values > NOTHING * values[0]).sum()))
    values, vectors = values[:spanned], vectors[:, :spanned]
    # The sign of an eigenvector is arbitrary; pointing it along the mean makes every run agree.
    vectors = vectors * torch.where(mean @ vectors < 0, -1.0, 1.0)
    total = float(spread.trace().clamp_min(1e-30))
    return Subspace(
        place,
        vectors.float(),
        (mean if offset is None else offset).float().cpu(),
        tuple(f"component {i}" for i in range(spanned)),
        tuple(float(value) / total for value in values),
        "pca" if centred else "pca_uncentred",
    )


def least_squares_eraser(plus: Moments, minus: Moments, place: Place, *, orthogonal: bool = False) -> Subspace:
    """LEACE for two classes: after ``x' = x - W^+ u u^T W (x - mean)`` no linear classifier can tell them apart.

    ``W = cov(x)^(-1/2)``, and u is the unit vector along ``W cov(x, z)`` for labels z.

    Args:
        plus: Statistics of one class, with covariance.
        minus: Statistics of the other class, with covariance.
        orthogonal: Use W = 1, an orthogonal projector, which changes more than LEACE does.

    Raises:
        RequestError: Both classes have the same mean (orthogonal form only).

    Source:
        Belrose et al. 2023, "LEACE", theorem 4.3 (without shrinkage).
    """
    n, m = plus.count, minus.count
    difference, middle = _mean(plus) - _mean(minus), _middle(plus, minus)
    if orthogonal:
        return _single(place, difference, middle, "leace_orthogonal")
    # The scatter of all samples is the scatter within both classes plus the scatter between their means.
    total = (_scatter(plus) + _scatter(minus) + torch.outer(difference, difference) * (n * m / (n + m))) / (n + m)
    values, vectors = torch.linalg.eigh(total)
    # Whitening leaves directions without variance alone, as the authors' code does: 1 / root would be infinite.
    varying = values > 1e-9 * values.max()
    root = values.clamp_min(0).sqrt()
    whiten = vectors @ torch.where(varying, 1 / root.clamp_min(1e-30), 0.0).diag() @ vectors.T
    colour = vectors @ torch.where(varying, root, 0.0).diag() @ vectors.T
    # For two classes cov(x, z) is the mean difference times a number, which the unit length takes out again.
    axis = whiten @ difference
    axis = axis / axis.norm()
    left, right = colour @ axis, whiten @ axis
    # A basis has unit columns, so the projector's scale goes to its other side.
    length = left.norm()
    return Subspace(
        place,
        (left / length).float()[:, None],
        middle.float(),
        ("leace 0",),
        (float(difference.norm()),),
        "leace",
        readers=(right * length).float()[:, None],
    )


def random_directions(like: Subspace, seed: int) -> Subspace:
    """A control: the same number of random orthonormal directions at the same place."""
    d, k = like.basis.shape
    drawn = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Subspace(
        like.place,
        torch.linalg.qr(drawn).Q.float(),
        like.offset,
        tuple(f"random {i}" for i in range(k)),
        (0.0,) * k,
        "random",
        provenance={"seed": seed},
    )


def _single(place: Place, direction: Tensor, offset: Tensor, source: str) -> Subspace:
    length = float(direction.norm())
    # Negated, so that NaN is refused too.
    if not length > 0:
        raise RequestError(f"the two classes have the same mean at the {place}, so there is no direction between them")
    return Subspace(
        place, (direction / length).float()[:, None], offset.float(), (source.replace("_", " "),), (length,), source
    )


def _mean(moments: Moments) -> Float[Tensor, " d"]:
    assert moments.mean is not None and moments.mean.ndim == 1, (
        "directions are fitted to samples of one place: values must be [n, d]"
    )
    return moments.mean.double().cpu()


def _scatter(moments: Moments) -> Float[Tensor, "d d"]:
    # Sums of squares of two classes can be added, covariances cannot.
    return moments.cov().double().cpu() * (moments.count - 1)


def _within(plus: Moments, minus: Moments) -> Float[Tensor, "d d"]:
    return (_scatter(plus) + _scatter(minus)) / (plus.count + minus.count)


def _middle(plus: Moments, minus: Moments) -> Float[Tensor, " d"]:
    return (plus.count * _mean(plus) + minus.count * _mean(minus)) / (plus.count + minus.count)


def _second_moment(moments: Moments) -> Float[Tensor, "d d"]:
    mean = _mean(moments)
    return _scatter(moments) / moments.count + torch.outer(mean, mean)
