"""Directions as data, and the fitters that find them in streamed statistics: no activation is ever stored.

Every source ends in a ``Subspace``, which any method can use: its projector is ``basis @ readers.T``.
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
"""Share of the largest variance below which an eigenvector is rounding."""
Site = Literal["input", "output", "attention", "mlp"]
"""Where in a decoder layer: the stream it reads, the stream it leaves, or what one of its sublayers writes."""


@dataclass(frozen=True)
class Place:
    """A site of a layer."""

    layer: int
    site: Site = "output"

    def __str__(self) -> str:
        return f"{self.site} of layer {self.layer}"


@dataclass(frozen=True)
class Subspace:
    """Named directions at one place, with what they were centred on."""

    place: Place
    basis: Float[Tensor, "d k"]
    """Unit columns, fp32, in the order of their scores; not orthogonal unless the source makes them so."""
    offset: Float[Tensor, " d"]
    """Mean of the activations they were learned on: where ``value=mean`` leaves an ablated activation."""
    names: tuple[str, ...]
    scores: tuple[float, ...]
    source: str
    readers: Float[Tensor, "d k"] | None = None
    """Of an oblique projector (LEACE); without them the projector is the orthogonal one onto the span of the basis."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Model, data hashes, seed."""

    def __post_init__(self) -> None:
        d, k = self.basis.shape
        if k > d:
            raise RequestError(f"{k} directions at the {self.place} are more than the {d} there are; pick fewer")
        if not (len(self.names) == len(self.scores) == k) or self.offset.shape != (d,):
            raise RequestError(
                f"the directions at the {self.place} are [{d}, {k}] with {len(self.names)} names and {len(self.scores)} scores; "
                "each column needs both, and one offset of the same width"
            )
        if not bool(torch.isfinite(self.basis).all()) or int(torch.linalg.matrix_rank(self.basis.double())) < k:
            raise RequestError(
                f"the {k} directions at the {self.place} are not linearly independent; pick other ones or fewer"
            )

    def projector(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, "d k"]]:
        """What is written and what is read: ``P = left @ right.T``, idempotent, computed in float64."""
        if self.readers is not None:
            return self.basis, self.readers
        orthonormal = torch.linalg.qr(self.basis.double()).Q.float()
        return orthonormal, orthonormal

    def from_(self, provenance: dict[str, Any]) -> "Subspace":
        """The same directions, saying more of where they came from."""
        return replace(self, provenance={**self.provenance, **provenance})

    def pick(self, columns: Sequence[int]) -> "Subspace":
        """Some of the directions, by index.

        Raises:
            RequestError: There is no such direction, or it is one of an oblique projector, which only works whole.
        """
        wrong = [column for column in columns if not 0 <= column < len(self.names)]
        if wrong:
            raise RequestError(
                f"there is no direction {wrong[0]} at the {self.place}; there are 0 to {len(self.names) - 1}"
            )
        if self.readers is not None and len(columns) < len(self.names):
            raise RequestError(f"the {self.source} directions at the {self.place} are one projector; take all of them")
        return replace(
            self,
            basis=self.basis[:, list(columns)],
            names=tuple(self.names[c] for c in columns),
            scores=tuple(self.scores[c] for c in columns),
        )


def mean_difference(plus: Moments, minus: Moments, place: Place) -> Subspace:
    """Difference in means, centred on the negative samples' mean. Source: Arditi et al. 2024, section 2.3."""
    return _single(place, _mean(plus) - _mean(minus), _mean(minus), "difference_in_means")


def mass_mean(plus: Moments, minus: Moments, place: Place) -> Subspace:
    """``pinv(pooled covariance) @ difference in means``. Source: Marks and Tegmark 2023, section 5.1 (their i.i.d. form)."""
    within = _within(plus, minus)
    # Their tolerance, on a scale of the covariance's own.
    inverse = torch.linalg.pinv(within, rtol=1e-3, hermitian=True)
    return _single(place, inverse @ (_mean(plus) - _mean(minus)), _middle(plus, minus), "mass_mean")


def ridge_probe(plus: Moments, minus: Moments, place: Place, penalty: float = 1e-2) -> Subspace:
    """The direction of a linear probe: least squares on the labels with a ridge of ``penalty`` mean variances."""
    within = _within(plus, minus)
    ridge = penalty * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    direction = torch.linalg.solve(within + ridge, _mean(plus) - _mean(minus))
    return _single(place, direction, _middle(plus, minus), "linear_probe")


def principal_components(
    moments: Moments, count: int, place: Place, *, centred: bool = True, offset: Tensor | None = None
) -> Subspace:
    """Directions of largest variance, exactly: eigenvectors of the streamed covariance, with their share of the variance.

    Where the samples span fewer than ``count``, so many are returned.

    Args:
        offset: Mean of the activations, where the samples are differences of them; the samples' own mean by default.
        centred: About the mean. Of differences between two models or two prompts the mean is itself what is looked
            for, and centring takes it away: ``centred=False`` keeps it (second moments about zero).
    """
    mean = _mean(moments)
    if count > len(mean):
        raise RequestError(f"{count} components at the {place} are more than the {len(mean)} there are; ask for fewer")
    spread = moments.cov().double().cpu() if centred else _second_moment(moments)
    values, vectors = torch.linalg.eigh(spread)
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    spanned = max(1, int((values > NOTHING * values[0]).sum()))
    values, vectors = values[:spanned], vectors[:, :spanned]
    # The sign of an eigenvector is arbitrary: along the mean, so that it says the same in every run.
    vectors = vectors * torch.where(mean @ vectors < 0, -1.0, 1.0)
    total = float(spread.trace().clamp_min(1e-30))
    return Subspace(
        place,
        vectors.float(),
        (mean if offset is None else offset).float(),
        tuple(f"component {i}" for i in range(spanned)),
        tuple(float(value) / total for value in values),
        "pca" if centred else "pca_uncentred",
    )


def least_squares_eraser(plus: Moments, minus: Moments, place: Place, *, orthogonal: bool = False) -> Subspace:
    """LEACE for two classes: no linear classifier can tell them apart afterwards.

    ``x' = x - W^+ u u^T W (x - mean)`` with ``W = cov(x)^(-1/2)`` and u along ``W cov(x, z)``; the orthogonal form has W = 1.
    Source: Belrose et al. 2023, theorem 4.3 (without shrinkage).
    """
    n, m = plus.count, minus.count
    difference, middle = _mean(plus) - _mean(minus), _middle(plus, minus)
    if orthogonal:
        return _single(place, difference, middle, "leace_orthogonal")
    total = (_scatter(plus) + _scatter(minus) + torch.outer(difference, difference) * (n * m / (n + m))) / (n + m)
    values, vectors = torch.linalg.eigh(total)
    # Directions of no variance at all: the whitening leaves them alone, as its authors' does.
    known = values > 1e-9 * values.max()
    root = values.clamp_min(0).sqrt()
    whiten = vectors @ torch.where(known, 1 / root.clamp_min(1e-30), 0.0).diag() @ vectors.T
    colour = vectors @ torch.where(known, root, 0.0).diag() @ vectors.T
    axis = whiten @ difference
    axis = axis / axis.norm()
    left, right = colour @ axis, whiten @ axis
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
    """As many random orthonormal directions at the same place: a control."""
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
    if not length > 0:
        raise RequestError(f"the two classes have the same mean at the {place}, so there is no direction between them")
    return Subspace(
        place, (direction / length).float()[:, None], offset.float(), (source.replace("_", " "),), (length,), source
    )


def _mean(moments: Moments) -> Float[Tensor, " d"]:
    assert moments.mean is not None and moments.mean.ndim == 1, "fitters take the samples of one place"
    return moments.mean.double().cpu()


def _scatter(moments: Moments) -> Float[Tensor, "d d"]:
    return moments.cov().double().cpu() * (moments.count - 1)


def _within(plus: Moments, minus: Moments) -> Float[Tensor, "d d"]:
    return (_scatter(plus) + _scatter(minus)) / (plus.count + minus.count)


def _middle(plus: Moments, minus: Moments) -> Float[Tensor, " d"]:
    return (plus.count * _mean(plus) + minus.count * _mean(minus)) / (plus.count + minus.count)


def _second_moment(moments: Moments) -> Float[Tensor, "d d"]:
    mean = _mean(moments)
    return _scatter(moments) / moments.count + torch.outer(mean, mean)
