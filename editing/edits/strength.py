"""The strength of an edit as a number that can be turned: 0 is the base, 1 the edit as it was learned."""

from dataclasses import replace
from functools import singledispatch
from typing import Any

from ..errors import RequestError
from .adapter_merge import AdapterMerge
from .base import WeightEdit
from .dense import Delta, DenseUpdate
from .low_rank import ExpertFactors, Factors, LowRankUpdate, Update
from .pruned_units import PrunedUnits
from .subspace_removal import Edit


def scaled(edit: WeightEdit, strength: float) -> WeightEdit:
    """The same edit, ``strength`` times as strong.

    A sum is multiplied, which interpolates the weights between base and edited ones; of an orthogonalization the share
    that is removed is multiplied. The base's weights are not needed.

    Args:
        edit: As it was learned or read.
        strength: Factor; 1 leaves the edit as it is.

    Raises:
        RequestError: An edit of this kind has no strength.

    Example:
        >>> half = scaled(edit, 0.5)  # doctest: +SKIP
    """
    return edit if strength == 1.0 else _scaled(edit, strength)


def check_has_strength(edit: WeightEdit) -> None:
    """Raise unless the edit has a strength that can be turned.

    Raises:
        RequestError: It has none.
    """
    scaled(edit, 0.5)


@singledispatch
def _scaled(edit: Any, strength: float) -> Any:
    raise RequestError(
        f"a {edit.method} edit has no strength that a KL budget could choose; leave out the budget, or give an edit that"
        " adds to weights or removes a direction"
    )


@_scaled.register
def _(edit: Edit, strength: float) -> Edit:
    embedding = None if edit.embedding_strength is None else edit.embedding_strength * strength
    layers = tuple(value * strength for value in edit.layer_strengths)
    mlps = None if edit.mlp_strengths is None else tuple(value * strength for value in edit.mlp_strengths)
    return replace(edit, layer_strengths=layers, embedding_strength=embedding, mlp_strengths=mlps)


@_scaled.register
def _(edit: LowRankUpdate, strength: float) -> LowRankUpdate:
    return replace(edit, factors={name: _factors(one, strength) for name, one in edit.factors.items()})


@_scaled.register
def _(edit: DenseUpdate, strength: float) -> DenseUpdate:
    return replace(edit, deltas={name: Delta(delta.values * strength) for name, delta in edit.deltas.items()})


@_scaled.register
def _(edit: AdapterMerge, strength: float) -> AdapterMerge:
    return replace(edit, updates={name: _update(name, update, strength) for name, update in edit.updates.items()})


@_scaled.register
def _(edit: PrunedUnits, strength: float) -> PrunedUnits:
    raise RequestError(
        "pruned units are removed whole, and the edit holds no order among them, so a KL budget has no strength to"
        " choose; leave out the budget and lower share instead"
    )


def _factors(factors: Factors | ExpertFactors, strength: float) -> Factors | ExpertFactors:
    return replace(factors, left=factors.left * strength)


def _update(name: str, update: Update, strength: float) -> Update:
    if isinstance(update, Factors | ExpertFactors):
        return _factors(update, strength)
    raise RequestError(
        f"the adapter replaces or rescales {name}, which has no strength that a KL budget could choose; leave out the"
        " budget, or give an adapter of low-rank sums alone"
    )
